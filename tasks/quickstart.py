"""See the whole story on any laptop: train, merge, serve, evaluate; no Docker, GPU, key or network."""
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.errors import UserError
from tasks.lib.host.programs import run_module, run_program
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import put
from tasks.lib.settings import ROOT

FOLDER = ROOT / "saves" / "quickstart"
SCRIPTS, SAMPLES = ROOT / "scripts", ROOT / "samples"  # what merges; what trains and compares
# The demo's items for training, and every third of those for evaluation: four of each level.
LESSONS = range(48, 240)
HELD_OUT = range(2, 48, 3)
PACKAGES = ("fastapi", "uvicorn", "torch", "transformers", "safetensors", "numpy", "ml_dtypes", "rich")
LONGEST_ACTION = 6  # tokens, which are bytes: north, and the end mark


class Steps:
    """Counts the steps, says what each is, and keeps what was done and how long it took."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done: list[tuple[str, float]] = []

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Say what begins; note it when it has worked."""
        print()
        put(f"[{len(self.done) + 1}/{self.total}] {what}")
        began = time.monotonic()
        yield
        self.done.append((what, time.monotonic() - began))


@task(positional=[], auto_shortflags=False)
def quickstart(c: Context) -> None:
    """Train a tiny agent, merge its shards, evaluate it."""
    actor, untrained, reference = FOLDER / "actor", FOLDER / "untrained" / "actor", FOLDER / "reference.safetensors"
    lessons, report = FOLDER / "lessons.jsonl", FOLDER / "report.html"
    if not c.config.run.dry:
        require_packages()
    steps = Steps(5)
    with as_ctrl_c(), demo_server(c) as url:
        with steps.step(f"the expert of the environment demo plays {len(LESSONS)} items over HTTP"):
            folder = play(c, url, "expert", LESSONS, "lessons")
            run_module(c, "evaluation", ["conversations", str(folder), "--out", str(lessons)])
        with steps.step("4 FSDP ranks train a tiny byte-level Qwen2 on what it said, and save as verl does"):
            run_program(c, SAMPLES / "train_sample.py", [
                "--data",
                str(lessons), "--save-dir",
                str(actor), "--reference",
                str(reference), "--before-dir",
                str(untrained)
            ])
        with steps.step("the merger puts the shards together, and transformers loads the result"):
            for place, flags in ((untrained, []), (actor, ["--verify"])):
                run_program(c, SCRIPTS / "model_merger.py", ["--local-dir", str(place), "--force", *flags])
            run_program(c, SAMPLES / "compare_model.py",
                        ["--model", str(actor / "huggingface"), "--reference",
                         str(reference)])
        with steps.step(
                f"the merged models are served on the CPU; they play {len(HELD_OUT)} items that are new to them"):
            runs = [play_served(c, url, untrained / "huggingface", "untrained")]
            runs += [play_served(c, url, actor / "huggingface", "trained")]
        with steps.step("a random player and the expert play the same items"):
            runs = [play(c, url, "random", HELD_OUT), *runs, play(c, url, "expert", HELD_OUT)]
    print(flush=True)
    run_module(c, "evaluation", ["compare", *map(str, runs), "--out", str(report)])
    if not c.config.run.dry:
        show_result(steps.done)
        judge(runs[0], runs[2])


def require_packages() -> None:
    """Stop before anything is started where this Python lacks what trains, merges, serves and plays.

    Raises:
        UserError: see above.
    """
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        raise UserError(f"this Python has no {', '.join(absent)}; `pip install -r requirements-dev.txt`")


@contextmanager
def demo_server(c: Context) -> Iterator[str]:
    """Give the address of the demo's server: the one that is up on this machine, or one for the time being.

    Raises:
        UserError: it does not start.
    """
    from tasks.lib.environments import lease
    from tasks.lib.environments import local as env_local
    from tasks.lib.environments.lookup import server_environment
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.rows import environment
    from tasks.lib.environments.running import local_url
    from tasks.lib.host.ports import choose_port, port_is_free, take_port
    row = environment("demo")
    if c.config.run.dry:
        yield local_url(row) or env_local.url(Options(choose_port(row.port, port_is_free)))
        return

    def start() -> str:
        options = Options(choose_port(row.port, take_port))
        # This Python has what the demo needs: no virtual environment is made, which would take a network.
        return env_local.up(row,
                            options,
                            ROOT,
                            ROOT / "data" / row.name,
                            server_environment(row),
                            wait=120,
                            python=Path(sys.executable))

    def leave(shared: bool) -> None:
        if not shared:
            env_local.down(row.name)

    with lease.shared_server(row.name, lambda: local_url(row), start, leave) as url:
        yield url


def play(c: Context, url: str, model: str, items: range, run: str = "", base_url: str = "") -> Path:
    """Let `model` play `items`; return the run's folder.

    Raises:
        UserError: the runner's exit code.
    """
    folder = FOLDER / "eval" / (run or model)
    words = ["run", "--env=demo", f"--server={url}", f"--model={model}", f"--items={','.join(map(str, items))}"]
    words += [f"--out={folder}", "--fresh", "--quiet", "--seed=0", f"--environments={ROOT / 'environments.toml'}"]
    if base_url:
        words += [
            f"--base-url={base_url}", "--base-url-as=served on the CPU", "--temperature=0",
            f"--max-tokens={LONGEST_ACTION}", "--concurrency=4"
        ]
    # The model is served here: a key for another endpoint is none of its business.
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "MAX_ROUND")}
    run_module(c, "evaluation", words, env=kept)
    return folder


def play_served(c: Context, url: str, model: Path, name: str) -> Path:
    """Serve the Hugging Face folder `model` while it plays the items for evaluation; return the run's folder."""
    from tasks.lib.serving.local import served_locally
    served = nullcontext("http://127.0.0.1:8000/v1") if c.config.run.dry else served_locally(model, name)
    with served as base_url:
        return play(c, url, name, HELD_OUT, base_url=base_url)


def show_result(done: list[tuple[str, float]]) -> None:
    """Print what was done and what to type next."""
    from rich.console import Console
    from rich.table import Table
    table = Table("done", title="quickstart", title_justify="left", title_style="bold")
    table.add_column("seconds", justify="right")
    for what, took in done:
        table.add_row(what, f"{took:.1f}")
    print()
    console = Console(highlight=False)
    console.print(table)
    console.print("Next, with a checkpoint of your own:\n"
                  "  invoke merge.inspect --local-dir saves/x/global_step_100/actor\n"
                  "  invoke merge --local-dir saves/x/global_step_100/actor --verify\n"
                  "  invoke eval --checkpoint saves/x/global_step_100/actor --env demo\n"
                  "and with an environment server:\n"
                  "  invoke env.list\n"
                  "  invoke env.up --env demo --runner local")


def success(run: Path) -> dict[str, Any]:
    """Return a run's success rate: mean, low and high of its interval."""
    figure: dict[str, Any] = json.loads((run / "summary.json").read_text())["success"]
    return figure


def judge(random: Path, trained: Path) -> None:
    """Stop where the trained agent is not above chance: what was merged is then not what was trained.

    Raises:
        UserError: exit code 1.
    """
    chance, reached = success(random), success(trained)
    if reached["mean"] <= chance["high"]:
        raise UserError(
            f"the trained agent's success rate, {reached['mean']:.2f}, is not above the interval of a "
            f"random player's, which ends at {chance['high']:.2f}; something is wrong, see {FOLDER / 'eval'}",
            code=1)
