"""What of the evaluation is fuzzed: an endpoint's answers, an environment's, the files that it reads, what it prints."""
import asyncio
import gzip
import io
import json
import random
import sys
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fuzz import HERE, Target

sys.path.insert(0, str(HERE.parent))

REASONS: list[Any] = [
    "stop", "length", "tool_calls", "content_filter", "error", "abort", "insufficient_system_resource", "model_length",
    None, "", 7, [], "stop\x1b[2J"
]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1e308, -1e308, 10**30, 10**399, 0.1, "", "x", "win", "\x1b[2K", "\u202e", "\ud800",
    "9" * 50, [], {}, [[]], [None], {
        "": None
    }, "a\nb", "success rate 100 %", "<script>", "NaN"
]
RAW = [
    b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":1,"a":2}', b"\xff", b"", b"nul", b'"\\ud800"',
    b'{"a":' * 150 + b"1" + b"}" * 150
]
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def mutated(chance: random.Random, value: Any, share: float = 0.15) -> Any:
    """Return a JSON value with some of its parts exchanged, left out, added or nested."""
    if chance.random() < share:
        return chance.choice([*ODD, [value], {"error": value}, {"message": value}])
    if isinstance(value, dict):
        found = {key: mutated(chance, one, share) for key, one in value.items() if chance.random() > share / 3}
        if chance.random() < share:
            found[chance.choice(["error", "detail", "x", "id", "reward", "choices", "usage",
                                 "\x1b"])] = chance.choice(ODD)
        return found
    if isinstance(value, list):
        return [mutated(chance, one, share) for one in value]
    return value


def spelt(chance: random.Random, value: Any) -> bytes:
    """Return JSON, as it is, with a foreign piece in it, or cut off."""
    data = json.dumps(value).encode()
    how = chance.random()
    if how < 0.1:
        place = chance.randrange(len(data) + 1)
        data = data[:place] + chance.choice(RAW) + data[place:]
    elif how < 0.15:
        data = data[:chance.randrange(len(data) + 1)]
    elif how < 0.2:
        data = chance.choice(RAW)
    return data


def cased(kind: str, body: bytes, **more: Any) -> bytes:
    """Return a case: what is tried, and the bytes."""
    return json.dumps({"kind": kind, "body": body.decode("latin-1"), **more}).encode()


def a_completion(chance: random.Random) -> bytes:
    from tests.fixtures.standins import completion
    body: Any = completion(chance.choice(["win", "", None, "<think>x</think>win"]))
    body["choices"][0]["finish_reason"] = chance.choice(["stop", "stop", *REASONS])
    data = spelt(chance, mutated(chance, body, chance.choice([0.0, 0.02, 0.1])))
    if chance.random() < 0.2:
        data = b"".join(b"data: " + data + b"\n\n"
                        for _ in range(chance.randrange(4))) + chance.choice([b"", b"data: [DONE]\n\n"])
    return cased("model",
                 data,
                 status=chance.choice([200] * 6 + [201, 204, 301, 400, 413, 422, 500]),
                 packed=chance.random() < 0.2)


def a_reply(chance: random.Random) -> bytes:
    route = chance.choice(["/create", "/reset", "/step", "/close"])
    whole = {"/create": {"id": 5}, "/close": True}.get(route, {"observation": "count 2", "reward": 1.0, "done": True})
    return cased("environment",
                 spelt(chance, mutated(chance, whole)),
                 route=route,
                 status=chance.choice([200] * 6 + [204, 307, 404, 429, 500]),
                 packed=chance.random() < 0.2)


def check_answer(data: bytes, folder: Path) -> bool:
    """Play an episode in which one answer is the case's; return whether it has a score.

    Nothing but an outcome may come of it, and an answer that says that it failed has no score.
    """
    from evaluation import foreign
    from evaluation.answers import FINISHED
    from evaluation.attempts import SCORED, read_attempt
    from evaluation.endpoint import ChatModel
    from evaluation.episodes import Limits, Place, attempt
    from evaluation.items import Item
    from evaluation.problems import Misuse, Stopped
    from evaluation.prompts import plain
    from evaluation.protocol import Server
    from evaluation.rows import read_row
    from evaluation.text import json_line
    from tests.fixtures.servers import FIXTURE_ROWS
    from tests.fixtures.standins import Answer, counter_player, endpoint, environment
    case = json.loads(data)
    body = case["body"].encode("latin-1")
    answer = Answer(
        gzip.compress(body) if case["packed"] else body, case["status"],
        {"content-encoding": "gzip"} if case["packed"] else {})
    row = read_row("form-textcraft", FIXTURE_ROWS)

    async def play(server_url: str, model_url: str) -> Any:
        model = ChatModel("m", "none", model_url, tries=1, limit=100_000)
        async with Server(server_url, row.protocol, 5.0, limit=100_000) as server:
            try:
                return await attempt(server, model.player, row, plain(row), Item("form-textcraft_2", 2), 0, None,
                                     Limits(5, tries=1, wait=0.1), [], Place())
            finally:
                await model.aclose()

    say = counter_player if case["kind"] != "model" else lambda messages, _: answer
    fault = (lambda path, number, _: answer
             if path == case["route"] and number == 0 else None) if case["kind"] == "environment" else (lambda *_: None)
    with environment(fault) as env, endpoint(say) as model:
        try:
            record = asyncio.run(play(str(vars(env)["url"]), str(vars(model)["base_url"])))
        except (Misuse, Stopped) as problem:
            harmless(str(problem), "")
            return False
    read_attempt(foreign.loads(json_line(record)))
    harmless(record["error"], "")
    scored = record["outcome"] in SCORED
    if scored and case["kind"] == "model" and not body.lstrip().startswith(b"data:"):
        said = foreign.loads(body)
        choice = said["choices"][0]
        reason = choice.get("finish_reason") or ""
        failed = said.get("error") or choice.get("error") or choice["message"].get("error")
        unknown = reason and reason.lower() not in FINISHED and record["outcome"] != "context_overflow"
        if failed or unknown:
            raise AssertionError(f"a failed answer has a score: {body[:300]!r}")
    return scored


def harmless(text: str, kept: str) -> None:
    """Raise where a terminal would obey a part of the text."""
    bad = [
        one for one in text
        if one not in kept and (unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") or one in TURNING)
    ]
    if bad:
        raise AssertionError(f"{bad[:5]!r} in {text[:200]!r}")


FILES = ("run.json", "attempts.jsonl", "summary.json", "rule.json", "sessions.jsonl", "prices.json", "prices.toml",
         "items.json", "superseded.jsonl")


def a_file(chance: random.Random) -> bytes:
    name = chance.choice(FILES)
    manifest = {
        "config": {
            "env": "form-textcraft",
            "model": "m",
            "samples": 1,
            "max_round": 5,
            "items": ["form-textcraft_0", "form-textcraft_1"]
        },
        "row": {},
        "title": "t",
        "items_from": "x",
        "revision": "r",
        "work": [{
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 2.0
        }],
        "prompt": {
            "source": "plain",
            "place": "",
            "revision": "",
            "user": "u"
        }
    }
    if name in ("attempts.jsonl", "superseded.jsonl", "sessions.jsonl"):
        line: Any = record() if name != "sessions.jsonl" else {"server": "s", "open": 1}
        body = b"\n".join(spelt(chance, mutated(chance, line, 0.05)) for _ in range(3)) + b"\n"
    elif name == "prices.toml":
        body = chance.choice([
            b'["m"]\ninput = 1e400\noutput = 1', b"a = " + b"[" * 3000, b"m = 1", b'["m"]\ninput = "x"', b"\xff",
            b'["m"]\ninput = 1\noutput = ' + b"9" * 400
        ])
    else:
        whole: Any = {
            "run.json": manifest,
            "prices.json": {
                "m": {
                    "input": 1.0,
                    "output": 2.0
                }
            },
            "items.json": [{
                "item_id": "form-textcraft_0"
            }, 1],
            "summary.json": {
                "attempts": 1,
                "expected": 2,
                "errors": 0,
                "success": {
                    "mean": 1.0,
                    "low": 0.1,
                    "high": 1.0
                }
            },
            "rule.json": {
                "name": "x"
            }
        }[name]
        body = spelt(chance, mutated(chance, whole, 0.08))
    return json.dumps({"name": name, "body": body.decode("latin-1"), "manifest": manifest}).encode()


def record() -> dict[str, Any]:
    """Return an attempt as it is kept."""
    return {
        "item": "form-textcraft_0",
        "index": 0,
        "category": "c",
        "sample": 0,
        "seed": None,
        "outcome": "success",
        "success": True,
        "reward": 1.0,
        "scaled": 1.0,
        "upstream_reward": 1.0,
        "rounds": 1,
        "invalid_actions": 0,
        "usage": {
            "prompt": 1,
            "completion": 1,
            "cached": 0,
            "reasoning": 0,
            "unknown": 0
        },
        "seconds": 1.0,
        "model_seconds": 1.0,
        "env_seconds": 1.0,
        "model_retries": 0,
        "error": "",
        "tries_before": [],
        "started": "2026-01-01T00:00:00+00:00",
        "task": "t",
        "first": "f",
        "turns": [{
            "completion": "a",
            "action": "a",
            "observation": "o",
            "reward": 1.0
        }]
    }


def check_file(data: bytes, folder: Path) -> bool:
    """Read a run's folder, a price file or an item list of which one file is the case's; return whether all was well.

    Whatever it is, lines that can be printed and an exit code of 0, 1 or 2 come of it.
    """
    from evaluation.__main__ import main
    from tests.fixtures.servers import FIXTURE_ROWS
    case = json.loads(data)
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(case["manifest"]))
    (run / "attempts.jsonl").write_text(json.dumps(record()) + "\n")
    place = folder if case["name"].startswith(("prices", "items")) else run
    (place / case["name"]).write_bytes(case["body"].encode("latin-1"))
    prices = [f"--prices={folder / case['name']}"] if case["name"].startswith("prices") else []
    commands: list[list[str]] = [["list", str(folder)], ["rescore", str(run), *prices], ["report",
                                                                                         str(run), *prices],
                                 ["conversations", str(run), "--out",
                                  str(folder / "talks")]]
    if case["name"] == "items.json":
        commands = [[
            "run", "--check", "--env", "form-textcraft", "--environments",
            str(FIXTURE_ROWS), "--items",
            str(folder / "items.json"), "--base-url", "http://127.0.0.1:9/v1"
        ]]
    well = True
    for words in commands:
        out, error = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(error):
            code = main(words)
        if code not in (0, 1, 2):
            raise AssertionError(f"exit code {code}")
        harmless(out.getvalue() + error.getvalue(), "\n")
        if code and error.getvalue().count("\n") > 5:
            raise AssertionError(f"{error.getvalue()[:500]}")
        well = well and not code
    return well


def a_text(chance: random.Random) -> bytes:
    pieces = [
        "\x1b[2K", "\r", "\n", "\x9b31m", "\u202e", "\u2066", "\u200f", "\x07", "\u2028", "ok", "\x00", "[red]",
        "\ud800", "<b>", "$x$", "|", "ä", "\U000e0041"
    ]
    text = "".join(chance.choice([*pieces, chr(chance.randrange(0x110000))]) for _ in range(chance.randrange(30)))
    return text.encode("utf-8", "surrogatepass")


def check_text(data: bytes, folder: Path) -> bool:
    """Print a text as every printer would."""
    from rich.console import Console

    from evaluation import charts, problems, report, show
    from evaluation.foreign import replaced
    from evaluation.output import complain
    from evaluation.text import one_line
    text = data.decode("utf-8", "surrogatepass")
    printers: list[Callable[[], object]] = [
        lambda: complain(text), lambda: print(one_line(text)), lambda: print(problems.Misuse(text)),
        lambda: print(problems.ModelFault(text))
    ]
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        for one in printers:
            one()
        table = show.Table("x")
        show.add_row(table, text)
        Console(file=out, width=100).print(table)
    harmless(out.getvalue(), "\n")
    page = report.template().from_string("{{ text }}").render(text=text)
    harmless(page, "\n\t")
    if "<b>" in page:
        raise AssertionError("markup")
    charts.bars([replaced(text) or "x"], {"run": [1.0]}, "c", "u")
    return True


def ready() -> None:
    """Import what is slow to import, before time is counted."""
    import matplotlib.figure  # noqa: F401
    import openai  # noqa: F401

    import evaluation.commands  # noqa: F401


def targets() -> dict[str, Target]:
    """Return the evaluation's targets."""
    return {
        "evaluation.model_answers": Target(a_completion, check_answer, ready),
        "evaluation.environment_replies": Target(a_reply, check_answer, ready),
        "evaluation.files": Target(a_file, check_file, ready),
        "evaluation.text": Target(a_text, check_text, ready),
    }
