"""The interface as OpenAI's own client uses it: what is answered is what the model says, what is wrong is refused."""

from __future__ import annotations

import base64
import http.client
import io
import json
import wave
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from conftest import Running, running, wait_for
from PIL import Image

from masquant.conversation import Message, Part, Sampling
from masquant.serving.limits import Limits

openai = pytest.importorskip("openai")


def png(width: int = 42, height: int = 28) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(stream, "PNG")
    return stream.getvalue()


def wav(seconds: float = 0.5) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        tone = np.sin(np.arange(int(seconds * 16_000)) / 6) * 9000
        file.writeframes(tone.astype("<i2").tobytes())
    return stream.getvalue()


def image_part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


def audio_part(content: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_text_picture_and_sound(server: Running, client: Any) -> None:
    picture, sound = png(), wav()
    parts = [image_part(picture), audio_part(sound), {"type": "text", "text": "What is it?"}]
    found = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            user(*parts),
        ],
        temperature=0,
        max_completion_tokens=20,
    )
    messages = [
        Message.of_text("system", "Be short."),
        Message.of_text("user", "Hello"),
        Message.of_text("assistant", "Hi."),
        Message("user", (Part("image", picture), Part("audio", sound), Part("text", "What is it?"))),
    ]
    answer = server.models["tiny"].responder.answer(messages, Sampling(20, temperature=0))
    assert found.choices[0].message.content == "".join(answer) != ""
    assert found.choices[0].finish_reason == "length" and found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == answer.prompt_tokens and found.usage.completion_tokens == 20
    assert found.usage.total_tokens == answer.prompt_tokens + 20 and found.model == "tiny"


def test_streamed_pieces_are_the_answer(client: Any) -> None:
    request = {"model": "base", "messages": [user("Hello")], "temperature": 0, "max_tokens": 100}
    whole = client.chat.completions.create(**request)
    with client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 2 and "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage and {c.id for c in chunks} == {chunks[0].id}
    assert chunks[-1].timings["tokens_per_second"] > 0
    with client.chat.completions.create(**request, stream=True) as stream:
        assert all(chunk.usage is None for chunk in stream)


def test_stop_and_sampling(client: Any) -> None:
    request = {"model": "tiny", "messages": [user("Hello")], "max_tokens": 60}
    whole = client.chat.completions.create(**request, temperature=0).choices[0].message.content
    cut = client.chat.completions.create(**request, temperature=0, stop=["never so", whole[4:6]]).choices[0]
    assert cut.message.content == whole[: whole.index(whole[4:6])] and cut.finish_reason == "stop"
    hot = {client.chat.completions.create(**request, temperature=2).choices[0].message.content for _ in range(3)}
    assert len(hot) > 1


def test_models(client: Any) -> None:
    first, second = client.models.list().data
    assert (first.id, first.scheme, second.id, second.scheme) == ("tiny", "W4A8", "base", "float")
    assert first.accepts == ["image", "audio"] and first.max_model_len == 1024
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there are tiny, base"):
        client.models.retrieve("gpt")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "gpt"}, "NotFoundError", "no model 'gpt' here; there are tiny, base"),
    ({"messages": []}, "BadRequestError", "messages: List should have at least 1 item"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "BadRequestError", "must end with a message of the user"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "BadRequestError", "messages.0: Input tag 'tool'"),
    ({"messages": [user("a<|IMAGE|>")]}, "BadRequestError", r"message 1 holds <\|IMAGE\|>"),
    ({"messages": [user("a" * 1100)]}, "BadRequestError", "1,024 leave room for an answer"),
    ({"max_tokens": 2000}, "BadRequestError", "max_tokens: Input should be less than or equal to 1024"),
    ({"max_tokens": 0}, "BadRequestError", "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": "5"}, "BadRequestError", "max_tokens: Input should be a valid integer"),
    ({"temperature": 9}, "BadRequestError", "temperature: Input should be less than or equal to 2"),
    ({"n": 2}, "BadRequestError", "n: Input should be 1"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "BadRequestError", "tools: Extra inputs"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}})]}, "BadRequestError",
     "is an address, and nothing is fetched here"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]}, "BadRequestError",
     "is an address, and nothing is fetched here"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "data:text/html;base64,YQ=="}})]},
     "BadRequestError", "must be data:image/...;base64,..."),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})]}, "BadRequestError",
     "message 1: the picture is no base64"),
    ({"messages": [user(image_part(b"GIF89a"))]}, "BadRequestError", "message 1: the picture is no readable image"),
    ({"messages": [user(image_part(png()[:70]))]}, "BadRequestError", "message 1: the picture is a broken image"),
    ({"messages": [user(audio_part(b"RIFF"))]}, "BadRequestError", "message 1: the audio is no readable sound file"),
    ({"messages": [user(audio_part(wav(3)))]}, "BadRequestError", "this model hears at most 1 s"),
    ({"messages": [user(audio_part(wav(130)))]}, "BadRequestError", "130 seconds of audio; this server takes at most"),
    ({"messages": [user(*[image_part(png())] * 17)]}, "BadRequestError", "17 pictures and sounds; this server"),
    ({"messages": [user(image_part(png(8000, 8000)))]}, "BadRequestError", "64,000,000 pixels; this server"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED)
def test_refusals(client: Any, change: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(getattr(openai, kind), match=message) as found:
        client.chat.completions.create(**({"model": "tiny", "messages": [user("Hello")]} | change))
    assert set(found.value.body) == {"message", "type", "param", "code"}


def post(server: Running, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'{"model": "tiny"}', b"[" * 100_000, b"\xff\xfe",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}',
    ],
)  # fmt: skip
def test_broken_bodies(server: Running, body: bytes) -> None:
    status, text, _ = post(server, body)
    assert status == 400 and json.loads(text)["error"]["type"] == "invalid_request_error"


def test_foreign_pages_cannot_reach_it(server: Running) -> None:
    body = json.dumps({"model": "tiny", "messages": [user("Hello")], "max_tokens": 1}).encode()
    assert post(server, body)[0] == 200
    status, _, headers = post(server, body, Content_Type="text/plain")  # what a page may send without being asked for
    assert status == 415
    assert post(server, body, Host="evil.example")[0] == 400  # a name that was made to point here
    assert post(server, body, Host="localhost:1")[0] == 200
    assert "access-control-allow-origin" not in headers


def test_key() -> None:
    with running(api_key="secret ö") as server:
        body = json.dumps({"model": "tiny", "messages": [user("Hello")], "max_tokens": 1}).encode()
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, text, headers = post(server, body, **given)
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer" and "key is missing" in text
        assert post(server, body, Authorization="Bearer secret ö".encode().decode("latin-1"))[0] == 200
        for path, status in (("/health", 200), ("/", 200), ("/v1/models", 401), ("/metrics", 401)):
            connection = http.client.HTTPConnection(*server.address, timeout=60)
            connection.request("GET", path)
            assert connection.getresponse().status == status, path
            connection.close()


def test_request_size() -> None:
    with running(Limits(request_bytes=10_000)) as server:
        status, text, _ = post(server, b"a" * 10_001)
        assert status == 413 and "10,000 bytes are read at most" in text
        with closing(http.client.HTTPConnection(*server.address, timeout=60)) as connection:
            pieces = (b"a" * 9_999 for _ in range(100))  # far more than is read: the answer still arrives
            headers = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", pieces, headers, encode_chunked=True)
            assert connection.getresponse().status == 413
        wait_for(lambda: server.metric("masquant_requests_total", status="413") == 2)
        wait_for(lambda: server.metric("masquant_requests_admitted") == 0)


def test_request_time() -> None:
    with running(Limits(body_seconds=1)) as server:
        with closing(http.client.HTTPConnection(*server.address, timeout=60)) as connection:
            connection.putrequest("POST", "/v1/chat/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "100")
            connection.endheaders(b"{")  # and nothing more
            response = connection.getresponse()
            assert response.status == 408 and "did not come within 1 s" in response.read().decode()
        wait_for(lambda: server.metric("masquant_requests_admitted") == 0)


def test_metrics_and_health(server: Running, client: Any) -> None:
    def counted(what: str) -> float:
        return server.metric(f"masquant_{what}_tokens_total", model="tiny")

    wait_for(lambda: server.metric("masquant_requests_admitted") == 0)
    prompt, completion = counted("prompt"), counted("completion")
    found = client.chat.completions.create(model="tiny", messages=[user("Hello")], max_tokens=7)
    wait_for(lambda: counted("completion") == completion + 7)
    assert counted("prompt") == prompt + found.usage.prompt_tokens
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    text = response.read().decode()
    assert response.headers["Content-Type"].startswith("text/plain")
    assert "process_resident_memory_bytes" in text and 'masquant_first_token_seconds_bucket{le="0.05"' in text
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.close()


def test_a_failing_model_is_told(server: Running, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(server.models["base"].responder.model, "generate", broken)
    request = {"model": "base", "messages": [user("Hello")]}
    with pytest.raises(openai.InternalServerError, match="the model failed: RuntimeError") as found:
        client.chat.completions.create(**request)
    assert "secret" not in str(found.value)
    with (
        pytest.raises(openai.APIError, match="the model failed: RuntimeError"),
        client.chat.completions.create(**request, stream=True) as stream,
    ):
        list(stream)
    wait_for(lambda: server.metric("masquant_requests_total", status="500") == 1)
    monkeypatch.undo()
    assert client.chat.completions.create(**request, max_tokens=2).usage.completion_tokens == 2
