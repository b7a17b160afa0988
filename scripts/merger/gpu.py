"""Convert blocks on a CUDA device: pinned staging, assembly and cast on the GPU, one stream a copying thread.

While one thread's block is on the device another's is read from disk, so reads, copies and casts overlap.
"""
import os
from functools import partial
from typing import Any

import numpy as np

from merger import MergeError
from merger.copying import HostConverter, Sources
from merger.direct import PAGE, page_buffer
from merger.dtypes import CONVERTED, NUMPY, itemsize
from merger.measured import Choice, memory_file, remembered
from merger.plan import BLOCK_BYTES, Block

FIRST_GPU = "cuda:0"
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and Linux in Windows


def check_device(name: str) -> str:
    """Return the device that `--device` means; `auto` where a GPU is here and the first blocks are to decide.

    Raises:
        MergeError: it names no device, or one that is not here.
    """
    if name == "cpu" or (name == "auto" and not cuda_devices()):
        return "cpu"
    if name == "auto":
        return remembered(FIRST_GPU, memory_file()) or "auto"
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise MergeError(f"--device {name} is no device; choose auto, cpu, cuda or cuda:N")
    try:
        import torch
    except ImportError:
        raise MergeError(f"--device {name} needs torch; install it or pass --device cpu") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise MergeError(f"--device {name}: torch {torch.__version__} sees {count} CUDA devices here; "
                         "pass --device cpu")
    return f"cuda:{int(number or 0)}"


def cuda_devices() -> int:
    """Return how many CUDA devices torch sees; torch, whose import takes a second, is asked only where a driver is."""
    if not any(map(os.path.exists, DRIVERS)) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def choice() -> Choice:
    """Return the choice between the CPU and the first GPU, by a merge's first blocks."""
    return Choice(FIRST_GPU, HostConverter, partial(TorchConverter, device=FIRST_GPU), memory_file())


class TorchConverter:
    """Converts with torch on `device`; the bytes are those of `HostConverter`.

    Blocks with NaN or infinite elements (whose bits devices choose differently), fused weights (whose sums they order
    differently) and tied ones (compared, not only copied) are converted by the host.
    """

    def __init__(self, sources: Sources, device: str) -> None:
        import torch
        self._torch = torch
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self._host = HostConverter(sources)
        self.sources = sources
        self._grow(BLOCK_BYTES)

    def _grow(self, nbytes: int) -> None:
        self._buffer = page_buffer(nbytes)
        self._staged = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=self._cuda)
        self._result = self._torch.empty(nbytes + PAGE, dtype=self._torch.uint8, pin_memory=self._cuda)

    def convert(self, block: Block) -> tuple[np.ndarray, int, tuple[int, int]]:
        """See `copying.Converter`."""
        output = block.output
        if output.fusion or output.twins or not {output.dtype, output.source.dtype} <= CONVERTED:
            return self._host.convert(block)
        nbytes = block.numel * max(itemsize(output.source.dtype), itemsize(output.dtype))
        if nbytes > self._staged.numel():
            self._grow(nbytes)
        read, pieces = self._stage(block)
        if self._stream is None:
            finite = self._assemble(block, pieces)
        else:
            with self._torch.cuda.stream(self._stream):
                finite = self._assemble(block, pieces)
            self._stream.synchronize()
        if not bool(finite):
            values, again, counts = self._host.convert(block)
            return values, read + again, counts
        return self._target(block).numpy().view(NUMPY[output.dtype]), read, (0, 0)

    def _target(self, block: Block) -> Any:
        """Return the bytes of the result, at the place of a page that they have in the file."""
        return self._result[block.offset % PAGE:][:block.numel * itemsize(block.output.dtype)]

    def _stage(self, block: Block) -> tuple[int, list[tuple[int, int]]]:
        """Read the parts back to back into pinned memory; return bytes read and each part's (start, end) there."""
        staged, dtype, position = self._staged.numpy(), NUMPY[block.output.source.dtype], 0
        pieces = []
        for _, rows in self.sources.rows(block.parts, dtype, self._buffer):
            end = position + rows.nbytes
            staged[position:end] = rows.reshape(-1).view(np.uint8)
            pieces.append((position, end))
            position = end
        return position, pieces

    def _assemble(self, block: Block, pieces: list[tuple[int, int]]) -> Any:
        """Queue copy in, assembly, cast, count and copy out; return a tensor that says whether all is finite."""
        torch = self._torch
        source_type, target_type = (getattr(torch, block.output.source.dtype), getattr(torch, block.output.dtype))
        total = pieces[-1][1] if pieces else 0
        moved = self._staged[:total].to(self._device, non_blocking=True)
        whole = torch.empty(block.numel, dtype=source_type, device=self._device)
        for part, (start, end) in zip(block.parts, pieces, strict=True):
            values = moved[start:end].view(source_type)
            rows = (part.rows, part.width)
            whole.as_strided(rows, (part.pitch, 1), part.target).copy_(values.view(rows))
        cast = whole.to(target_type)
        finite = torch.isfinite(cast).all()
        self._target(block).copy_(cast.view(torch.uint8), non_blocking=True)
        return finite
