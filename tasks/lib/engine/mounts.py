"""Which host folders the containers see, and under which names."""
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tasks.lib.errors import BadSetting, UserError
from tasks.lib.settings import FOLDERS

WORKSPACE = PurePosixPath("/workspace")
# Folders outside the mounts appear under this prefix: under their own name they could hide the image's own.
OUTSIDE = PurePosixPath("/host")


@dataclass
class Translation:
    """Translates host paths to container paths and remembers what must be mounted for that.

    Attributes:
        root: the project's folder on the host.
        volumes: (host folder, container folder) for each folder outside the mounts.
    """
    root: Path
    volumes: dict[str, str] = field(default_factory=dict)

    def path(self, host: str | Path) -> str:
        """Return the container's name of the folder `host`, mounting it for the run where no mount has it.

        Links are followed first: a container cannot follow one that leads out of a mount. A folder that is not
        there is not mounted, because Docker would create it as root.

        Raises:
            UserError: a name that Docker cannot mount.
        """
        real = Path(os.path.realpath(host))
        for folder in FOLDERS:
            mount = Path(os.path.realpath(self.root / folder))
            if real.is_relative_to(mount):
                return str(WORKSPACE / folder / real.relative_to(mount).as_posix())
        inside = str(OUTSIDE / real.as_posix().lstrip("/"))
        if ":" in str(real):
            raise UserError(f"{real} has a colon, which Docker's mounts cannot take; move or rename the folder")
        if real.is_dir():
            self.volumes[str(real)] = inside
        return inside

    def output(self, host: str | Path) -> str:
        """Return the container's name of the folder `host`, which the program creates or replaces.

        Its parent is what gets mounted: a mount point itself cannot be replaced.
        """
        path = Path(os.path.realpath(host))
        return str(PurePosixPath(self.path(path.parent)) / path.name)


def ensure_folders(root: Path, environ: Mapping[str, str]) -> list[Path]:
    """Create the mounted folders that are absent, as the caller, and return those created.

    Root creating them for another user's containers (HOST_UID) hands them over.

    Raises:
        BadSetting: an id that is no number, or a link to a folder that is not there.
    """
    created = []
    ids = {name: environ[name] for name in ("HOST_UID", "HOST_GID") if environ.get(name)}
    for name, value in ids.items():
        if not value.isdecimal():
            raise BadSetting(f"{name}={value} is no number; `id -u` and `id -g` tell yours")
    for folder in FOLDERS:
        path = root / folder
        if path.is_symlink() and not path.exists():
            raise BadSetting(f"{path} is a link to {os.readlink(path)}, which is not there; create that folder, "
                             "or remove the link")
        if not path.exists():
            path.mkdir()
            created.append(path)
            if os.getuid() == 0 and "HOST_UID" in ids:
                os.chown(path, int(ids["HOST_UID"]), int(ids.get("HOST_GID") or ids["HOST_UID"]))
    return created
