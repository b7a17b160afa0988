"""HTTP with one time limit for a whole exchange, whatever the other side does: urllib's own begins anew with every byte.

    opener(urllib.request.ProxyHandler({})).open(url, timeout=5)

`timeout` is the seconds from the connection to the last byte that is read, headers included; none is a minute. Connecting may take
so long once for each address that a name has.
"""
# servers/ and training/, which never import each other, have this file alike; a test compares them.
import http.client
import io
import time
import urllib.request
from typing import Any

SECONDS = 60.0  # of an exchange that names none


class Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: what is meant for a server goes to that server, and only its answer speaks for it."""

    def redirect_request(self, *_: Any) -> None:
        """Return None, so that the redirect is an error like any other status."""


class _Reader(io.RawIOBase):
    """What a connection still says before its end."""

    def __init__(self, connection: Any, end: float) -> None:
        super().__init__()
        self.connection, self.end = connection, end
        self.file = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> Any:
        """Read what comes next into `buffer`; return how many bytes.

        Raises:
            TimeoutError: the time is over.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.connection.settimeout(left)
        return self.file.readinto(buffer)

    def close(self) -> None:
        """Let go of the connection."""
        self.file.close()
        super().close()


class Response(http.client.HTTPResponse):
    """An answer that is read within its connection's time, or as long as `allow` says from then on."""

    def __init__(self, sock: Any, *args: Any, end: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self._reader = _Reader(sock, end)
        self.fp = io.BufferedReader(self._reader)

    def allow(self, seconds: float) -> None:
        """Let what follows take `seconds` from now."""
        self._reader.end = time.monotonic() + seconds


class _Timed(http.client.HTTPConnection):

    def __init__(self, *args: Any, **options: Any) -> None:
        if not isinstance(options.get("timeout"), (int, float)):
            options["timeout"] = SECONDS
        super().__init__(*args, **options)
        self._end = time.monotonic() + options["timeout"]
        self.response_class = self._response  # type: ignore[assignment]

    def _response(self, sock: Any, *args: Any, **more: Any) -> Response:
        return Response(sock, *args, end=self._end, **more)


class _TimedTLS(_Timed, http.client.HTTPSConnection):
    pass


class _HTTP(urllib.request.HTTPHandler):

    def http_open(self, request: Any) -> Any:
        return self.do_open(_Timed, request)  # type: ignore[arg-type]


class _HTTPS(urllib.request.HTTPSHandler):

    def https_open(self, request: Any) -> Any:
        return self.do_open(_TimedTLS, request, context=self._context)  # type: ignore[arg-type,attr-defined]


def opener(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """Return an opener of timed exchanges, with urllib's own handlers beside `handlers`."""
    return urllib.request.build_opener(_HTTP(), _HTTPS(), *handlers)
