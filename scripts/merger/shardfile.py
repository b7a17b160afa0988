"""Read one rank's `.pt` file: which tensors it holds, and the byte range of each.

Since torch 1.6 `torch.save` writes a zip archive of stored (never compressed) records: `NAME/data.pkl`, and
`NAME/data/KEY` for each storage (torch/csrc/../caffe2/serialize/inline_container.cc).
"""
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merger import MergeError, pickles
from merger.dtypes import itemsize
from merger.foreign.archives import Record, check_version, read_directory
from merger.foreign.files import Seen, lfs_pointer
from merger.foreign.limits import allow

PICKLE = "data.pkl"
NAMED, ALIGNED = ".data/serialization_id", ".storage_alignment"
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z"}
MAX_PICKLE = 1 << 28  # a hundred thousand tensors and more
CRC_CHUNK = 1 << 22
MOST_RANKS = 1 << 20


@dataclass
class ShardFile:
    """One rank's file.

    Attributes:
        path: the file.
        size: its bytes.
        content: what the pickle holds, with the stand-ins of `pickles` for torch's classes; None where it was not read.
        records: the storages' records by key.
        seen: what the file was when it was first looked at.
    """
    path: Path
    size: int
    content: Any
    records: Mapping[str, Record]
    seen: Seen = field(default_factory=Seen)

    def byte_offset(self, tensor: pickles.TensorRef) -> int:
        """Return where the first byte of `tensor` lies in the file.

        Raises:
            MergeError: the tensor reaches beyond its storage, or its elements are not contiguous.
        """
        if not is_contiguous(tensor.shape, tensor.stride):
            raise MergeError(
                f"{self.path}: a tensor of shape {tensor.shape} has strides {tensor.stride}, and only contiguous "
                "tensors are read; save it with .contiguous()")
        self._check_reach(tensor, int(np.prod(tensor.shape, dtype=object)))
        return self._first_byte(tensor)

    def _first_byte(self, tensor: pickles.TensorRef) -> int:
        return self.records[tensor.storage.key].offset + tensor.offset * itemsize(tensor.dtype)

    def _check_reach(self, tensor: pickles.TensorRef, run: int) -> None:
        """Raise a `MergeError` unless the `run` elements of the storage from the tensor's first on are there."""
        record = self.records.get(tensor.storage.key)
        if record is None:
            raise MergeError(f"{self.path}: storage {tensor.storage.key} is missing from the archive")
        if tensor.storage.dtype is not None and tensor.storage.numel * itemsize(tensor.storage.dtype) != record.size:
            raise MergeError(f"{self.path}: storage {tensor.storage.key} should have {tensor.storage.numel} elements "
                             f"of {tensor.storage.dtype}, but its record has {record.size} bytes")
        if (tensor.offset + run) * itemsize(tensor.dtype) > record.size:
            raise MergeError(f"{self.path}: a tensor of shape {tensor.shape} reaches beyond the end of storage "
                             f"{tensor.storage.key}")

    def checksum(self, tensor: pickles.TensorRef) -> int:
        """Return the CRC32 of the tensor's bytes as the archive names it; 0 where it names none of just these bytes.

        `torch.serialization.set_crc32_options(False)` makes torch write 0.
        """
        record = self.records[tensor.storage.key]
        size = int(np.prod(tensor.shape, dtype=object)) * itemsize(tensor.dtype)
        return record.crc if size == record.size else 0

    def read_integers(self, tensor: pickles.TensorRef) -> np.ndarray:
        """Return a small integer tensor's values, of shape `tensor.shape`.

        Any strides will do: up to torch 2.9 a sub-mesh's ranks are a view of the whole mesh's.
        """
        count = int(np.prod(tensor.shape, dtype=object))
        run = 1 + sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride, strict=True))
        if tensor.dtype not in ("int32", "int64") or not 0 < count <= MOST_RANKS or run > MOST_RANKS:
            raise MergeError(
                f"{self.path}: a device mesh of {tensor.dtype}, shape {tensor.shape} and strides {tensor.stride} "
                "is not a mesh; copy the file again")
        self._check_reach(tensor, run)
        size = itemsize(tensor.dtype)
        with self.seen.descriptor(self.path) as fd:
            ranks = np.frombuffer(os.pread(fd, run * size, self._first_byte(tensor)), dtype=tensor.dtype)
        return np.lib.stride_tricks.as_strided(ranks, tensor.shape, [step * size for step in tensor.stride]).copy()


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return True if a view of `shape` and `stride` (elements) lies in one run, in row-major order."""
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent == 0:
            return True
        if extent != 1:
            if step != expected:
                return False
            expected *= extent
    return True


def read_shard_file(path: Path,
                    load: Callable[[bytes], Any] | None = pickles.load,
                    seen: Seen | None = None) -> ShardFile:
    """Read the directory of a `.pt` file and, with `load`, its pickle; its tensors stay on disk.

    A pickle is to be read where `foreign.limits` hold.

    Raises:
        MergeError: the file is no such archive, is truncated or damaged, or its pickle is not on the allow-list.
    """
    seen = seen or Seen()
    try:
        with seen.descriptor(path) as fd:
            size = os.fstat(fd).st_size
            if kind := _told_apart(os.pread(fd, 64, 0)):
                raise MergeError(f"{path}: {kind}")
            try:
                return read_archive(path, fd, size, load, seen)
            except struct.error as error:
                raise MergeError(
                    f"{path}: not a whole .pt archive, truncated or damaged ({error}); it has {size} bytes; "
                    "copy it again") from error
            except MergeError as error:
                raise MergeError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror or error}") from error


def _told_apart(head: bytes) -> str:
    """Return what a file is that begins with `head` and is no archive, and the remedy; empty where it may be one."""
    if pointer := lfs_pointer(head):
        return pointer
    for magic, name in PACKED.items():
        if head.startswith(magic):
            return f"is packed ({name}), which torch.save never does; unpack it"
    return ""


def read_archive(path: Path,
                 fd: int,
                 size: int,
                 load: Callable[[bytes], Any] | None,
                 seen: Seen,
                 base: int = 0) -> ShardFile:
    """Read an archive of `size` bytes that begins at byte `base` of the open file `fd`; see `read_shard_file`.

    Raises:
        MergeError: see `read_shard_file`.
        struct.error: it ends in the middle of its directory.
    """
    try:
        records = read_directory(fd, size, base)
    except MergeError as error:
        raise MergeError(f"not a whole .pt archive, truncated or damaged ({error}); it has {size} bytes; copy it "
                         "again") from error
    if PICKLE not in records:
        raise MergeError("no data.pkl inside; not a file that torch.save wrote")
    if "constants.pkl" in records:
        raise MergeError("it is a TorchScript archive, not a state dict; save the state dict with torch.save")
    if "byteorder" in records and _content(fd, records["byteorder"]) != b"little":
        raise MergeError("it was written on a big-endian machine, which is not supported")
    if NAMED in records and not _is_text(_content(fd, records[NAMED])):
        raise MergeError(f"not a whole .pt archive, truncated or damaged ({NAMED} is no text); copy it again")
    if ALIGNED in records and not _content(fd, records[ALIGNED]).isdigit():
        raise MergeError(f"not a whole .pt archive, truncated or damaged ({ALIGNED} is no number); copy it again")
    if records[PICKLE].size > MAX_PICKLE:
        raise MergeError(f"its pickle has {records[PICKLE].size} bytes, more than any checkpoint's")
    version = next((records[name] for name in ("version", ".data/version") if name in records), None)
    check_version(_content(fd, version) if version else None)
    content = None
    if load:
        allow(records[PICKLE].size)
        data = os.pread(fd, records[PICKLE].size, records[PICKLE].offset)
        if len(data) != records[PICKLE].size or (records[PICKLE].crc and zlib.crc32(data) != records[PICKLE].crc):
            raise MergeError("not a whole .pt archive, truncated or damaged (Bad CRC-32 of data.pkl); copy it again")
        content = load(data)
    storages = {name.removeprefix("data/"): record for name, record in records.items() if name.startswith("data/")}
    return ShardFile(path, size, content, storages, seen)


def _is_text(data: bytes) -> bool:
    """Return True if `data` is the text that torch takes it for."""
    try:
        return data.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _content(fd: int, record: Record) -> bytes:
    """Return the first bytes of a small record."""
    return os.pread(fd, min(record.size, 64), record.offset)


def damaged_records(path: Path, records: Mapping[str, Record], seen: Seen, progress: Callable[[int],
                                                                                              None]) -> Iterator[str]:
    """Yield the keys of those records of a file whose bytes do not have the CRC32 that its archive names, if it does.

    What `progress` raises, after each `CRC_CHUNK` bytes at the latest, ends it.
    """
    with seen.descriptor(path) as fd:
        for key, record in records.items():
            crc = 0
            for start in range(0, record.size, CRC_CHUNK):
                chunk = os.pread(fd, min(CRC_CHUNK, record.size - start), record.offset + start)
                crc = zlib.crc32(chunk, crc)
                progress(len(chunk))
            if record.crc and crc != record.crc:
                yield key
