"""How much memory a server takes, its children included."""
import os
from typing import Dict, Mapping, NamedTuple, Optional, Set

CGROUP = "/sys/fs/cgroup"
UNLIMITED = 1 << 60  # version 1 says "no limit" as a number near 2^63


class Process(NamedTuple):
    """A line of the process table: parent, session, resident pages."""
    parent: int
    session: int
    pages: int


def processes() -> Dict[int, Process]:
    """Return the process table by id; empty where /proc is absent."""
    found = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
                found[int(entry)] = Process(int(fields[1]), int(fields[3]), int(fields[21]))
            except (OSError, IndexError):
                pass  # the process ended while we read
    return found


def own(table: Mapping[int, Process], pid: int) -> Set[int]:
    """Return the processes that belong to the server `pid`.

    In a container of its own, whose first process leads the server's session, that is all of them. On a machine that
    it shares: those of its session, and their children in sessions of their own (browsers).
    """
    session = table[pid].session
    if is_contained(table, pid):
        return set(table)
    found = {one for one, process in table.items() if process.session == session}
    while True:
        children = {one for one, process in table.items() if process.parent in found} - found
        if not children:
            return found
        found |= children


def is_contained(table: Mapping[int, Process], pid: int) -> bool:
    """Return True if the server `pid` has a container to itself: then the first process leads its session."""
    return pid in table and 1 in table and table[1].session == table[pid].session


def charged(root: str = CGROUP) -> Optional[int]:
    """Return the bytes that the container is charged: its processes', shared memory, and what lies in a tmpfs.

    Without the files that the kernel keeps only as long as nobody needs the room, as `docker stats` counts. None where
    no control group says so.
    """
    for folder, current, cached in (("", "memory.current", "inactive_file"), ("memory", "memory.usage_in_bytes",
                                                                              "total_inactive_file")):
        try:
            with open(os.path.join(root, folder, current)) as file:
                bytes_now = int(file.read())
            with open(os.path.join(root, folder, "memory.stat")) as file:
                stat = dict(line.split() for line in file)
            return bytes_now - int(stat.get(cached, 0))
        except (OSError, ValueError):
            continue
    return None


def allowed_mb(root: str = CGROUP) -> Optional[float]:
    """Return the container's limit in MB; None where there is none, or no control group says so."""
    for name in ("memory.max", os.path.join("memory", "memory.limit_in_bytes")):
        try:
            with open(os.path.join(root, name)) as file:
                limit = int(file.read())
            return limit / 1e6 if limit < UNLIMITED else None
        except (OSError, ValueError):  # `max` is no number
            continue
    return None


def share_of(pid: int) -> int:
    """Return the bytes of the process `pid`, of what it shares its share alone; 0 where that cannot be read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, ValueError, IndexError):
        return 0


def memory_mb() -> float:
    """Return the memory of this server and its children, in MB; 0 where /proc is absent.

    In a container what that is charged, which is what it is killed for; on a shared machine the processes' own.
    """
    table = processes()
    if not table:
        return 0.0
    if is_contained(table, os.getpid()):
        bytes_now = charged()
        if bytes_now is not None:
            return round(bytes_now / 1e6, 1)
    page = os.sysconf("SC_PAGE_SIZE")
    return round(sum(share_of(one) or table[one].pages * page for one in own(table, os.getpid())) / 1e6, 1)


def limit_mb(planned: float) -> float:
    """Return the memory that this server may have, in MB: its container's limit, or else the `planned` one."""
    return (allowed_mb() if is_contained(processes(), os.getpid()) else None) or planned
