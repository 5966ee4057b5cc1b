"""Errors as the protocol has them: four keys, and a status that no client tries again without need.

A mistake in a request is always 400: the official clients repeat 409 three times, and older ones cannot read 422.
"""

from typing import Any

from fastapi.responses import JSONResponse

TOLD = {
    "description": "An error",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
"""How the document of the routes tells of errors: every one of them has these four keys."""


class ApiError(Exception):
    """What a client did wrong, or cannot have.

    Args:
        status: 400 for a mistake in the request, 401 key, 404 no such thing, 413 too large, 429 too many, 502 the model behind failed.
        code: A word for programs; None where the protocol has none.
        param: The field that is wrong.
        headers: Such as `retry-after`.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # Half a character (a lone surrogate) that came in must not break the answer that quotes it.
        message, param = (text and text.encode("utf-8", "replace").decode() for text in (str(self), self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)
