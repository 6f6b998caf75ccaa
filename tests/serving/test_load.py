"""Many clients, clients that leave, clients that read nothing, and the end of the server: as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILY, Running, running, wait_for
from test_api import image_part, png, user
from tiny_models import talking_model, tiny_processor

from masquant.serving.limits import Limits

openai = pytest.importorskip("openai")


@dataclass
class Process:
    """`masquant serve` in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    def client(self, kind: Any = openai.OpenAI) -> Any:
        return kind(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


def answers(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    talking_model(FAMILY).save_pretrained(tmp_path / "model")
    tiny_processor(FAMILY).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "masquant.cli", "serve", str(tmp_path / "model"), "--port", "0"]
    with subprocess.Popen([*command, "--grace", "20"], stderr=subprocess.PIPE, text=True) as running_process:
        try:
            assert running_process.stderr is not None
            line = running_process.stderr.readline()
            found = re.search(r"serving model at (http://127\.0\.0\.1:\d+); Ctrl-C", line)
            assert found, line + running_process.stderr.read()
            address = (found[1].split(":")[1][2:], int(found[1].split(":")[2]))
            wait_for(lambda: answers(address))
            yield Process(running_process, found[1])
        finally:
            running_process.kill()


def resident(process: Process) -> int:
    """Bytes of the server's process."""
    return int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_hundred_clients_and_a_graceful_stop(process: Process) -> None:
    async def wave() -> Counter[int]:
        async with process.client(openai.AsyncOpenAI) as client:

            async def ask(number: int) -> int:
                """Status of an answer, every second one streamed."""
                content = [image_part(png()), {"type": "text", "text": f"What is {number}?"}]
                request = {"model": "model", "messages": [user(*content)], "max_tokens": 8}
                try:
                    if number % 2:
                        finish = [c.choices[0].finish_reason async for c in await create(**request, stream=True)][-1]
                    else:
                        finish = (await create(**request)).choices[0].finish_reason
                except openai.RateLimitError as error:
                    return 429 if int(error.response.headers["Retry-After"]) > 0 else 0
                return 200 if finish == "length" else 0

            create = client.chat.completions.create
            return Counter(await asyncio.gather(*(ask(number) for number in range(100))))

    first = asyncio.run(wave())
    assert set(first) == {200, 429} and first[200] >= 16 and first.total() == 100
    asyncio.run(wave())
    before = resident(process)
    waves = [asyncio.run(wave()) for _ in range(3)]
    assert all(set(found) <= {200, 429} and found.total() == 100 for found in waves)
    growth = resident(process) - before
    assert growth < 16 * 2**20, f"{growth / 2**20:.1f} MiB more after 300 requests"

    client = process.client()
    with client.chat.completions.create(
        model="model", messages=[user("Hello")], max_tokens=400, stream=True
    ) as stream:
        next(stream)
        process.process.send_signal(signal.SIGTERM)
        finish = [chunk.choices[0].finish_reason for chunk in stream][-1]
    assert finish == "length"  # it may end
    with pytest.raises(openai.APIConnectionError), process.client() as late:  # but nothing new is begun
        late.models.list()
    assert process.process.wait(20) == 0
    assert process.process.stderr is not None
    assert "Traceback" not in process.process.stderr.read()


LONG = {"model": "tiny", "messages": [user("Hello")], "max_tokens": 900, "temperature": 0}


def raw(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(server.address, timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def error_of(connection: socket.socket) -> str:
    """The whole answer, an error; the connection is closed then."""
    with connection:
        answer = b""
        while not answer.endswith(b"}}"):
            piece = connection.recv(1000)
            assert piece, answer
            answer += piece
    return answer.decode().lower()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(server: Running, stream: bool) -> None:
    tokens = server.metric("masquant_completion_tokens_total", model="tiny")
    left = server.metric("masquant_requests_total", status="499")
    connection = raw(server, {**LONG, "stream": stream})
    wait_for(lambda: server.metric("masquant_answers_running", model="tiny") == 1)
    if stream:
        assert connection.recv(100)
    connection.close()
    wait_for(lambda: server.metric("masquant_answers_running", model="tiny") == 0)
    wait_for(lambda: server.metric("masquant_requests_admitted") == 0)
    assert server.metric("masquant_completion_tokens_total", model="tiny") - tokens < 900
    if not stream:  # of a stream the status was sent before
        wait_for(lambda: server.metric("masquant_requests_total", status="499") == left + 1)


def test_a_client_that_leaves_while_it_waits_gives_its_place_up(server: Running) -> None:
    first = raw(server, LONG)
    wait_for(lambda: server.metric("masquant_answers_running", model="tiny") == 1)
    waiting = [raw(server, LONG) for _ in range(5)]
    wait_for(lambda: server.metric("masquant_requests_admitted") == 6)
    for connection in waiting:
        connection.close()
    wait_for(lambda: server.metric("masquant_requests_admitted") == 1)
    first.close()
    wait_for(lambda: server.metric("masquant_requests_admitted") == 0)


def test_queue_and_patience_are_bounded() -> None:
    with running(Limits(requests=2, wait_seconds=0.2)) as server, raw(server, LONG):
        wait_for(lambda: server.metric("masquant_answers_running", model="tiny") == 1)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            second = raw(server, LONG)
            wait_for(lambda: server.metric("masquant_requests_admitted") == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests run or wait already"):
                client.chat.completions.create(**LONG)
            answer = error_of(second)
            assert " 503 " in answer and "retry-after: 5" in answer and "no turn within 0.2 s" in answer
            other = client.chat.completions.create(**{**LONG, "model": "base", "max_tokens": 3})
            assert other.usage.completion_tokens == 3  # another model has its own turn


def test_an_answer_that_outlasts_the_grace_is_cut_off() -> None:
    with running(grace_seconds=1) as server:
        model = server.models["tiny"].responder.model
        model.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # 900 tokens take 45 s
        with raw(server, {**LONG, "stream": True}) as connection:
            assert connection.recv(100)
            start = time.monotonic()
            server.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: server.metric("masquant_requests_admitted") == 0)
            assert 0.9 < time.monotonic() - start < 10
            assert 0 < server.metric("masquant_completion_tokens_total", model="tiny") < 900


def test_stopping_refuses_what_waits(server: Running) -> None:
    state = server.app.state.server
    with raw(server, LONG) as first:
        wait_for(lambda: server.metric("masquant_answers_running", model="tiny") == 1)
        second = raw(server, LONG)
        wait_for(lambda: server.metric("masquant_requests_admitted") == 2)
        state.stopping = True
        try:
            first.close()
            assert "the server is stopping" in error_of(second)
            assert " 503 service unavailable" in error_of(raw(server, LONG))
            with socket.create_connection(server.address) as health:
                health.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert b" 503 " in health.recv(1000)
        finally:
            state.stopping = False
