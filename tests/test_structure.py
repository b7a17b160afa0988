"""What holds for the whole tree: who may import whom."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wings_and_layers_are_kept():
    """The contracts of pyproject.toml: wings never import each other, and in tasks/ imports go one way."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join((".", "scripts"))
        },
        capture_output=True,
        text=True,
        check=False)
    assert done.returncode == 0, done.stdout + done.stderr
