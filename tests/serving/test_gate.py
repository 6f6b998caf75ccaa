"""The gate alone: a client that takes nothing any more, and one that leaves before its request is there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")

from masquant.serving.gate import Gate
from masquant.serving.limits import Limits
from masquant.serving.state import ServerState

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "headers": [(b"content-type", b"application/json")],
}


def metric(state: ServerState, name: str, **labels: str) -> float:
    return state.metrics.registry.get_sample_value(f"masquant_{name}", labels) or 0.0


def gated(app: Any, **limits: Any) -> tuple[Gate, ServerState]:
    state = ServerState(Limits(**limits))
    return Gate(app, state=state, api_key=None), state


def test_a_client_that_takes_nothing_is_let_go() -> None:
    ended = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"a", "more_body": True})
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def run() -> list[Any]:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 5:
                await asyncio.Event().wait()  # the client's buffers are full

        await asyncio.wait_for(gate(SCOPE, receive, send), 20)
        return sent

    gate, state = gated(endless, send_seconds=0.1)
    assert len(asyncio.run(run())) == 5 and ended == ["cancelled"]
    assert metric(state, "requests_admitted") == 0 and metric(state, "requests_total", status="200") == 1


@pytest.mark.parametrize("messages", [[], [{"type": "http.request", "body": b"{", "more_body": True}]])
def test_a_client_that_leaves_before_its_request_is_there(messages: list[Any]) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("there is nothing to answer")

    async def run() -> None:
        left = [*messages, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return left.pop(0)

        await gate(SCOPE, receive, never)

    gate, state = gated(never)
    asyncio.run(run())
    assert metric(state, "requests_total", status="499") == 1 and metric(state, "requests_admitted") == 0
