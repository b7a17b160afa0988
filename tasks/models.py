"""Fetch models to train and evaluate."""
import os
import subprocess
import sys
from pathlib import Path

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.notices import put
from tasks.lib.settings import ROOT


@task(positional=["name"],
      auto_shortflags=False,
      help={
          "name": "Model of the Hub, such as Qwen/Qwen2.5-7B-Instruct.",
          "to": "Folder for it (default: models/ and the second part of the name).",
          "revision": "Branch, tag or commit (default: main).",
          "everything": "Weights in further forms too (default: safetensors, where there are some, alone).",
      })
def fetch(c: Context, name: str | None = None, to: str = "", revision: str = "", everything: bool = False) -> None:
    """Fetch a model from the Hub into models/."""
    from tasks.lib.fetching import models
    if name in ("--help", "-h"):  # invoke takes whatever follows for the name
        subprocess.run([sys.executable, "-m", "invoke", "--help", "models.fetch"], cwd=ROOT, check=False)
        return
    from tasks.lib.tables import human_size
    repository = models.repository_name(name or "")
    folder = Path(os.path.abspath(os.path.expanduser(to))) if to else ROOT / "models" / repository.rpartition("/")[2]
    models.fetch(repository, folder, revision, everything, c.config.run.dry, lambda line: put(f"models.fetch: {line}"),
                 human_size)
