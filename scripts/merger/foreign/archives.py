"""The directory of a zip archive that `torch.save` wrote, read no more leniently than torch reads it.

torch finds a record by its first name that fits, in the first folder of the archive, whatever its case; an archive in
which that is not the only one is refused here, and so is one whose parts contradict each other (APPNOTE.TXT of PKWARE,
4.3; caffe2/serialize/inline_container.cc).
"""
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from merger import MergeError
from merger.foreign.text import printable

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # the value stands in the zip64 fields
DESCRIPTOR = 8  # a flag with which the local header leaves sizes and CRC open
FOLDER = 0x10  # among a record's external attributes
PLAIN_FLAGS = DESCRIPTOR | 0x0800 | 6  # a name in UTF-8, and how hard a compressor tried; the others change the bytes
MAX_DIRECTORY = 1 << 28  # bytes; a million records
# What torch 2.13 reads (caffe2/serialize/versions.h); what comes later may mean something else.
VERSIONS = range(1, 11)


@dataclass(frozen=True)
class Record:
    """A stored record of the archive: its place in the file, in bytes, and the CRC32 that the archive names, or 0."""
    offset: int
    size: int
    crc: int


class _Entry(NamedTuple):
    name: str
    flags: int
    crc: int
    size: int
    header: int


def read_directory(fd: int, size: int, base: int = 0) -> dict[str, Record]:
    """Return the records of an archive of `size` bytes by their names below its one folder.

    Args:
        base: the byte of the file at which the archive begins; the records' places are those in the file.

    Raises:
        MergeError: it is none that `torch.save` writes, or is not whole.
        struct.error: it ends in the middle of its directory.
    """
    start, length, count = _find(fd, size, base)
    entries = _entries(_bytes(fd, base + start, length), count)
    roots = {entry.name.partition("/")[0] for entry in entries}
    if len(roots) > 1 or any("/" not in entry.name for entry in entries):
        raise MergeError(
            f"its records lie in {len(roots)} folders ({', '.join(sorted(roots)[:2])}), where torch writes one")
    names: set[str] = set()
    records: dict[str, Record] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        name = entry.name.partition("/")[2]
        if name.lower() in names:
            raise MergeError(f"record {name} is there twice")
        names.add(name.lower())
        if entry.header < end:
            raise MergeError(f"record {name} overlaps another")
        record = _locate(fd, size, base, entry)
        end = record.offset + record.size - base
        records[name] = record
    if entries and min(entry.header for entry in entries) > 0:
        raise MergeError("something stands before its first record")
    if end > start:
        raise MergeError("a record reaches into the archive's directory")
    return records


def _bytes(fd: int, offset: int, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def _find(fd: int, size: int, base: int) -> tuple[int, int, int]:
    """Return the directory's first byte, its bytes, and how many records it has."""
    place = size - END.size
    if place < 0:
        raise MergeError("too short for an archive")
    signature, disk, disk2, here, count, length, start, comment = END.unpack(_bytes(fd, base + place, END.size))
    if signature != b"PK\x05\x06" or comment:
        raise MergeError("no archive's directory at its end")
    if place >= LOCATOR64.size:
        mark, disk64, start64, disks = LOCATOR64.unpack(_bytes(fd, base + place - LOCATOR64.size, LOCATOR64.size))
        if mark == b"PK\x06\x07":
            place -= LOCATOR64.size
            fields = END64.unpack(_bytes(fd, base + start64, END64.size))
            plain = ((disk, fields[4]), (disk2, fields[5]), (here, fields[6]), (count, fields[7]), (length, fields[8]),
                     (start, fields[9]))
            if fields[0] != b"PK\x06\x06" or disk64 or disks > 1 or start64 + fields[1] + 12 != place or any(
                    short not in (full, FULL16, FULL32) for short, full in plain):
                raise MergeError("its two directories' ends contradict each other")
            place = start64
            _, _, _, _, disk, disk2, here, count, length, start = fields
    if disk or disk2 or here != count or start + length != place or length > MAX_DIRECTORY:
        raise MergeError("its directory is not where its end says")
    return start, length, count


def _entries(data: bytes, count: int) -> list[_Entry]:
    entries, at = [], 0
    while at < len(data):
        (signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, disk, _,
         marks, header) = CENTRAL.unpack_from(data, at)
        if signature != b"PK\x01\x02":
            raise MergeError("its directory is damaged")
        at += CENTRAL.size
        raw, extra = data[at:at + name_length], data[at + name_length:at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if not raw.isascii() or at > len(data):
            raise MergeError("its directory is damaged")
        name = printable(raw.decode("ascii"))
        size, packed, header, disk = _wide(extra, size, packed, header, disk)
        if method or packed != size:
            raise MergeError(f"record {name} is compressed, which torch.save never does")
        if flags & ~PLAIN_FLAGS or disk:
            raise MergeError(f"record {name} is encrypted, patched or on another disk")
        if marks & FOLDER:  # of which torch reads whatever lay in its memory
            raise MergeError(f"record {name} is marked as a folder, which torch.save never does")
        entries.append(_Entry(name, flags, crc, size, header))
    if len(entries) != count:
        raise MergeError(f"its directory has {len(entries)} records, its end says {count}")
    return entries


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """Return `values` (size, packed size, place, disk) with those that stand in the zip64 field of `extra`."""
    wide, at = list(values), 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        field, at = extra[at + 4:at + 4 + length], at + 4 + length
        if kind == 1:
            for index, full in enumerate((FULL32, FULL32, FULL32, FULL16)):
                if values[index] == full:
                    width = 4 if index == 3 else 8
                    wide[index] = int.from_bytes(field[:width], "little")
                    if len(field) < width:
                        raise MergeError("its directory is damaged")
                    field = field[width:]
            break
    return tuple(wide)


def _locate(fd: int, size: int, base: int, entry: _Entry) -> Record:
    """Return where a record's bytes are, if its own header says of it what the directory says."""
    raw = entry.name.encode()
    header = _bytes(fd, base + entry.header, LOCAL.size + len(raw))
    signature, _, flags, method, _, _, crc, packed, full, name_length, extra_length = LOCAL.unpack_from(header)
    open_ended = (0, FULL32) if flags & DESCRIPTOR else (FULL32, )
    same = all(here == there or here in open_ended
               for here, there in ((packed, entry.size), (full, entry.size), (crc, entry.crc)))
    if signature != b"PK\x03\x04":
        raise MergeError(f"record {entry.name} is not where the archive's directory says")
    if name_length != len(raw) or header[LOCAL.size:] != raw or method or flags & ~PLAIN_FLAGS or not same:
        raise MergeError(f"record {entry.name} contradicts the archive's directory")
    offset = entry.header + LOCAL.size + name_length + extra_length
    if offset + entry.size > size:
        raise MergeError(f"record {entry.name} ends at byte {offset + entry.size}, the file at {size}; it is truncated")
    return Record(base + offset, entry.size, entry.crc)


def check_version(data: bytes | None) -> None:
    """Refuse an archive of no version of the format, or of a later one, as torch does.

    Raises:
        MergeError: naming it.
    """
    text = (data or b"").strip()
    if data is None or not text.isdigit() or len(text) > 8 or int(text) not in VERSIONS:
        raise MergeError(
            f"its format's version is {printable(ascii(text.decode('latin1')), 20) if text else 'missing'}; "
            f"{VERSIONS[0]} to {VERSIONS[-1]} are read")
