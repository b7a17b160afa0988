"""See the main job run on any laptop: no Docker, GPU, key or network."""
import time

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.programs import run_program
from tasks.lib.settings import ROOT

FOLDER = ROOT / "saves" / "quickstart"


@task(positional=[], auto_shortflags=False)
def quickstart(c: Context) -> None:
    """Shard a small model with FSDP, merge it, compare."""
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
    if not c.config.run.dry:
        show_result([what for what, *_ in steps], seconds)


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
                  "  invoke merge --local-dir saves/x/global_step_100/actor --verify")
