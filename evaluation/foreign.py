"""What others wrote: the one gate that files, JSON and the bodies of HTTP answers pass before they are used.

JSON that is refused: deeper than DEPTH, a key that comes twice, NaN and infinite numbers, integers of more digits than
DIGITS, more values than VALUES. A lone surrogate (`"\\ud83d"`), which no UTF-8 and so no request and no file can
hold, becomes U+FFFD.
"""
import errno
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MEGABYTE = 1 << 20
LARGEST_FILE = 256 * MEGABYTE  # of configurations and lists
LARGEST_BODY = 64 * MEGABYTE
DEPTH = 100
DIGITS = 400  # of an integer; Python's own limit is ten times that
VALUES = 2_000_000  # in one document, by its marks; a value of three bytes may take 200 in memory
LONE = re.compile("[\ud800-\udfff]")  # json joins pairs, so what is left of them is alone


class TooLarge(ValueError):
    """A file or a body has more bytes than its limit."""


def replaced(value: Any) -> Any:
    """Return `value`, of JSON, with U+FFFD for each lone surrogate in its texts."""
    if isinstance(value, str):
        return LONE.sub("\ufffd", value)
    if isinstance(value, list):
        return [replaced(one) for one in value]
    if isinstance(value, dict):
        return {replaced(key): replaced(one) for key, one in value.items()}
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} comes twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _check_depth(value: Any, depth: int) -> None:
    level = [value]
    for _ in range(depth + 1):
        level = [one for one in level if isinstance(one, list | dict)]
        if not level:
            return
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"it is nested deeper than {depth} levels")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_int=_integer, parse_constant=_no_number)


def loads(data: bytes | str, depth: int = DEPTH) -> Any:
    """Return the JSON value in `data`.

    Raises:
        ValueError: it is no JSON, or JSON that is refused.
    """
    text = data if isinstance(data, str) else data.decode("utf-8-sig", "surrogatepass")
    if len(text) > VALUES and sum(map(text.count, "[{,:")) > VALUES:
        raise ValueError(f"it has more than {VALUES} values")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {depth} levels") from None
    except json.JSONDecodeError as error:  # its line and column are of no use in a text of one line
        raise ValueError(f"{error.msg} at character {error.pos}") from None
    if text.count("[") + text.count("{") > depth:  # else it cannot be that deep
        _check_depth(value, depth)
    return replaced(value) if "\\ud" in text or "\\uD" in text or LONE.search(text) else value


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file.

    To write it, it must lie there itself: through a link, whoever handed the folder on would have us write elsewhere.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file: a FIFO would hang, a device never end.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    try:
        number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if writes else 0), 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO or (writes
                                          and error.errno == errno.ELOOP):  # a FIFO without a reader, a socket; a link
            raise ValueError("it is no regular file" if error.errno == errno.ENXIO else "it is a link") from None
        raise
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise ValueError("it is no regular file")
    return number


def lines(file: BinaryIO, limit: int = LARGEST_FILE) -> Iterator[bytes]:
    """Go over a file's lines, each with its end; a torn last one has none.

    Raises:
        TooLarge: a line has more than `limit` bytes.
    """
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise TooLarge(f"it has a line of more than {limit // MEGABYTE} MB")
        yield line


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Return what a file holds.

    Raises:
        OSError, ValueError: see `open_file`.
        TooLarge: it has more than `limit` bytes.
    """
    with open(open_file(path), "rb") as file:
        pieces, size = [], 0
        while size <= limit and (piece := file.read(min(limit + 1 - size, 16 * MEGABYTE))):
            pieces.append(piece)
            size += len(piece)
    if size > limit:
        raise TooLarge(f"it has more than {limit // MEGABYTE} MB")
    return b"".join(pieces)


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """Return a file's text, which is UTF-8 whatever the locale.

    Raises:
        OSError, ValueError: see `read_bytes`; UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(path: Path, limit: int = LARGEST_FILE) -> Any:
    """Return the JSON value in a file.

    Raises:
        OSError, ValueError: see `read_bytes` and `loads`.
    """
    return loads(read_bytes(path, limit))


class Body:
    """A body that arrives in pieces, unpacked and counted as it does.

    Args:
        encoding: its Content-Encoding.
        limit: bytes that it may have, unpacked.

    Raises:
        ValueError: it is packed in a way that was not asked for.
    """

    def __init__(self, encoding: str, limit: int) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ValueError(f"it is packed by {encoding[:40]!r}, which was not asked for")
        self._zlib = None if encoding in ("", "identity") else zlib.decompressobj(47)
        self._head = b"" if encoding == "deflate" else None  # which some send without zlib's header of two bytes
        self._pieces: list[bytes] = []
        self._size, self._packed, self.limit = 0, 0, limit

    def feed(self, piece: bytes) -> None:
        """Take the next piece.

        Raises:
            TooLarge: it is too large.
            ValueError: it cannot be unpacked.
        """
        if self._zlib is None:
            self._add(piece)
            return
        self._packed += len(piece)
        if self._packed > self.limit + self.limit // 1000 + 1024:  # what cannot be packed is a little longer
            self._refuse()
        if self._zlib.eof:  # what follows is no part of it, and zlib would keep it
            return
        if self._head is not None:
            piece = self._head + piece
            self._head = piece if len(piece) < 2 else None
            if self._head is not None:
                return
            if piece[0] & 0x0f != 8 or int.from_bytes(piece[:2], "big") % 31:
                self._zlib = zlib.decompressobj(-15)
        try:
            self._add(self._zlib.decompress(piece, self.limit - self._size + 1))
            while self._zlib.unconsumed_tail:
                self._add(self._zlib.decompress(self._zlib.unconsumed_tail, self.limit - self._size + 1))
        except zlib.error as error:
            raise ValueError(f"it cannot be unpacked: {error}") from None

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self.limit:
            self._refuse()
        self._pieces.append(piece)

    def _refuse(self) -> NoReturn:
        self._pieces.clear()
        size = f"{self.limit // MEGABYTE} MB" if self.limit >= MEGABYTE else f"{self.limit} bytes"
        raise TooLarge(f"the answer has more than {size}")

    def whole(self) -> bytes:
        """Return the body.

        Raises:
            ValueError: it ended too early.
        """
        if self._zlib is not None and not self._zlib.eof and (self._size or self._head):
            raise ValueError("it cannot be unpacked: it ends too early")
        return b"".join(self._pieces)


def events(text: str) -> Iterator[tuple[str, str]]:
    """Return the name, empty where it has none, and data of each server-sent event in `text` (WHATWG HTML, 9.2.6)."""
    lines: list[str] = []
    name = ""
    for line in [*re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), ""]:
        field, _, value = line.partition(":")
        if field == "data":
            lines.append(value.removeprefix(" "))
        elif field == "event":
            name = value.strip()
        elif not line:
            if lines:
                yield name, "\n".join(lines)
            lines, name = [], ""
