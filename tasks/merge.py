"""Merge sharded FSDP checkpoints into Hugging Face safetensors."""
import os
from importlib.util import find_spec
from pathlib import Path

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.engine import containers
from tasks.lib.engine.mounts import Translation
from tasks.lib.errors import UserError
from tasks.lib.host.programs import GPUS_HERE, choose_program_runner, environment, run_program
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import say
from tasks.lib.settings import ROOT, resolve, resolve_path

PROGRAM = ROOT / "scripts" / "model_merger.py"
PROGRAM_INSIDE = "/opt/workbench/scripts/model_merger.py"
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "ml_dtypes", "rich")
HUB_VARIABLES = ("HF_TOKEN", "HF_ENDPOINT")

LOCAL_DIR_HELP = "Checkpoint folder (default: $LOCAL_DIR). Repeat it for ranks that lie in several folders."
SAVE_DIR_HELP = ("Folder for the merged model (default: $SAVE_DIR, then LOCAL_DIR/huggingface, "
                 "or LOCAL_DIR/lora_adapter with --lora adapter).")
VERIFY_DIR_HELP = (
    "Folder of the merged model (default: $SAVE_DIR, then LOCAL_DIR/huggingface, or LOCAL_DIR/lora_adapter "
    "where that alone was merged).")
MODEL_KEY_HELP = "Part of a distributed checkpoint of torch's that is the model, such as app.model (default: the one called so)."
RUNNER_HELP = "local (this Python), docker (the scripts image) or auto: local where its packages are installed."
GPUS_HELP = "With --runner docker: all, none, or indices such as 0,1 (default: $GPUS, then all)."

Flags = dict[str, str | bool | list[str] | None]


def merger_args(local_dir: list[str], **flags: str | bool | list[str] | None) -> list[str]:
    """Return the merger's command line: the folders, and the flags that are set."""
    args = []
    for name, value in {"local_dir": local_dir, **flags}.items():
        flag = "--" + name.replace("_", "-")
        for single in value if isinstance(value, list) else [value]:
            if single:
                args += [flag] if single is True else [flag, single]
    return args


def lacking() -> list[str]:
    """Return the packages that the merger needs and this Python has not."""
    return [name for name in NEEDED if not find_spec(name)]


def runner_for(runner: str) -> str:
    """Return where a merge runs: local or docker; by itself here, where this Python has what it needs.

    Raises:
        UserError: no such runner.
    """
    return choose_program_runner(runner, not lacking())


def run_merger(c: Context,
               runner: str,
               local_dir: list[str] | None,
               save_dir: str = "",
               gpus: str = "",
               **flags: str | bool | list[str] | None) -> None:
    """Run the merger where `runner` says, on `local_dir` or, where that is empty, on `LOCAL_DIR`."""
    if local_dir and not all(local_dir):
        raise UserError("--local-dir is empty, which is no folder; is a variable unset?")
    folders = [resolve_path("LOCAL_DIR", folder) for folder in local_dir or [""]]
    absent, chosen = lacking(), runner_for(runner)
    if runner == "auto":  # on standard error: the other one may be for a machine
        why = f"this Python lacks {', '.join(absent)}" if absent else "this Python has all that it needs"
        say(f"running with --runner {chosen}: {why}")
    if chosen == "local":
        if gpus:
            raise UserError(f"{GPUS_HERE}")
        with as_ctrl_c():
            run_program(c,
                        PROGRAM,
                        merger_args(folders, save_dir=save_dir, **flags),
                        env=environment(HUB_VARIABLES, os.environ))
    else:
        run_in_container(c, folders, save_dir, gpus, flags)


def run_in_container(c: Context, folders: list[str], save_dir: str, gpus: str, flags: Flags) -> None:
    """Run the merger in the scripts container, with the container's names for the host's folders.

    Raises:
        UserError: 2 for a folder that is not there, which Docker would create as root, or that cannot be made; else the
            merger's exit code.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"no folder {folder}; give --local-dir the folder with the shards")
    if save_dir and not c.config.run.dry and not flags.get("dry_run"):
        try:
            Path(save_dir).parent.mkdir(parents=True, exist_ok=True)  # as the caller: Docker would make it as root
        except OSError as error:
            raise UserError(
                f"cannot make {Path(save_dir).parent}: {error.strerror}; choose another --save-dir") from None
    translation = Translation(ROOT)
    inside = [translation.path(folder) for folder in folders]
    for name in ("config_dir", "base_model"):
        if named := flags.get(name):
            if not Path(str(named)).is_dir():
                raise UserError(f"no folder {named}; give --{name.replace('_', '-')} the base model's folder")
            flags = {**flags, name: translation.path(str(named))}
    save_inside = translation.output(save_dir) if save_dir else ""
    containers.run(c,
                   "scripts", ["python", PROGRAM_INSIDE, *merger_args(inside, save_dir=save_inside, **flags)],
                   gpus=gpus,
                   volumes=translation.volumes)


@task(
    default=True,
    positional=[],
    auto_shortflags=False,
    iterable=["local_dir", "allow"],
    help={
        "local_dir":
        LOCAL_DIR_HELP,
        "save_dir":
        SAVE_DIR_HELP,
        "config_dir":
        "Folder with the base model's config.json and tokenizer, where the checkpoint has none.",
        "hf_upload_path":
        "Hub repository, user/name, to upload to; it loses other weights (default: $HF_UPLOAD_PATH, then no upload).",
        "private":
        "Create the Hub repository as a private one; stop where it is public.",
        "dtype":
        "bfloat16, float16, float32 or keep (default: bfloat16). Integer and boolean tensors keep theirs.",
        "device":
        "auto (the CPU; where a GPU is, the faster by the first blocks), cpu, cuda or cuda:N (default: $MERGE_DEVICE, auto).",
        "max_shard_size":
        "Largest output file, such as 5GB (default: 5GB).",
        "threads":
        "Copying threads (default: as many as pay, 4 to 32, by the first blocks).",
        "lora":
        "What to do with LoRA weights: adapter or fuse (default: stop and say so).",
        "base_model":
        "With --lora fuse: folder of the base model (config and safetensors), where the checkpoint holds LoRA weights alone.",
        "lora_alpha":
        "LoRA's alpha, where neither lora_train_meta.json nor lora_adapter/adapter_config.json has it.",
        "allow":
        "Accept a finding: keys (they do not fit the config), nonfinite (NaN, infinite) or buffers (they differ between "
        "ranks; the lowest rank's are taken). Repeatable.",
        "tied_weights":
        "Where tied weights differ: keep both, or drop the copy (default: stop and say so).",
        "names":
        "Where transformers 5 fuses or renames tensors in memory: files (as save_pretrained writes them) or memory (default: "
        "files).",
        "verify":
        "Read the result again and compare it with the shards, tensor by tensor.",
        "force":
        "Replace weights that are already in the save folder.",
        "dry_run":
        "Plan and check only; write nothing.",
        "json":
        "Print the summary as one JSON object.",
        "model_key":
        MODEL_KEY_HELP,
        "trust_remote_code":
        "Let transformers run the checkpoint's own code when checking the keys.",
        "runner":
        RUNNER_HELP,
        "gpus":
        GPUS_HELP,
    })
def run(c: Context,
        local_dir: list[str] | None = None,
        save_dir: str = "",
        config_dir: str = "",
        hf_upload_path: str = "",
        private: bool = False,
        dtype: str = "",
        device: str = "",
        max_shard_size: str = "",
        threads: str = "",
        lora: str = "",
        base_model: str = "",
        lora_alpha: str = "",
        tied_weights: str = "",
        names: str = "",
        allow: list[str] | None = None,
        verify: bool = False,
        force: bool = False,
        dry_run: bool = False,
        json: bool = False,
        trust_remote_code: bool = False,
        model_key: str = "",
        runner: str = "auto",
        gpus: str = "") -> None:
    """Merge a sharded checkpoint into safetensors."""
    run_merger(c,
               runner,
               local_dir,
               save_dir=resolve_path("SAVE_DIR", save_dir),
               gpus=gpus,
               config_dir=os.path.expanduser(config_dir),
               hf_upload_path=resolve("HF_UPLOAD_PATH", hf_upload_path),
               private=private,
               dtype=dtype,
               device=resolve("MERGE_DEVICE", device),
               max_shard_size=max_shard_size,
               threads=threads,
               lora=lora,
               base_model=os.path.expanduser(base_model),
               lora_alpha=lora_alpha,
               tied_weights=tied_weights,
               names=names,
               allow=allow,
               verify=verify,
               force=force,
               dry_run=dry_run,
               json=json,
               trust_remote_code=trust_remote_code,
               model_key=model_key)


@task(positional=[],
      auto_shortflags=False,
      iterable=["local_dir"],
      help={
          "local_dir": LOCAL_DIR_HELP,
          "model_key": MODEL_KEY_HELP,
          "json": "Print one JSON object in place of the tables.",
          "runner": RUNNER_HELP
      })
def inspect(c: Context,
            local_dir: list[str] | None = None,
            model_key: str = "",
            json: bool = False,
            runner: str = "auto") -> None:
    """Show a checkpoint's mesh, ranks, tensors and faults."""
    run_merger(c, runner, local_dir, inspect=True, model_key=model_key, json=json)


@task(positional=[],
      auto_shortflags=False,
      iterable=["local_dir"],
      help={
          "local_dir": LOCAL_DIR_HELP,
          "save_dir": VERIFY_DIR_HELP,
          "base_model": "Folder of the base model under LoRA weights (default: the one that was merged).",
          "json": "Print one JSON object in place of the table.",
          "runner": RUNNER_HELP
      })
def verify(c: Context,
           local_dir: list[str] | None = None,
           save_dir: str = "",
           base_model: str = "",
           json: bool = False,
           runner: str = "auto") -> None:
    """Compare a merged model with its shards."""
    run_merger(c,
               runner,
               local_dir,
               save_dir=resolve_path("SAVE_DIR", save_dir),
               base_model=os.path.expanduser(base_model),
               verify_only=True,
               json=json)


@task(positional=[],
      auto_shortflags=False,
      help={"gpus": "all, none, or indices such as 0,1 (default: $GPUS, then all)."})
def shell(c: Context, gpus: str = "") -> None:
    """Open a shell in the scripts container."""
    containers.run(c, "scripts", ["bash"], gpus=gpus)
