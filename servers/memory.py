"""How much memory a server takes, its children included."""
import os
from typing import Dict, Mapping, NamedTuple, Set


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
    if 1 in table and table[1].session == session:
        return set(table)
    found = {one for one, process in table.items() if process.session == session}
    while True:
        children = {one for one, process in table.items() if process.parent in found} - found
        if not children:
            return found
        found |= children


def memory_mb() -> float:
    """Return the resident memory of this server and its children, in MB; 0 where /proc is absent."""
    table = processes()
    pages = sum(table[one].pages for one in own(table, os.getpid())) if table else 0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
