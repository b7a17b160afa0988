"""Merge sharded FSDP checkpoints into Hugging Face safetensors."""
import os

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from tasks.lib.programs import environment, run_program
from tasks.lib.settings import ROOT, resolve, resolve_path

PROGRAM = ROOT / "scripts" / "model_merger.py"
RUNNERS = ("auto", "docker", "local")
HUB_VARIABLES = ("HF_TOKEN", "HF_ENDPOINT")

LOCAL_DIR_HELP = "Checkpoint folder (default: $LOCAL_DIR). Repeat it for ranks that lie in several folders."
SAVE_DIR_HELP = "Folder for the merged model (default: $SAVE_DIR, then LOCAL_DIR/huggingface)."
RUNNER_HELP = "auto, local (this Python) or docker (the scripts image)."


def merger_args(local_dir: list[str] | None, **flags: str | bool | list[str] | None) -> list[str]:
    """Return the merger's command line: `LOCAL_DIR` where no folder is given, and the flags that are set."""
    args = []
    for name, value in {"local_dir": local_dir or [resolve_path("LOCAL_DIR")], **flags}.items():
        flag = "--" + name.replace("_", "-")
        for single in value if isinstance(value, list) else [value]:
            if single:
                args += [flag] if single is True else [flag, single]
    return args


def run_merger(c: Context, runner: str, args: list[str]) -> None:
    """Run the merger with `args` where `runner` says."""
    if runner not in RUNNERS:
        raise Exit(f"merge: unknown runner {runner!r}; choose one of {', '.join(RUNNERS)}", code=2)
    if runner == "docker":
        raise Exit(
            "merge: --runner docker needs the scripts image, which this version does not build; use --runner local",
            code=2)
    run_program(c, PROGRAM, args, env=environment(HUB_VARIABLES, os.environ))


@task(default=True,
      positional=[],
      auto_shortflags=False,
      iterable=["local_dir", "allow"],
      help={
          "local_dir": LOCAL_DIR_HELP,
          "save_dir": SAVE_DIR_HELP,
          "hf_upload_path": "Hub repository, user/name, to upload to (default: $HF_UPLOAD_PATH, then no upload).",
          "private": "Create the Hub repository as a private one.",
          "dtype": "bfloat16, float16, float32 or keep (default: bfloat16). Integer and boolean tensors keep theirs.",
          "device": "auto, cpu, cuda or cuda:N (default: auto).",
          "max_shard_size": "Largest output file, such as 5GB (default: 5GB).",
          "threads": "Copying threads (default: chosen by the program).",
          "lora": "What to do with LoRA weights: adapter or fuse (default: stop and say so).",
          "lora_alpha": "LoRA's alpha, where lora_train_meta.json has none.",
          "allow": "Accept a finding: keys (they do not fit the config) or nonfinite (NaN, infinite). Repeatable.",
          "tied_weights": "Where tied weights differ: keep both, or drop the copy (default: stop and say so).",
          "verify": "Read the result again and compare it with the shards, tensor by tensor.",
          "force": "Replace weights that are already in the save folder.",
          "dry_run": "Plan and check only; write nothing.",
          "json": "Print the summary as one JSON object.",
          "trust_remote_code": "Let transformers run the checkpoint's own code when checking the keys.",
          "runner": RUNNER_HELP,
      })
def run(c: Context,
        local_dir: list[str] | None = None,
        save_dir: str = "",
        hf_upload_path: str = "",
        private: bool = False,
        dtype: str = "",
        device: str = "",
        max_shard_size: str = "",
        threads: str = "",
        lora: str = "",
        lora_alpha: str = "",
        tied_weights: str = "",
        allow: list[str] | None = None,
        verify: bool = False,
        force: bool = False,
        dry_run: bool = False,
        json: bool = False,
        trust_remote_code: bool = False,
        runner: str = "auto") -> None:
    """Merge a sharded checkpoint into safetensors."""
    run_merger(
        c, runner,
        merger_args(local_dir,
                    save_dir=resolve_path("SAVE_DIR", save_dir),
                    hf_upload_path=resolve("HF_UPLOAD_PATH", hf_upload_path),
                    private=private,
                    dtype=dtype,
                    device=device,
                    max_shard_size=max_shard_size,
                    threads=threads,
                    lora=lora,
                    lora_alpha=lora_alpha,
                    tied_weights=tied_weights,
                    allow=allow,
                    verify=verify,
                    force=force,
                    dry_run=dry_run,
                    json=json,
                    trust_remote_code=trust_remote_code))


@task(positional=[],
      auto_shortflags=False,
      iterable=["local_dir"],
      help={
          "local_dir": LOCAL_DIR_HELP,
          "json": "Print one JSON object in place of the tables.",
          "runner": RUNNER_HELP
      })
def inspect(c: Context, local_dir: list[str] | None = None, json: bool = False, runner: str = "auto") -> None:
    """Show a checkpoint's mesh, ranks, tensors and faults."""
    run_merger(c, runner, merger_args(local_dir, inspect=True, json=json))


@task(positional=[],
      auto_shortflags=False,
      iterable=["local_dir"],
      help={
          "local_dir": LOCAL_DIR_HELP,
          "save_dir": SAVE_DIR_HELP,
          "json": "Print one JSON object in place of the table.",
          "runner": RUNNER_HELP
      })
def verify(c: Context,
           local_dir: list[str] | None = None,
           save_dir: str = "",
           json: bool = False,
           runner: str = "auto") -> None:
    """Compare a merged model with its shards, bit by bit."""
    run_merger(c, runner,
               merger_args(local_dir, save_dir=resolve_path("SAVE_DIR", save_dir), verify_only=True, json=json))
