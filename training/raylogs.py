"""What Ray wrote of a dead attempt: its workers' and daemons' logs lie outside the run's folder and go with the container."""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from training.diagnosis import Evidence

PATTERNS = ("worker-*.err", "raylet.out", "raylet.err", "gcs_server.out", "python-core-driver-*.log")
FILE_BYTES, ALL_BYTES = 256 << 10, 16 << 20  # the end of a file, of all files, that is kept


def find(variables: Mapping[str, str], since: float) -> list[Path]:
    """Return the logs of the last Ray session that were written to after `since`, seconds since 1970.

    Of a cluster there are none: its logs are on other machines, and not of this run alone.

    Args:
        variables: the trainer's environment.
    """
    if variables.get("RAY_ADDRESS") not in (None, "", "local"):
        return []
    found = []
    # Ray puts its session below RAY_TMPDIR in a folder of its own, or in one named by --temp-dir right there.
    for base in (Path(variables.get("RAY_TMPDIR") or "/tmp") / "ray", Path(variables.get("RAY_TMPDIR") or "/tmp")):
        for pattern in PATTERNS:
            for place in (base / "session_latest" / "logs").glob(pattern):
                with suppress(OSError):
                    told = place.stat()
                    if told.st_mtime >= since and told.st_size:
                        found.append(place)
    return sorted(set(found))


def keep(places: Iterable[Path], target: Path) -> Evidence:
    """Copy the ends of the logs into the folder `target`, and return what they tell."""
    evidence, kept = Evidence(), 0
    for place in places:
        try:
            with open(place, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - FILE_BYTES))
                data = file.read(FILE_BYTES)
        except OSError:
            continue
        for line in data.decode("utf-8", "replace").splitlines():
            evidence.feed(line)
        if kept + len(data) <= ALL_BYTES:
            with suppress(OSError):
                target.mkdir(exist_ok=True)
                (target / place.name).write_bytes(data)
                kept += len(data)
    return evidence
