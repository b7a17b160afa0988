"""What Python and its tools leave behind in the project's folder."""
import os
from pathlib import Path

from tasks.lib.settings import FOLDERS

CACHES = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
# The user's data, other people's sources, and environments that would have to compile again.
KEPT = (*FOLDERS, "AgentGym", "AgentGym-RL", ".git", ".run", ".venv", "venv")


def bytecode_folders(root: Path) -> list[Path]:
    """Return the cache folders below `root`, none of them inside another or inside what is kept."""
    found = []
    for place, folders, _ in os.walk(root):
        here = Path(place)
        found += [here / name for name in folders if name in CACHES]
        top = here == root
        folders[:] = [name for name in folders if name not in CACHES and not (top and name in KEPT)]
    return sorted(found)
