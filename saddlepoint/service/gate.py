"""What every request passes first: an id, a key, a rate, and limits on how much may be sent and how slowly."""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saddlepoint.errors import UsageError
from saddlepoint.service.errors import ApiError
from saddlepoint.service.meters import Meters

OPEN = frozenset({"/health"})  # needs no key
UPLOADS = re.compile(r"/v1/(files|uploads/[^/]+/parts)")  # bodies that are passed on as they come
FRAME = 1 << 16  # bytes around a file that is uploaded
LINGER = 5.0  # seconds in which the rest of a body that nobody wants may still come, and is not kept
PACE = 1 << 16  # bytes a second that an upload has to keep up, once `upload_seconds` are over
LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]", "testserver"})


@dataclass(frozen=True)
class Keys:
    """Who may ask. Keys are kept as hashes only.

    Args:
        hashes: (name, SHA-256 of the key).
    """

    hashes: tuple[tuple[str, bytes], ...]

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> "Keys":
        """Keys by their names."""
        return cls(tuple((name, sha256(key.encode()).digest()) for name, key in keys.items()))

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """Keys of a file with a line `NAME:KEY` for each; empty lines and such as begin with # are left out.

        Raises:
            UsageError: The file cannot be read, or a line has another form.
        """
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as wrong:
            raise UsageError(f"{file} cannot be read: {wrong}; write a line NAME:KEY for each key") from None
        keys: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, colon, key = (part.strip() for part in line.partition(":"))
            if not colon or not name or len(key) < 16 or not key.isascii() or name in keys:
                raise UsageError(f"{file}, line {number}: write NAME:KEY, each name once, the key of at least 16 ASCII characters")
            keys[name] = key
        if not keys:
            raise UsageError(f"{file} holds no key; write a line NAME:KEY, or serve without keys: --no-key")
        return cls.of(keys)

    def who(self, authorization: str) -> str | None:
        """The name of the key in a header `Bearer KEY`; every key is compared, in constant time."""
        scheme, _, key = authorization.partition(" ")
        given = sha256(key.strip().encode("latin-1", "replace")).digest()
        found = [name for name, known in self.hashes if hmac.compare_digest(known, given)]
        return found[0] if found and scheme.lower() == "bearer" else None


def fresh_key() -> str:
    """A new key."""
    return f"sk-saddlepoint-{secrets.token_urlsafe(32)}"


@dataclass
class _Bucket:
    left: float
    at: float


@dataclass(eq=False)
class Gate:
    """ASGI middleware around the application.

    Args:
        keys: None lets everybody in, from this machine's own names only, so that no web page can ask through a browser.
        rate: Requests a minute for each key; 0 is no limit.
        max_body: Bytes.
        max_file: Bytes of a file that is uploaded; 0 where none can be.
        upload_seconds: A body must have come within so many; a file that is uploaded may take longer as long as it keeps its `PACE`.
        open_hosts: Names under which the server may be asked without keys, besides this machine's own.
    """

    app: ASGIApp
    meters: Meters
    keys: Keys | None = None
    rate: float = 0.0
    max_body: int = 1 << 20
    max_file: int = 0
    upload_seconds: float = 30.0
    open_hosts: frozenset[str] = frozenset()
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = f"req_{uuid4().hex}"
        state["began"] = time.monotonic()
        state["endings"] = []  # called when the request is over, however it ended
        begun: list[int] = []
        headers = dict(scope["headers"])
        # Who asks before it sends (Expect) has sent nothing, where nobody took the body.
        unread = b"expect" not in headers and not {b"content-length", b"transfer-encoding"}.isdisjoint(headers)

        async def take() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
                if unread and message["status"] != 408:
                    await _rest(take)
                message = {**message, "headers": [*message["headers"], (b"x-request-id", state["request_id"].encode())]}
            await send(message)

        try:
            self._admit(scope, state)
            if self.max_file and scope["method"] == "POST" and UPLOADS.fullmatch(scope["path"]):
                come = self._uploaded(scope, take)
            else:
                come = self._replayed(await self._body(scope, take), take)
            await self.app(scope, come, answer)
        except Exception as wrong:
            if begun:
                raise  # an answer that breaks off is to be seen as one
            if not isinstance(wrong, ApiError):
                logging.getLogger("saddlepoint").exception("%s failed", state["request_id"])
                wrong = ApiError(500, "the server failed; its log says why", "internal_error")
            await _send(answer, wrong)
        finally:
            for done in state.get("endings", ()):
                done()
            route = getattr(scope.get("route"), "path", "other")  # not the path itself: anybody may make up paths
            self.meters.requests.labels(route, str(begun[0]) if begun else "gone").inc()

    def _admit(self, scope: Scope, state: dict[str, Any]) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        state["key"] = ""
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            raise ApiError(400, "the address holds a zero byte", "invalid_value")
        if scope["path"] in OPEN:
            return
        if self.keys is None:
            # A page elsewhere can have a browser ask under this machine's name, but not without telling its origin.
            for part, given in (("host", headers.get(b"host", "")), ("origin", headers.get(b"origin"))):
                host = re.sub(r"^https?://|:\d*$", "", given or "")
                if given is not None and host not in LOCAL | self.open_hosts:
                    said = f"without keys this server answers only requests to and from itself, got {part} '{host}'"
                    raise ApiError(403, said, "forbidden_host")
        else:
            name = self.keys.who(headers.get(b"authorization", ""))
            if name is None:
                said = (
                    "give a key of this server: Authorization: Bearer KEY"
                    if b"authorization" not in headers
                    else "the key is not known here"
                )
                raise ApiError(401, said, "invalid_api_key")
            state["key"] = name
        if self.rate:
            now = time.monotonic()
            bucket = self._buckets.setdefault(state["key"], _Bucket(self.rate, now))
            bucket.left = min(self.rate, bucket.left + (now - bucket.at) * self.rate / 60)
            bucket.at = now
            if bucket.left < 1:
                wait = (1 - bucket.left) * 60 / self.rate
                said = f"more than {self.rate:g} requests a minute; try again in {wait:.1f} s"
                raise ApiError(429, said, "rate_limit_exceeded", headers={"retry-after": str(max(1, round(wait)))})
            bucket.left -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        parts = []
        come = self._counted(scope, receive, self.max_body, pace=0)
        while True:
            message = await come()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    def _uploaded(self, scope: Scope, receive: Receive) -> Receive:
        return self._counted(scope, receive, self.max_file + FRAME, PACE)

    def _replayed(self, body: bytes, receive: Receive) -> Receive:
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(given, None) or await receive()

        return replay

    def _counted(self, scope: Scope, receive: Receive, most: int, pace: int) -> Receive:
        """A body as it comes, up to `most` bytes, and no slower than is allowed.

        Args:
            pace: Bytes of what has come that buy another second; 0 is none.
        """
        too_large = ApiError(413, f"the body is larger than {most} bytes", "request_too_large", headers={"connection": "close"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        over = not length.isdigit() or len(length) > 12 or int(length) > most
        began, size, whole = asyncio.get_running_loop().time(), 0, False

        async def come() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            if over:
                raise too_large
            message = await self._next(receive, began, size, pace)
            size += len(message.get("body", b""))
            whole = not message.get("more_body")
            if size > most:
                raise too_large
            return message

        return come

    async def _next(self, receive: Receive, began: float, size: int, pace: int) -> Message:
        """What comes next of a body of which `size` bytes have come."""
        try:
            async with asyncio.timeout_at(began + self.upload_seconds + (size / pace if pace else 0)):
                message = await receive()
        except TimeoutError:
            said = f"the body did not come within {self.upload_seconds:g} s" + (f", nor at {pace} bytes a second" if pace else "")
            raise ApiError(408, said, "request_timeout", headers={"connection": "close", "x-should-retry": "false"}) from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the request broke off", "broken_off")
        return message


async def _rest(receive: Receive) -> None:
    """Let what is still sent go by, for a while: a client that is hung up on while it sends reads no answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body"):
                pass


async def _send(send: Send, wrong: ApiError) -> None:
    body = json.dumps(wrong.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in wrong.headers.items()]
    await send({"type": "http.response.start", "status": wrong.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
