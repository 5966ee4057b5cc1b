"""Running the application with uvicorn, on this machine and with a key unless told otherwise."""

import asyncio
import json
import logging
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from saddlepoint.errors import UsageError
from saddlepoint.service.errors import ApiError

HEAD_SECONDS = 10.0  # a request's head must have come within so many


class _Timed(H11Protocol):
    """Closes a connection on which the head of a request does not come; uvicorn itself would wait for it without end."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late:
            self._late.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to what is no HTTP, as an error of the protocol."""
        body = json.dumps(ApiError(400, msg, "invalid_http").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        waits = self.conn.their_state is h11.IDLE
        if waits and not self._late:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not waits and self._late:
            self._late.cancel()
            self._late = None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UsageError: The address cannot be had.
    """
    sock = None
    try:
        sock = socket.socket(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as wrong:
        if sock:
            sock.close()
        raise UsageError(f"cannot listen at {host}:{port}: {wrong.strerror or wrong}; give another --host or --port") from None
    return sock


def server(app: FastAPI) -> uvicorn.Server:
    """A server of the application; `run(sockets=[sock])` serves until it is told to stop."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, http=_Timed, ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    return uvicorn.Server(config)
