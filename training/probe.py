"""Look at the place where the trainer would run, without Ray, GPU memory or importing torch: `python -m training.probe JSON`.

The argument is an object of what to look at (see `look`); the answer is one line of JSON on standard output. Hydra
itself composes the configuration, from verl's own file, as `--cfg job --resolve` would.
"""
from __future__ import annotations

import ast
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.exchange import Stays, opener

MARK = "training.probe: "
URL_SECONDS = 4
CONFIG = Path("agent_trainer") / "config"
NAME = "ppo_trainer"
PACKAGES = ("verl", "agentenv", "torch", "vllm", "ray", "transformers", "hydra-core", "flash-attn", "wandb")
# What stands around the two texts of an environment (utils/agent_dataset/rl_dataset.py:117).
PROMPT = ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
          "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>")
MARKERS = ("<|im_start|>", "<|im_end|>")


def package_folder(name: str, path: Sequence[str] = ()) -> Path | None:
    """Return the folder of an installed package, else of one in the folders `path`, without importing it."""
    with suppress(ImportError, ValueError):
        spec = find_spec(name)
        if spec and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    return next((Path(place) / name for place in path if (Path(place) / name).is_dir()), None)


def compose(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the trainer's resolved configuration, composed by Hydra from the yaml in `folder`.

    Raises:
        ValueError: Hydra refuses an override, in one line.
        ImportError: no Hydra here.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    try:
        with initialize_config_dir(str(folder.resolve()), version_base=None):
            found = OmegaConf.to_container(hydra_compose(NAME, list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
        raise ValueError(" ".join(dict.fromkeys(lines[:3]))) from None
    return dict(found)  # type: ignore[arg-type]


def texts(source: str, owner: str) -> tuple[str, str] | None:
    """Return the two texts (user, assistant) that begin a conversation, read out of AgentGym's client class.

    They are literals: a tuple of two calls that take a dictionary with `value`, or a dictionary of such tuples by
    action format, of which the client's default is REACT.
    """
    found: dict[str, ast.expr] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for statement in node.body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    found[statement.targets[0].id] = statement.value
    start = found.get("conversation_start") or found.get("conversation_start_dict")
    if isinstance(start, ast.Dict):
        start = next((value for key, value in zip(start.keys, start.values, strict=True)
                      if isinstance(key, ast.Attribute) and key.attr == "REACT"), None)
    if not isinstance(start, ast.Tuple) or len(start.elts) != 2:
        return None
    said = []
    for call in start.elts:
        if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Dict)):
            return None
        for key, value in zip(call.args[0].keys, call.args[0].values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "value":
                said.append(_literal(value))
    if len(said) != 2 or None in said:
        return None
    return str(said[0]), str(said[1])


def _literal(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
        inner = _literal(node.func.value)
        return None if inner is None else inner.strip()
    return None


def prompt(folder: Path, file: str, owner: str) -> str | None:
    """Return the text that the trainer tokenizes for every item of an environment, read from agentenv in `folder`."""
    with suppress(OSError, SyntaxError, ValueError):
        said = texts((folder / "envs" / file).read_text(encoding="utf-8"), owner)
        if said:
            return PROMPT.format(user=said[0], assistant=said[1])
    return None


class Tokens:
    """A model's tokenizer, of its tokenizer.json, or through transformers where it has none.

    Raises:
        ValueError: it cannot be read, in one line.
        ImportError: the package for it is not here.
    """

    def __init__(self, model: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        file = model / "tokenizer.json"
        try:
            if file.is_file():
                from tokenizers import Tokenizer
                found = Tokenizer.from_file(str(file))
                self._ids = lambda text: found.encode(text, add_special_tokens=False).ids
            else:
                from transformers import AutoTokenizer
                slow = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
                self._ids = lambda text: slow(text, add_special_tokens=False)["input_ids"]
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None

    def count(self, text: str) -> int:
        """Return how many tokens `text` is."""
        return len(self._ids(text))


def architectures(vllm: Path | None, verl: Path | None) -> list[str] | None:
    """Return the model classes that both vLLM and verl's loader of its weights know, read from their sources."""
    known = _keys(vllm / "model_executor" / "models" / "registry.py") if vllm else None
    loaders = _keys(verl / "third_party" / "vllm" / "vllm_v_0_6_3" / "dtensor_weight_loaders.py") if verl else None
    if known is None or loaders is None:
        return sorted(known or loaders or []) or None
    return sorted(known & loaders)


def clients(verl: Path | None) -> list[str] | None:
    """Return the environments that the trainer has a client for, read from its source."""
    if verl is None:
        return None
    with suppress(OSError, SyntaxError):
        for node in ast.walk(ast.parse((verl / "utils" / "agentgym" / "client.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict) and len(node.keys) > 1:
                return [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return None


def _keys(file: Path) -> set[str] | None:
    """Return the string keys of the dictionaries that a module assigns to upper-case names."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    found = {
        key.value
        for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    return found or None


def claimed(kind: str) -> int | None:
    """Return how many GPUs or CPUs Ray is told to count (RAY_OVERRIDE_RESOURCES); None where it is not told."""
    with suppress(ValueError, TypeError, AttributeError):
        told = json.loads(os.environ.get("RAY_OVERRIDE_RESOURCES", "")).get(kind)
        return None if told is None else int(told)
    return None


def gpus() -> int | None:
    """Return how many NVIDIA GPUs a process sees here; None where it has no way to tell."""
    if (told := claimed("GPU")) is not None:
        return told
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if not program:
        return 0 if not Path("/dev/nvidia0").exists() else None
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    there = re.findall(r"^GPU \d+:(?:.*\(UUID: (GPU-[\w-]+)\))?", listed, re.MULTILINE)
    return len(there) if visible is None else visible_gpus(visible, there)


def visible_gpus(visible: str, there: Sequence[str]) -> int:
    """Return how many GPUs CUDA shows by CUDA_VISIBLE_DEVICES: those before the first one that is not there.

    Args:
        there: the UUIDs of the machine's, by index. Parts of one (MIG) are not listed, and taken to be there.
    """
    count = 0
    for one in map(str.strip, visible.split(",")):
        known = int(one) < len(there) if one.isdecimal() else one.startswith("MIG-") or (one.startswith("GPU-") and any(
            uuid.startswith(one) for uuid in there))
        if not known:
            break
        count += 1
    return count


def cpus() -> int:
    """Return how many CPUs Ray would count: those of the machine, or of the container's limit where it is less."""
    if (told := claimed("CPU")) is not None:
        return told
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def unreachable(url: str) -> str:
    """Return why nothing answers at `url`; empty where something does, whatever it says."""
    try:
        with opener(urllib.request.ProxyHandler({}), Stays()).open(url, timeout=URL_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def shared_memory() -> int | None:
    """Return the bytes of /dev/shm."""
    with suppress(OSError):
        found = os.statvfs("/dev/shm")
        return found.f_frsize * found.f_blocks
    return None


def closed_file(model: Path) -> str:
    """Return a file of the model's folder that cannot be read here; "" where all can."""
    for path in sorted(model.glob("*")):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model") and not os.access(
                path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            return str(path)
    return ""


def closed_cache(environ: Mapping[str, str]) -> str:
    """Return the folder that keeps `datasets` from making its cache, which it does at each start; "" where none does.

    https://huggingface.co/docs/datasets/cache
    """
    home = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    place = Path(environ.get("HF_DATASETS_CACHE") or Path(environ.get("HF_HOME") or home) / "datasets")
    place = Path(os.path.abspath(place.expanduser()))
    while not place.exists() and place != place.parent:
        place = place.parent
    able = os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    return "" if place.is_dir() and able else str(place)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries print off standard output, which is for the answer."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def look(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is there.

    Args:
        asked: any of: overrides (a list for Hydra), model (a folder), prompt (file and class of agentenv's client),
            path (folders that hold packages which are not installed), url (of the environment).

    Returns:
        python, versions, verl and agentenv (their folders), flash_attn, architectures, clients, gpus, cpus, shm (bytes), closed_cache (of data sets, or empty), unreachable (why the url does not answer, or empty); with
        overrides: resolved, or hydra_error; with model: closed_model (a file of it, or empty), tokenizer_error, markers (tokens of each of Qwen's), and with
        prompt: prompt_tokens. What could not be looked at is None.
    """
    path = list(asked.get("path") or ())
    verl, vllm, agentenv = (package_folder(name, path) for name in ("verl", "vllm", "agentenv"))
    found: dict[str, Any] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {},
        "verl": str(verl) if verl else None,
        "agentenv": str(agentenv) if agentenv else None,
        "flash_attn": package_folder("flash_attn", path) is not None,
        "architectures": architectures(vllm, verl),
        "clients": clients(verl),
        "gpus": gpus(),
        "cpus": cpus(),
        "shm": shared_memory(),
        "closed_cache": closed_cache(os.environ),
        "unreachable": unreachable(asked["url"]) if asked.get("url") else None,
        "resolved": None,
        "hydra_error": None,
        "closed_model": None,
        "tokenizer_error": None,
        "markers": None,
        "prompt_tokens": None,
    }
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    if asked.get("overrides") is not None and verl and (verl / CONFIG).is_dir():
        try:
            found["resolved"] = compose(verl / CONFIG, asked["overrides"])
        except ValueError as error:
            found["hydra_error"] = str(error)
        except ImportError:
            pass
    if asked.get("model"):
        found["closed_model"] = closed_file(Path(asked["model"]))
        try:
            tokens = Tokens(Path(asked["model"]))
        except ValueError as error:
            found["tokenizer_error"] = str(error)
        except ImportError:
            pass
        else:
            found["markers"] = [tokens.count(one) for one in MARKERS]
            said = prompt(agentenv, *asked["prompt"]) if agentenv and asked.get("prompt") else None
            found["prompt_tokens"] = None if said is None else tokens.count(said)
    return found


def main(words: Sequence[str]) -> int:
    """Print what `look` finds for the JSON object in `words`; return the exit code."""
    if len(words) != 1:
        print("usage: python -m training.probe JSON", file=sys.stderr)
        return 2
    try:
        asked = json.loads(words[0])
        if not isinstance(asked, dict):
            raise ValueError("no object")
    except ValueError as error:
        print(f"training.probe: the argument is no JSON object ({error})", file=sys.stderr)
        return 2
    with _quiet():
        found = look(asked)
    print(MARK + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
