"""Read one rank's `.pt` file: which tensors it holds, and the byte range of each.

Since torch 1.6 `torch.save` writes a zip archive of stored (never compressed) records: `NAME/data.pkl`, and
`NAME/data/KEY` for each storage (torch/csrc/../caffe2/serialize/inline_container.cc).
"""
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merger import MergeError, pickles
from merger.dtypes import itemsize

MAX_PICKLE = 1 << 30  # a million tensors
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # APPNOTE.TXT of PKWARE, 4.3.7
CRC_CHUNK = 1 << 22
MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Record:
    """A stored record of the archive: its place in the file, in bytes, and the CRC32 that the archive names, or 0."""
    offset: int
    size: int
    crc: int


@dataclass
class ShardFile:
    """One rank's file.

    Attributes:
        path: the file.
        size: its bytes.
        content: what the pickle holds, with the stand-ins of `pickles` for torch's classes; None where it was not read.
        records: the storages' records by key.
    """
    path: Path
    size: int
    content: Any
    records: Mapping[str, Record]

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
        with open(self.path, "rb") as file:
            file.seek(self._first_byte(tensor))
            ranks = np.frombuffer(file.read(run * size), dtype=tensor.dtype)
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


def read_shard_file(path: Path, pickled: bool = True) -> ShardFile:
    """Read the directory and, where `pickled`, the pickle of a `.pt` file; its tensors stay on disk.

    Raises:
        MergeError: the file is no such archive, is truncated or damaged, or its pickle is not on the allow-list.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise MergeError(f"{path}: is no file; put the rank's there")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                with zipfile.ZipFile(file) as archive:
                    return _read_archive(path, file.fileno(), size, archive, pickled)
            except MergeError as error:
                raise MergeError(f"{path}: {error}") from error
            except (zipfile.BadZipFile, EOFError, struct.error, UnicodeDecodeError, NotImplementedError, ValueError,
                    RuntimeError, zlib.error, OverflowError, IndexError, KeyError) as error:
                raise MergeError(f"{path}: not a whole .pt archive, truncated or damaged ({error}); "
                                 f"it has {size} bytes; copy it again") from error
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror or error}") from error


def _read_archive(path: Path, fd: int, size: int, archive: zipfile.ZipFile, pickled: bool) -> ShardFile:
    infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in infos:
        raise MergeError("no data.pkl inside; not a file that torch.save wrote")
    for info in infos.values():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise MergeError(f"record {info.filename} is compressed, which torch.save never does")
        if info.CRC == 0:  # torch.serialization.set_crc32_options(False)
            info.CRC = None  # type: ignore[assignment]  # so zipfile compares none
    if "byteorder" in infos and archive.read(infos["byteorder"]) != b"little":
        raise MergeError("it was written on a big-endian machine, which is not supported")
    if infos["data.pkl"].file_size > MAX_PICKLE:
        raise MergeError(f"its pickle has {infos['data.pkl'].file_size} bytes, more than any checkpoint's")
    content = pickles.load(archive.read(infos["data.pkl"])) if pickled else None
    records = {}
    for name, info in infos.items():
        folder, _, key = name.partition("/")
        if folder == "data" and key:
            records[key] = _locate(fd, size, info)
    return ShardFile(path, size, content, records)


def _locate(fd: int, size: int, info: zipfile.ZipInfo) -> Record:
    header = os.pread(fd, LOCAL_HEADER.size, info.header_offset)
    signature, *_fields, name_length, extra_length = LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise MergeError(f"record {info.filename} is not where the archive's directory says")
    offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if offset + info.file_size > size:
        raise MergeError(f"record {info.filename} ends at byte {offset + info.file_size}, the file at {size}; "
                         "it is truncated")
    return Record(offset, info.file_size, info.CRC or 0)


def damaged_records(shard: ShardFile, progress: Callable[[int], None]) -> Iterator[str]:
    """Yield the keys of those records whose bytes do not have the CRC32 that the archive names, if it does.

    What `progress` raises, after each `CRC_CHUNK` bytes at the latest, ends it.
    """
    with open(shard.path, "rb", buffering=0) as file:
        for key, record in shard.records.items():
            crc = 0
            for start in range(0, record.size, CRC_CHUNK):
                chunk = os.pread(file.fileno(), min(CRC_CHUNK, record.size - start), record.offset + start)
                crc = zlib.crc32(chunk, crc)
                progress(len(chunk))
            if record.crc and crc != record.crc:
                yield key
