#!/usr/bin/env python3
"""Serve a Hugging Face folder on an OpenAI-compatible address, by `transformers serve`, offline.

    python scripts/serve_transformers.py --model saves/x/actor/huggingface --name x --port 8000

Two things `transformers serve` has no flag for: the model's name is the path that it was given, and it decodes greedily,
whatever temperature a request asks for, unless the folder's own generation_config.json says do_sample. So it is given a
folder of links to the model's files that is called like the model, with a generation_config.json of its own.

Needs transformers 5 with its extra `serving`.
"""
import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(description="Serve a Hugging Face folder by `transformers serve`.")
    top.add_argument("--model", required=True, type=Path, help="the folder")
    top.add_argument("--name", default="checkpoint", help="the model's name in requests (default: checkpoint)")
    top.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    top.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    return top


def generation(own: dict[str, Any]) -> dict[str, Any]:
    """Return the generation config: what a request leaves open, `own` decides; the rest is not cut off.

    A request's temperature of 0 turns do_sample off again. Without a top_k of its own transformers takes 50.
    """
    return {"top_k": 0, **own, "do_sample": True}


def link(model: Path, folder: Path) -> None:
    """Fill `folder` with links to the model's files and the generation config."""
    folder.mkdir()
    for path in model.resolve().iterdir():
        if path.name != GENERATION:
            (folder / path.name).symlink_to(path)
    own = model / GENERATION
    (folder / GENERATION).write_text(json.dumps(generation(json.loads(own.read_text()) if own.is_file() else {})))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop."""
    options = parser().parse_args(argv)
    if not (options.model / "config.json").is_file():
        print(f"serve: no config.json in {options.model}; name a Hugging Face folder", file=sys.stderr)
        return 2
    if not re.fullmatch(r"[\w.-]+", options.name):
        print(f"serve: --name {options.name!r}; use letters, digits, dot, dash, underscore", file=sys.stderr)
        return 2
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    # Threads that wait for each other sleep. Spinning, they made every request twenty times as slow as soon as another
    # program wanted a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers.cli.transformers import main as transformers
    with tempfile.TemporaryDirectory() as place:
        link(options.model, Path(place) / options.name)
        os.chdir(place)
        sys.argv = ["transformers", "serve", options.name, "--host", options.host, "--port", str(options.port),
                    "--device", "auto" if torch.cuda.is_available() else "cpu"]  # yapf: disable
        transformers()
    return 0


if __name__ == "__main__":
    sys.exit(main())
