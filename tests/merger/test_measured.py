"""--device auto: both ways are tried where a GPU is, by stand-ins for the converters; no GPU is needed, and none measured."""
from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from merger import gpu
from merger.measured import COUNTED, LARGE, Choice, remembered

BLOCK: Any = SimpleNamespace()


class StandIn:
    """Converts in `seconds`, and counts; or fails."""

    def __init__(self, seconds: float, fault: str = "") -> None:
        self.seconds, self.fault, self.blocks = seconds, fault, 0

    def __call__(self, sources: Any) -> StandIn:
        return self

    def convert(self, block: Any) -> Any:
        if self.fault:
            raise RuntimeError(self.fault)
        self.blocks += 1
        time.sleep(self.seconds)
        return np.zeros(1), LARGE, (0, 0)


@pytest.mark.parametrize(("cpu", "cuda", "chosen"), [(0.001, 0.02, "cpu"), (0.02, 0.001, "cuda:0")])
def test_the_faster_is_taken_said_and_remembered(cpu: float, cuda: float, chosen: str, tmp_path: Path) -> None:
    memory, host, device = tmp_path / "cache/device.json", StandIn(cpu), StandIn(cuda)
    choice = Choice("cuda:0", host, device, memory)
    converter = choice.converter(SimpleNamespace())  # type: ignore[arg-type]
    while not choice.chosen:
        converter.convert(BLOCK)
    assert choice.chosen == chosen and f"takes {chosen}" in choice.reason and "remembered" in choice.reason
    assert min(host.blocks, device.blocks) > COUNTED  # the first of each is not counted
    before = (host.blocks, device.blocks)
    for _ in range(3):
        converter.convert(BLOCK)
    assert (host.blocks - before[0], device.blocks - before[1]) == ((3, 0) if chosen == "cpu" else (0, 3))
    assert remembered("cuda:0", memory) == chosen
    assert remembered("cuda:1", memory) == ""  # of another device nothing is known
    memory.write_text("{")
    assert remembered("cuda:0", memory) == ""


def test_a_device_that_fails_is_left_and_not_remembered(tmp_path: Path) -> None:
    memory, host = tmp_path / "device.json", StandIn(0)
    choice = Choice("cuda:0", host, StandIn(0, "CUDA out of memory"), memory)
    converter = choice.converter(SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(4):
        assert converter.convert(BLOCK)[1] == LARGE
    assert choice.chosen == "cpu" and "out of memory" in choice.reason and not memory.exists()


def test_small_blocks_tell_nothing(tmp_path: Path) -> None:

    class Small(StandIn):

        def convert(self, block: Any) -> Any:
            return (*super().convert(block)[:1], LARGE - 1, (0, 0))

    choice = Choice("cuda:0", Small(0), Small(0), tmp_path / "device.json")
    converter = choice.converter(SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(4 * COUNTED):
        converter.convert(BLOCK)
    assert choice.chosen == ""


@pytest.mark.parametrize(("devices", "known", "found"), [(0, "", "cpu"), (1, "", "auto"), (1, "cpu", "cpu"),
                                                         (1, "cuda:0", "cuda:0")])
def test_auto_is_the_cpu_without_a_gpu_and_what_is_known_with_one(devices: int, known: str, found: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cuda_devices", lambda: devices)
    monkeypatch.setattr(gpu, "remembered", lambda *_: known)
    assert gpu.check_device("auto") == found
    assert gpu.check_device("cpu") == "cpu"
