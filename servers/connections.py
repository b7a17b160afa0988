"""Connections on which no request comes: uvicorn waits for one, or for the rest of its headers, for ever."""
import asyncio
from typing import Any

SECONDS = 90.0  # longer than an idle connection is kept, and than a request's body may take


def patient(seconds: float = SECONDS) -> Any:
    """Return uvicorn's protocol, which ends a connection that brings no whole request's headers for so long, or twice that.

    h11 and not httptools, which uvicorn takes where it is installed: the latter keeps all headers that come, without a limit.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.served: Any = None  # the request that was answered, or is, when we last looked
            self.watch: asyncio.TimerHandle = self.loop.call_later(seconds, self.look)

        def connection_lost(self, exc: Any) -> None:
            self.watch.cancel()
            super().connection_lost(exc)

        def look(self) -> None:
            """End the connection where nothing was asked on it since the last look, and nothing is being answered."""
            if self.cycle is self.served and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()
                return
            self.served = self.cycle
            self.watch = self.loop.call_later(seconds, self.look)

    return Patient
