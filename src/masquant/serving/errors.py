# SPDX-License-Identifier: Apache-2.0
"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ..errors import MasquantError

RETRY_SECONDS = 5

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorDetail


class ApiError(MasquantError):
    """A request that is refused, with its HTTP status."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> ErrorResponse:
        """As it is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorResponse(error=ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        """A whole HTTP answer."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413, 500):  # the rest of the body was not read, or the server closes after a failure
            headers["Connection"] = "close"
        return JSONResponse(self.body().model_dump(), self.status, headers)
