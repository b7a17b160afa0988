"""Which device converts blocks faster, by the first blocks of a merge, both ways; remembered for this host."""
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from merger.copying import Converter, Sources
from merger.files import atomic_write
from merger.foreign.documents import read_object
from merger.foreign.files import Seen
from merger.plan import Block
from merger.show import size_text

CPU = "cpu"
COUNTED = 6  # blocks that each way converts before one is chosen, beside a first one in each thread, which sets it up
LARGE = 1 << 20  # bytes of a block that tells something

Make = Callable[[Sources], Converter]


class Choice:
    """The choice between the CPU and `device`, made once for all threads of a merge.

    Attributes:
        chosen: the device, empty until it is known.
        reason: how it was found, in a line.
    """

    def __init__(self, device: str, host: Make, cuda: Make, memory: Path | None = None) -> None:
        self.device, self.host, self.cuda = device, host, cuda
        self.chosen = self.reason = ""
        self._memory = memory
        self._lock = threading.Lock()
        self._rates: dict[str, list[float]] = {CPU: [], device: []}
        self._turn = 0

    def converter(self, sources: Sources) -> Converter:
        """Return a converter for one thread."""
        return _Either(self, sources)

    def next(self) -> str:
        """Return who converts the next block."""
        with self._lock:
            self._turn += 1
            return self.chosen or (CPU, self.device)[self._turn % 2]

    def count(self, device: str, nbytes: int, seconds: float) -> None:
        """Note a block; choose where both ways have converted enough of them."""
        with self._lock:
            self._rates[device].append(nbytes / max(seconds, 1e-9))
            if self.chosen or min(map(len, self._rates.values())) < COUNTED:
                return
            rates = {name: statistics.median(found) for name, found in self._rates.items()}
            self.chosen = max(rates, key=lambda name: (rates[name], name == CPU))
            self.reason = (
                f"--device auto takes {self.chosen}: the first blocks went at {size_text(rates[CPU])}/s a thread by "
                f"the CPU and at {size_text(rates[self.device])}/s by {self.device}; remembered for this host")
            self._remember()

    def give_up(self, error: Exception) -> None:
        """Leave the device, which failed, for this merge; nothing is remembered."""
        with self._lock:
            self.chosen = CPU
            self.reason = f"--device auto takes cpu: {self.device} failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})"

    def _remember(self) -> None:
        if self._memory:
            with suppress(OSError):
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._memory, json.dumps({"host": host_key(self.device), "device": self.chosen}).encode())


class _Either:
    """One thread's converters of both kinds, each made when it is first needed."""

    def __init__(self, choice: Choice, sources: Sources) -> None:
        self._choice, self._sources = choice, sources
        self._made: dict[str, Converter] = {}

    def convert(self, block: Block) -> tuple[np.ndarray, int, tuple[int, int]]:
        """See `copying.Converter`."""
        device = self._choice.next()
        first, began = device not in self._made, time.perf_counter()
        if device == CPU:
            found = self._converter(CPU).convert(block)
        else:
            try:
                found = self._converter(device).convert(block)
            except RuntimeError as error:  # torch's, of a device without memory above all
                self._choice.give_up(error)
                return self._converter(CPU).convert(block)
        if not first and found[1] >= LARGE:
            self._choice.count(device, found[1], time.perf_counter() - began)
        return found

    def _converter(self, device: str) -> Converter:
        if device not in self._made:
            self._made[device] = (self._choice.host if device == CPU else self._choice.cuda)(self._sources)
        return self._made[device]


def memory_file() -> Path | None:
    """Return the file that remembers this host's choice; None where the user has no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "agentgym-rl-workbench" / "device.json"


def host_key(device: str) -> str:
    """Return what the choice depends on: the machine, its cores, the device and torch."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    return " ".join((platform.node(), str(os.cpu_count()), device, torch))


def remembered(device: str, memory: Path | None) -> str:
    """Return the device that was chosen on this host before, or empty."""
    with suppress(OSError, ValueError):
        found = read_object(memory, Seen()) if memory else {}
        if found.get("host") == host_key(device) and found.get("device") in (CPU, device):
            return str(found["device"])
    return ""
