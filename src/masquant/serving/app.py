# SPDX-License-Identifier: Apache-2.0
"""The application: OpenAI's chat completions over one or two models, health, metrics, and the page."""

# No annotations from the future: FastAPI could not read those of functions that are defined in a function

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..conversation import Answer, Message, Responder, Sampling
from ..errors import DataError
from ..version import __version__
from .errors import ApiError, ErrorResponse
from .gate import CHAT, Gate
from .limits import Limits
from .metrics import Metrics
from .schema import (
    AnswerMessage,
    Choice,
    Completion,
    CompletionRequest,
    Health,
    Model,
    ModelList,
    Timings,
    Usage,
    conversation_of,
    request_model,
)
from .state import ServerState

_LOG = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ERRORS: Mapping[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused: the request is wrong, too large, or one too many."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, or is stopping."},
}
_STREAMED: Mapping[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "An answer, or its events."}
}


class ServedModel:
    """A model that writes one answer at a time, in the order in which they are asked for."""

    def __init__(self, name: str, responder: Responder, scheme: str) -> None:
        self.name, self.responder = name, responder
        self.about = Model(
            id=name,
            created=int(time.time()),
            scheme=scheme,
            accepts=list(responder.accepts),
            max_model_len=responder.max_tokens,
        )
        self._turn = anyio.Lock()

    @asynccontextmanager
    async def answering(
        self, messages: Sequence[Message], sampling: Sampling, state: ServerState
    ) -> AsyncIterator[Answer]:
        """An answer that is begun when its turn comes, and is over, or cancelled, at the end of the block.

        Raises:
            ApiError: its turn does not come in time, or the server stops before.
            DataError: the model cannot take the conversation.
        """
        start = time.monotonic()
        with anyio.move_on_after(state.limits.wait_seconds) as waiting:
            await self._turn.acquire()
        if waiting.cancelled_caught:
            raise ApiError(503, f"no turn within {state.limits.wait_seconds:g} s; try again later", code="too_busy")
        try:
            if state.stopping:
                raise ApiError(503, "the server is stopping", code="stopping")
            state.metrics.wait_seconds.labels(self.name).observe(time.monotonic() - start)
            with anyio.CancelScope(shield=True):  # else it would go on without anybody who can stop it
                answer = await to_thread.run_sync(self.responder.answer, messages, sampling)
            try:
                with state.metrics.running.labels(self.name).track_inprogress():
                    yield answer
            finally:
                answer.cancel()
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(answer.close)
                state.metrics.answered(self.name, answer)
        finally:
            self._turn.release()


async def _pieces(answer: Answer) -> AsyncIterator[str]:
    """An answer's pieces; whoever waits for one can be cancelled."""
    while (piece := await to_thread.run_sync(next, answer, None, abandon_on_cancel=True)) is not None:
        yield piece


def _usage(answer: Answer) -> Usage:
    read, written = answer.prompt_tokens, answer.completion_tokens
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _timings(answer: Answer) -> Timings:
    return Timings(first_token_seconds=answer.first_token_seconds, tokens_per_second=answer.tokens_per_second)


def _finish(answer: Answer) -> Any:
    return "length" if answer.finish_reason == "length" else "stop"


async def _events(answer: Answer, head: Mapping[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of one answer."""

    def event(delta: Mapping[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async for piece in _pieces(answer):
            yield event({"content": piece})
    except Exception as error:  # the status is sent already
        _LOG.exception("an answer failed while it was streamed")
        yield f"data: {ApiError(500, _failure(error)).body().model_dump_json()}\n\n"
        return
    yield event({}, _finish(answer))
    if include_usage:
        numbers = {"usage": _usage(answer).model_dump(), "timings": _timings(answer).model_dump()}
        yield f"data: {json.dumps({**head, 'choices': [], **numbers})}\n\n"
    yield "data: [DONE]\n\n"


def _failure(error: Exception) -> str:
    return f"the model failed: {type(error).__name__}; the server's log says more"


async def _cleanup() -> AsyncIterator[AsyncExitStack]:
    """What is entered here is left after the answer was sent."""
    async with AsyncExitStack() as stack:
        yield stack


def _refusal(error: DataError) -> ApiError:
    code = "context_length_exceeded" if "leave room for an answer" in str(error) else None
    return ApiError(400, str(error), code=code, param="messages")


@contextmanager
def _client_errors() -> Iterator[None]:
    """A conversation that cannot be taken is the client's mistake."""
    try:
        yield
    except DataError as error:
        raise _refusal(error) from error


def create_app(
    models: Sequence[ServedModel],
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """The ASGI application.

    Args:
        models: the first is the one to talk to, a second its baseline.
        limits: bounds of requests.
        api_key: needed for everything but the page and /health.
        hosts: names under which it is reached; others are refused, so that no foreign page can reach a local server.
    """
    limits = limits or Limits()
    metrics = Metrics()
    state = ServerState(limits, metrics)
    by_name = {model.name: model for model in models}
    security = [Security(HTTPBearer(auto_error=False, description="The server's API key."))] if api_key else []
    app = FastAPI(
        title="masquant",
        version=__version__,
        summary="OpenAI-compatible chat completions over quantized multimodal models.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses=dict(_ERRORS),
    )
    app.state.server = state
    app.add_middleware(Gate, state=state, api_key=api_key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    _add_error_handlers(app)
    body_model = request_model(limits)

    @app.post(CHAT, response_model=Completion, responses=dict(_STREAMED), dependencies=security, tags=["chat"])
    async def complete(body: body_model, stack: Annotated[AsyncExitStack, Depends(_cleanup)]) -> Response:  # type: ignore[valid-type]
        """Answer a conversation."""
        request: CompletionRequest = body
        model = by_name.get(request.model)
        if model is None:
            message = f"no model {request.model!r} here; there are {', '.join(by_name)}"
            raise ApiError(404, message, code="model_not_found", param="model")
        with _client_errors():
            messages = await to_thread.run_sync(conversation_of, request, limits)
            await to_thread.run_sync(model.responder.check, messages)
            answer = await stack.enter_async_context(model.answering(messages, request.sampling(limits), state))
        head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }
        if request.stream:
            include_usage = request.stream_options is not None and request.stream_options.include_usage
            chunk = {**head, "object": "chat.completion.chunk"}
            events = _events(answer, chunk, include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        text = "".join([piece async for piece in _pieces(answer)])
        choice = Choice(message=AnswerMessage(content=text), finish_reason=_finish(answer))
        found = Completion(**head, choices=[choice], usage=_usage(answer), timings=_timings(answer))
        return JSONResponse(found.model_dump())

    @app.get("/v1/models", dependencies=security, tags=["models"])
    async def list_models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[model.about for model in models])

    @app.get("/v1/models/{name:path}", dependencies=security, tags=["models"])
    async def get_model(name: str) -> Model:
        """One of them."""
        if name not in by_name:
            raise ApiError(404, f"no model {name!r} here; there are {', '.join(by_name)}", code="model_not_found")
        return by_name[name].about

    @app.get("/health", tags=["server"])
    async def health(response: Response) -> Health:
        """200 while answers are to be had, 503 when stopping."""
        response.status_code = 503 if state.stopping else 200
        return Health(status="stopping" if state.stopping else "ok")

    @app.get(
        "/metrics",
        dependencies=security,
        tags=["server"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for path, file in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        app.get(path, include_in_schema=False)(_page(file))
    return app


def _page(file: str) -> Any:
    async def page() -> FileResponse:
        return FileResponse(_PAGE / file, headers=_HEADERS)

    return page


def _add_error_handlers(app: FastAPI) -> None:
    """All errors in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        message = message.encode(errors="replace").decode()  # may hold half of a surrogate pair
        return ApiError(400, message, code="invalid_request", param=where or None).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, _failure(error)).response()
