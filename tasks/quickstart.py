"""See the main job run on any laptop: no Docker, GPU, key or network."""
import os
import sys
import time
from pathlib import Path

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from tasks.lib.programs import run_program
from tasks.lib.settings import ROOT

FOLDER = ROOT / "saves" / "quickstart"


@task(positional=[], auto_shortflags=False)
def quickstart(c: Context) -> None:
    """Shard a model, merge it, compare; play an environment."""
    actor, reference = FOLDER / "actor", FOLDER / "reference.safetensors"
    steps: list[tuple[str, str, list[str]]] = [
        ("4 FSDP ranks write a small Qwen2 checkpoint as verl does", "sample_checkpoint.py",
         ["--save-dir", str(actor), "--reference", str(reference)]),
        ("the merger puts the shards together", "model_merger.py", ["--local-dir", str(actor), "--verify", "--force"]),
        ("transformers loads the result", "compare_model.py",
         ["--model", str(actor / "huggingface"), "--reference", str(reference)]),
    ]  # yapf: disable
    seconds = []
    for number, (what, program, args) in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {what}", flush=True)
        began = time.monotonic()
        run_program(c, ROOT / "scripts" / program, args)
        seconds.append(time.monotonic() - began)
    done = [what for what, *_ in steps]
    if not c.config.run.dry:
        print("\nThe environment demo starts on this machine; its expert and a random player play it", flush=True)
        began = time.monotonic()
        done.append(play_demo())
        seconds.append(time.monotonic() - began)
        show_result(done, seconds)


def play_demo() -> str:
    """Start the environment demo as a process, play every item over HTTP, stop it; say how it went."""
    from tasks.lib import env_local, env_play, env_runs
    from tasks.lib.env_plan import Options, choose_port
    row = env_runs.find_row("quickstart", "demo")
    already = env_runs.local_url(row)
    try:
        # This Python has what the demo needs: no virtual environment is made, which would take a network.
        url = already or env_local.up(row,
                                      Options(choose_port(row.port, env_local.port_is_free)),
                                      ROOT,
                                      ROOT / "data" / row.name,
                                      os.environ,
                                      wait=120,
                                      python=Path(sys.executable))
        return env_play.play_both(row, url)
    except env_local.LocalError as error:
        raise Exit(f"quickstart: {error}", code=1) from None
    finally:
        if not already:
            env_local.down(row.name)


def show_result(steps: list[str], seconds: list[float]) -> None:
    """Print what was done and what to type next."""
    from rich.console import Console
    from rich.table import Table
    table = Table(title="quickstart", title_justify="left", title_style="bold")
    table.add_column("done")
    table.add_column("seconds", justify="right")
    for what, took in zip(steps, seconds, strict=True):
        table.add_row(what, f"{took:.1f}")
    print()
    console = Console(highlight=False)
    console.print(table)
    console.print("Next, with a checkpoint of your own:\n"
                  "  invoke merge.inspect --local-dir saves/x/global_step_100/actor\n"
                  "  invoke merge --local-dir saves/x/global_step_100/actor --verify\n"
                  "and with an environment server:\n"
                  "  invoke env.list\n"
                  "  invoke env.up --env demo --runner local")
