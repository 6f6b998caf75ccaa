# SPDX-License-Identifier: Apache-2.0
"""What stands before every request: the key, the bounded queue, the bounded body; and what ends with the client."""

from __future__ import annotations

import secrets

import anyio
import anyio.lowlevel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .state import ServerState

CHAT = "/v1/chat/completions"
_GUARDED = ("/v1/", "/metrics")


class _Gone(Exception):
    """The client left before its request was there."""


class Gate:
    """ASGI middleware.

    Only chat completions are queued. Their number is bounded before their bodies are read; a body is read whole,
    bounded in bytes and seconds; and when the client leaves, or takes nothing any more, its request is cancelled.
    """

    def __init__(self, app: ASGIApp, *, state: ServerState, api_key: str | None) -> None:
        self.app, self.state, self.limits, self.metrics = app, state, state.limits, state.metrics
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._admitted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._key is not None and scope["path"].startswith(_GUARDED):
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._key):
                error = ApiError(
                    401, "the API key is missing or wrong; send it as bearer token", code="invalid_api_key"
                )
                await self._refuse(error, scope, receive, send)
                return
        if scope["path"] == CHAT and scope["method"] == "POST":
            await self._chat(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 499

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self.state.stopping:
                raise ApiError(503, "the server is stopping", code="stopping")
            kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # which a foreign page may not send without being asked for first
                raise ApiError(415, f"requests are application/json, not {kind or 'untyped'}", code="invalid_type")
            if self._admitted >= self.limits.requests:
                raise ApiError(
                    429, f"{self._admitted} requests run or wait already; try again later", code="too_many_requests"
                )
            self._admitted += 1
            try:
                self.metrics.admitted.set(self._admitted)
                await self._answer(scope, await self._body(scope, receive), receive, counting)
            finally:
                self._admitted -= 1
                self.metrics.admitted.set(self._admitted)
        except ApiError as error:
            await self._refuse(error, scope, receive, counting)
        except _Gone:
            pass
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.requests.labels(str(status)).inc()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The request's body.

        Raises:
            ApiError: it is too large, or does not come.
            _Gone: the client left.
        """
        limit = self.limits.request_bytes
        too_large = ApiError(413, f"the request is too large, {limit:,} bytes are read at most", code="too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        with anyio.move_on_after(self.limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
        raise ApiError(408, f"the request did not come within {self.limits.body_seconds:g} s", code="request_timeout")

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application until it is done, or the client left."""
        gone, whole = anyio.Event(), False
        rest: list[bytes] = [body]

        async def replay() -> Message:
            if rest:
                return {"type": "http.request", "body": rest.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def bounded(message: Message) -> None:
            nonlocal whole
            with anyio.move_on_after(self.limits.send_seconds) as waiting:
                await send(message)
            if waiting.cancelled_caught:
                group.cancel_scope.cancel()
                await anyio.lowlevel.checkpoint()
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body", False))

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not whole:  # else it only has what it wanted
                group.cancel_scope.cancel()

        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                await self.app(scope, replay, bounded)
            except Exception as error:  # raised below, outside of the group, which would wrap it
                failure = error
            finally:
                group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, after the rest of the body: a client that still sends would not read the answer.

        What comes is thrown away, so only its time is bounded, not its size.
        """
        with anyio.move_on_after(self.limits.body_seconds if error.status != 408 else 0):
            while (await receive()).get("more_body", False):
                pass
        await error.response()(scope, receive, send)
