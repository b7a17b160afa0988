"""Where the sources of AgentGym-RL and AgentGym are: a checkout nearby, or what the settings say."""
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tasks.lib.errors import UserError
from tasks.lib.redaction import hide_logins

RL, GYM = "AGENTGYM_RL_SRC", "AGENTGYM_SRC"
# What tells a checkout, relative to its root.
MARKS = {RL: "AgentGym-RL/verl", GYM: "agentenv/agentenv"}


def is_url(source: str) -> bool:
    """Return whether `source` is a git URL and not a folder."""
    return bool(re.match(r"(https?|ssh|git)://|git@", source))


def find_checkouts(root: Path) -> dict[str, Path]:
    """Return the checkouts that this project, at `root`, lies in or beside, or that lie in it.

    AgentGym is looked for in AgentGym-RL's submodule first: that commit is the one AgentGym-RL was made with.
    """
    found = {}
    rl_places = [root, root / "AgentGym-RL", root.parent, root.parent / "AgentGym-RL"]
    rl = next((place for place in rl_places if (place / MARKS[RL]).is_dir()), None)
    if rl:
        found[RL] = rl
    gym_places = [*([rl / "AgentGym"] if rl else []), root / "AgentGym", root.parent / "AgentGym", root.parent]
    gym = next((place for place in gym_places if (place / MARKS[GYM]).is_dir()), None)
    if gym:
        found[GYM] = gym
    return found


def check_source(name: str, source: str, root: Path) -> str:
    """Return `source`, the user's value of the setting `name`, in the form that the Dockerfiles expect.

    A folder inside the checkout that was meant (AgentGym-RL/AgentGym-RL, AgentGym/agentenv) stands for the checkout.

    Raises:
        UserError: a folder without the expected sources, or a URL that no commit pins.
    """
    if is_url(source):
        if "#" not in source:
            raise UserError(f"{name}={hide_logins(source)} is not pinned; add #<commit>")
        return source
    folder = (root / os.path.expanduser(source)).resolve()  # Path.expanduser raises for a user that is not there
    for place in (folder, folder.parent):
        if (place / MARKS[name]).is_dir():
            return str(place)
    raise UserError(f"{name}={source} has no {MARKS[name]}; point it at the root of a checkout, or unset it")


def choose_sources(root: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the Compose variables for the sources: what `settings` say, else the checkouts found, else nothing.

    Nothing leaves Compose with its default, a pinned git URL.

    Raises:
        UserError: see `check_source`.
    """
    found = {name: str(path) for name, path in find_checkouts(root).items()}
    return {
        name: check_source(name, settings[name], root) if settings.get(name) else found[name]
        for name in (RL, GYM) if settings.get(name) or name in found
    }


def revision(source: str) -> str:
    """Return the commit of a checkout or of a pinned URL, with `-dirty` for local changes; `unknown` where none is."""
    if is_url(source):
        return source.partition("#")[2].partition(":")[0] or "unknown"
    top = _git(source, "rev-parse", "--show-toplevel")
    # A copy without its own repository may lie in another one, whose commit says nothing of it.
    if top and not os.path.samefile(top, source) and not _git(source, "ls-files", "--", "."):
        return "unknown"
    return _git(source, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or "unknown"


def origin(source: Path) -> str:
    """Return the public address of a checkout's remote, without any login; `unknown` where there is none."""
    url = hide_logins(_git(str(source), "remote", "get-url", "origin")).replace("***@", "", 1)
    return url if is_url(url) else "unknown"


def _git(folder: str, *words: str) -> str:
    """Return what git says about `folder`; empty where it says nothing, or there is no git."""
    try:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
