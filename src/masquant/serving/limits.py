# SPDX-License-Identifier: Apache-2.0
"""What a client may ask for. Everything that it sends is bounded before it costs much."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server; beyond them a request gets a 4xx answer, or 503 where the server is at fault.

    Attributes:
        requests: answers in progress and waiting, of all models together; more get 429.
        request_bytes: of a request's body.
        new_tokens: of an answer; also what a request gets that asks for no number.
        context_tokens: of a conversation and its answer; never more than the model's own.
        media: pictures and sounds in a conversation.
        pixels: of all its pictures together.
        audio_seconds: of all its sounds together.
        wait_seconds: for a turn; then 503.
        body_seconds: until a request's body is there.
        send_seconds: until a client takes the next piece of an answer; then it counts as gone.
        connections: open at once.
    """

    requests: int = 16
    request_bytes: int = 20 * 2**20
    new_tokens: int = 1024
    context_tokens: int = 8192
    media: int = 16
    pixels: int = 32_000_000
    audio_seconds: float = 120.0
    wait_seconds: float = 120.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    connections: int = 512
