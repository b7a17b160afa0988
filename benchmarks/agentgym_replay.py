"""Play the same items with AgentGym's own evaluator and with this one, on AgentGym's own servers, and compare all of it.

    python benchmarks/agentgym_replay.py --agentgym ../AgentGym --agentgym-python peers/bin/python \\
        --server textcraft=http://127.0.0.1:26004 --server babyai=http://127.0.0.1:26002 [--items textcraft=0-59]

Both ask one endpoint over HTTP, whose answers follow from the messages alone, so that the same conversation goes on in the
same way; some answers have no action, two of them, or other oddities. Equal must be every message, each attempt's reward as
AgentGym's client takes it, and the figures of --upstream-compat. Exit code 1 where anything differs.

Start the servers with `invoke env.up --env NAME --runner local`; --agentgym-python needs torch, transformers, requests, openai.
"""
import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = {
    "textcraft": ("TextCraftTask", "0-59", 30),
    "babyai": ("BabyAITask", "0-59", 20),
    "sciworld": ("SciworldTask", "0-4600:230", 15),
    "wordle": ("WordleTask", "0-39", 8),
    "maze": ("MazeTask", "0-24", 30),
}
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
WALLS = {"above you": "up", "below you": "down", "to your left": "left", "to your right": "right"}
EXPERIMENTS = ("look around", "inventory", "task", "wait1", "open door to kitchen", "go to kitchen", "go to hallway",
               "open cupboard", "focus on air", "pick up thermometer", "look at agent", "fly to the moon", "")


def numbers(text: str) -> list[int]:
    """Return the items of `0-59` or, each so many, `0-4600:230`."""
    span, _, step = text.partition(":")
    low, _, high = span.partition("-")
    return list(range(int(low), int(high or low) + 1, int(step or 1)))


def answer(messages: list[dict[str, str]]) -> str:
    """Return what the scripted model says: a function of the conversation and of nothing else."""
    draw = int.from_bytes(hashlib.sha256(json.dumps(messages).encode()).digest()[:8], "big")
    action = act(messages, draw // 100)
    odd = {
        0: "I do not know.",
        1: f"Thought:\na\n\nAction:\n{action}\n\nAction:\n{action}",
        2: action,
        3: f"Thought: now.\nAction: {action}!\nand no more ü",
        4: f"Action:{action}",
        5: "Action:",
    }
    return odd.get(draw % 100, f"Thought:\nround {len(messages)}\n\nAction:\n{action}")


def act(messages: list[dict[str, str]], draw: int) -> str:
    """Return an action: often a good one, so that episodes end in every way."""
    said = [one["content"] for one in messages if one["role"] == "user"]
    start, last, rounds = said[1], said[-1], len(said) - 2
    if "Crafting commands" in start:
        commands = re.findall(r"craft \d+ (.+) using (.+)", start)
        goal = re.findall(r"Goal: craft (.+)\.", start)[-1]
        parts: list[str] = next((found.split(", ") for name, found in commands if name == goal), [])
        steps = [f"get {part}"
                 for part in parts] + [line for line in re.findall(r"craft \d+ .+", start) if f" {goal} using" in line]
        steps += ["inventory", f"get {draw % 5} {goal}", *(f"craft 1 {name} using {found}" for name, found in commands)]
        return steps[rounds] if rounds < len(parts) + 1 else steps[draw % len(steps)]
    if "Available actions" in last:
        offered = re.findall(r"'([^']*)'|\"([^\"]*)\"", last.split("Available actions", 1)[1])
        names = ["".join(pair) for pair in offered] or ["move forward"]
        goal = set(re.findall(r"\w+", re.findall(r"goal: (.*)", start)[0]))
        best = max(names, key=lambda name: len(goal & set(re.findall(r"[a-z]+", name))))
        return best if draw % 3 else names[draw // 3 % len(names)]
    if "Wordle" in start:
        words = re.findall(r"(?m)^(?:[a-z] ){4}[a-z]$|^[a-z]{5}$", start.split("```")[1])
        guesses = [re.findall(r"(?:[a-z] ){4}[a-z]", one["content"])[-1:] for one in messages[3::2]]
        marks = [re.findall(r"(?:[bgy] ){4}[bgy]", text)[-1:] for text in said[2:]]
        known = [(guess[0].split(), mark[0].split()) for guess, mark in zip(guesses, marks, strict=False)
                 if guess and mark]
        left = [word for word in words if all(fits(list(word.replace(" ", "")), guess, mark) for guess, mark in known)]
        return " ".join((left or words)[draw % len(left or words)].replace(" ", "")) if draw % 8 else "zzzzz"
    if "maze solver" in said[0]:
        here = [tuple(map(int, pair))
                for pair in re.findall(r"current position is at position (\d+), (\d+)", last)][-1:]
        there = [tuple(map(int, pair)) for pair in re.findall(r"goal is at position (\d+), (\d+)", last)][-1:]
        blocked = {move for words, move in WALLS.items() if words in last.splitlines()[-1]}
        free = [move for move in MOVES if move not in blocked] or list(MOVES)
        if here and there and draw % 2:
            free.sort(
                key=lambda move: sum(abs(a + d - b) for a, d, b in zip(here[0], MOVES[move], there[0], strict=True)))
            return f"move {free[0]}"
        return f"move {free[draw // 2 % len(free)]}" if draw % 20 else "jump"
    seen = re.findall(r"door to the ([a-z ]+?) \(", last) + re.findall(r"\n\t(?:an? )?([a-z ]+)", last)
    made = [f"{verb} {thing}" for thing in seen for verb in ("open door to", "go to", "focus on", "pick up", "look at")]
    choices = [*EXPERIMENTS, *made]
    return choices[draw % len(choices)]


def fits(word: list[str], guess: list[str], mark: list[str]) -> bool:
    """Return True if a word is possible after a guess and its marks, but for letters that are there twice."""
    return all((a == b) if m == "g" else (a != b and (b in word) == (m == "y"))
               for a, b, m in zip(word, guess, mark, strict=True))


class Model(BaseHTTPRequestHandler):
    """The endpoint."""
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = {"role": "assistant", "content": answer(asked["messages"])}
        data = json.dumps({
            "id": "x", "object": "chat.completion", "created": 0, "model": "script",
            "choices": [{"index": 0, "finish_reason": "stop", "message": said}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        }).encode()  # yapf: disable
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def play_theirs(options: argparse.Namespace) -> None:
    """Play in AgentGym's evaluator and write a JSON line for each item. This half runs in AgentGym's Python."""
    sys.path.insert(0, str(options.agentgym / "agentenv"))
    from agentenv import envs  # type: ignore[import-not-found]
    from agentenv.controller import APIAgent, Evaluator  # type: ignore[import-not-found]
    name, _, url = options.server[0].partition("=")
    task = getattr(envs, TASKS[name][0])(client_args={"env_server_base": url, "data_len": 10**6, "timeout": 300})
    evaluator = Evaluator(APIAgent("none", options.theirs, "script"), [task])
    items = numbers(options.items[0])
    with open(options.out, "w", encoding="utf-8") as file:
        for item in items:
            found = evaluator.eval(max_rounds=TASKS[name][2], idxs=[item])
            talk = [[one["role"], one["content"]] for one in found.experiences[0].conversation]
            file.write(
                json.dumps({
                    "item": item,
                    "reward": found.experiences[0].reward,
                    "success": float(found.success),
                    "talk": talk
                }) + "\n")


def compare(name: str, url: str, items: str, model: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what of an environment's items is equal, and the first that is not."""
    words = [
        "--agentgym",
        str(options.agentgym), "--server", f"{name}={url}", "--items", items, "--theirs", model, "--out",
        str(folder / "theirs")
    ]
    run([options.agentgym_python, __file__, *words], "AgentGym's evaluator")
    ours = folder / "ours"
    listed = ",".join(map(str, numbers(items)))
    run([
        sys.executable, "-m", "evaluation", "run", "--env", name, "--server", url, "--agentgym", str(options.agentgym), "--base-url", model, "--model",
        "script", "--items", listed, "--max-round", str(TASKS[name][2]), "--out", str(ours), "--max-error-rate", "0", "--upstream-compat", "--quiet"
    ], "the runner")  # yapf: disable
    run([sys.executable, "-m", "evaluation", "conversations",
         str(ours), "--all", "--out",
         str(folder / "talk.jsonl")], "the runner")
    theirs = [json.loads(line) for line in (folder / "theirs").read_text(encoding="utf-8").splitlines()]
    records = {
        one["index"]: one
        for one in map(json.loads, (ours / "attempts.jsonl").read_text(encoding="utf-8").splitlines())
    }
    talks = {
        one["item"]: one["messages"]
        for one in map(json.loads, (folder / "talk.jsonl").read_text(encoding="utf-8").splitlines())
    }
    differ = []
    for one in theirs:
        record = records[one["item"]]
        said = [[part["role"], part["content"]] for part in talks[record["item"]]]
        # AgentGym keeps the observation after the last action too; a conversation to train on ends with the action.
        said.append(["user", record["turns"][-1]["observation"]])
        if said != one["talk"]:
            at = next((n for n, pair in enumerate(zip(said, one["talk"], strict=False)) if pair[0] != pair[1]),
                      min(len(said), len(one["talk"])))
            differ.append(
                f"{name} {one['item']}: message {at} of {len(one['talk'])}: {said[at:at + 1]} and AgentGym's {one['talk'][at:at + 1]}"[:
                                                                                                                                       1000]
            )
        elif record["upstream_reward"] != one["reward"]:
            differ.append(f"{name} {one['item']}: reward {record['upstream_reward']} and AgentGym's {one['reward']}")
    figures = json.loads((ours / "summary.json").read_text(encoding="utf-8"))["upstream"]
    mean = {
        key: sum(one[part] for one in theirs) / len(theirs)
        for key, part in (("score", "reward"), ("success", "success"))
    }
    for key, value in mean.items():
        if abs(figures[key] - value) > 1e-12:
            differ.append(f"{name}: --upstream-compat says {key} {figures[key]}, AgentGym {value}")
    return {
        "env": name, "items": len(theirs), "equal": len(theirs) - len([one for one in differ if ": --" not in one]), "differ": differ, **mean,
        "messages": sum(len(one["talk"]) for one in theirs), "rewards": len({one["reward"] for one in theirs})
    }  # yapf: disable


def run(words: list[str], who: str) -> None:
    """Run a program; its last words end this one where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise SystemExit(
            f"agentgym_replay: {who} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agentgym", required=True, type=Path, help="AgentGym checkout")
    parser.add_argument("--agentgym-python",
                        default=sys.executable,
                        help="Python for AgentGym's evaluator (default: the one running this)")
    parser.add_argument("--server",
                        required=True,
                        action="append",
                        metavar="ENV=URL",
                        help="an environment's server; repeatable")
    parser.add_argument("--items",
                        action="append",
                        default=[],
                        metavar="ENV=0-9",
                        help="items of an environment (default: 206 in all of the five)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--theirs", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.agentgym / "agentenv" / "agentenv").is_dir():
        parser.error(f"no agentenv/agentenv in --agentgym {options.agentgym}; name an AgentGym checkout")
    options.agentgym = options.agentgym.resolve()
    for text in options.server:
        if text.partition("=")[0] not in TASKS or not text.partition("=")[2]:
            parser.error(f"--server {text}: name {', '.join(TASKS)}, = and its address")
    if options.theirs:
        play_theirs(options)
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model, found = f"http://127.0.0.1:{server.server_port}/v1", []
    chosen = dict(text.partition("=")[::2] for text in options.items)
    for name, url in (text.partition("=")[::2] for text in options.server):
        with tempfile.TemporaryDirectory() as folder:
            one = compare(name, url, chosen.get(name, TASKS[name][1]), model, options, Path(folder))
        found.append(one)
        if not options.json:
            print(
                "{env}: {equal} of {items} episodes equal, {messages} messages, {rewards} different rewards, score {score:.4g}, "
                "success {success:.4g}".format(**one),
                *one["differ"][:5],
                sep="\n",
                flush=True)
    total, equal = sum(one["items"] for one in found), sum(one["equal"] for one in found)
    print(
        json.dumps({
            "items": total,
            "equal": equal,
            "environments": found
        }) if options.json else f"{equal} of {total}")
    sys.exit(any(one["differ"] for one in found))


if __name__ == "__main__":
    main()
