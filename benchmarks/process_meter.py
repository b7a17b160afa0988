"""Runs a command and measures it with all the processes it starts, from /proc (Linux; standard library only)."""
from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.02  # s between two looks at the process tree


@dataclass
class Measurement:
    """One run: seconds, bytes, and the exit code (negative: the signal that ended it).

    `largest_rss` is the kernel's own high-water mark of the largest process. `tree_rss` is the largest sum seen of the
    resident memory of all processes, `tree_anon` and `tree_file` its parts at that moment; it counts a page once for
    each process that shares it, so it is an upper bound. Exact shares (PSS) would need smaps_rollup, which walks the
    page tables and slows down the large contenders.
    """
    seconds: float
    cpu_seconds: float  # user and system; on a busy machine steadier than `seconds`
    exit_code: int
    largest_rss: int
    tree_rss: int
    tree_anon: int
    tree_file: int
    disk_read: int  # what the storage delivered: about 0 when the page cache had it
    disk_written: int  # pages made dirty or written around the cache, less those dropped by a truncation
    read_calls: int  # bytes that read() and its like returned; memory-mapped reads are not in it
    write_calls: int
    tail: str = ""  # the last lines of what it printed


def measure(command: list[str], env: dict[str, str], cwd: Path, log: Path) -> Measurement:
    """Run `command` to its end, its output going to `log`; Ctrl-C ends the command too."""
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command,
                                   env=env,
                                   cwd=cwd,
                                   stdin=subprocess.DEVNULL,
                                   stdout=output,
                                   stderr=subprocess.STDOUT,
                                   start_new_session=True)
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            # The zombie keeps its counters, and those of the children it waited for, until it is reaped.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - begin
            counters = _fields(f"/proc/{process.pid}/io")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            sampler.stop()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    return Measurement(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        exit_code=process.returncode,
        largest_rss=max(usage.ru_maxrss * 1024, sampler.largest),
        tree_rss=sampler.peak,
        tree_anon=sampler.anon,
        tree_file=sampler.file,
        disk_read=counters.get("read_bytes", usage.ru_inblock * 512),
        disk_written=counters.get("write_bytes", usage.ru_oublock * 512) - counters.get("cancelled_write_bytes", 0),
        read_calls=counters.get("rchar", 0),
        write_calls=counters.get("wchar", 0),
        tail=_tail(log),
    )


@dataclass
class _Sampler:
    """A thread that keeps the largest sum of resident memory seen over a process and its descendants, in bytes."""
    pid: int
    peak: int = 0
    anon: int = 0
    file: int = 0
    largest: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.is_set():
            self._look()
            self.done.wait(INTERVAL)

    def _look(self) -> None:
        anon = file = 0
        for pid in _tree(self.pid):
            fields = _fields(f"/proc/{pid}/status")
            anon += 1024 * (fields.get("RssAnon", 0) + fields.get("RssShmem", 0))
            file += 1024 * fields.get("RssFile", 0)
            self.largest = max(self.largest, 1024 * fields.get("VmHWM", 0))
        if anon + file > self.peak:
            self.peak, self.anon, self.file = anon + file, anon, file


def _tree(root: int) -> list[int]:
    """`root` and its living descendants; a process may start its children from any of its threads."""
    found = [root]
    for pid in found:
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        except OSError:  # it ended meanwhile
            continue
    return found


def _fields(path: str) -> dict[str, int]:
    """The `name: number …` lines of a /proc file; empty when the process has ended."""
    fields = {}
    try:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            number = value.split()[:1]
            if number and number[0].isdigit():
                fields[name] = int(number[0])
    except OSError:
        pass
    return fields


def _tail(log: Path, lines: int = 3, characters: int = 400) -> str:
    text = log.read_bytes()[-4096:].decode(errors="replace")
    kept = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return " | ".join(kept[-lines:])[-characters:]
