"""The terminal conversation: commands, history, mistakes, Ctrl-C in a real terminal, one answer for scripts."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from tiny_models import talking_model, tiny_processor, tiny_samples
from typer.testing import CliRunner

from masquant import recording
from masquant.chat import Chat, printable, typed_lines
from masquant.cli import app
from masquant.conversation import Message, Part, Responder, Sampling
from masquant.errors import DataError, MasquantError

FAMILY = "qwen2_5_omni"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, picture.png and sound.wav."""
    root = tmp_path_factory.mktemp("chat")
    talking_model(FAMILY).save_pretrained(root / "model")
    tiny_processor(FAMILY).save_pretrained(root / "model")
    sample = tiny_samples(FAMILY, root, count=1)[0]
    Path(sample["image"]).rename(root / "my picture.png")
    Path(sample["audio"]).rename(root / "sound.wav")
    return root


@pytest.fixture(scope="module")
def responder() -> Responder:
    return Responder(talking_model(FAMILY), tiny_processor(FAMILY))


@pytest.fixture
def chat(responder: Responder) -> Chat:
    console = Console(file=io.StringIO(), width=200)
    return Chat(responder, console, sampling=Sampling(16, temperature=0))


def written(chat: Chat) -> str:
    file = chat.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_conversation_is_kept_and_forgotten(chat: Chat) -> None:
    chat.run(["Hello\n", "", "And again?\n"])
    assert [m.role for m in chat.messages] == ["user", "assistant", "user", "assistant"]
    said = chat.messages[1].parts[0].content
    assert said and said in written(chat)
    expected = "".join(chat.responder.answer(chat.messages[:3], chat.sampling)).strip()
    assert chat.messages[3].parts[0].content == expected  # the second answer saw the first
    chat.run(["/reset", "Hello"])
    assert [m.parts[0].content for m in chat.messages] == ["Hello", said]
    assert re.fullmatch(
        r"3 answers, 48 tokens, \d+\.\d tokens/s; model [\d.]+ KiB, peak memory [\d.]+ \w?iB", chat.summary()
    ), chat.summary()


def test_media_go_with_the_next_message(chat: Chat, world: Path) -> None:
    chat.run([f'/image "{world}/my picture.png"', f"/audio {world}/sound.wav", "What is it?", "Sure?"])
    assert [p.kind for p in chat.messages[0].parts] == ["image", "audio", "text"]
    assert [p.kind for p in chat.messages[2].parts] == ["text"] and not chat.attached


def test_mistakes_are_told_and_the_conversation_goes_on(chat: Chat, world: Path) -> None:
    (world / "bad.wav").write_bytes(b"RIFF")
    mistakes = ["/image", "/image /gone.png", f"/audio {world}/bad.wav", "/dance", "a<|AUDIO|>"]
    chat.run([*mistakes, "/help", "Hello", "/quit", "never"])
    told = written(chat)
    for message in (
        "error: /image needs the path of a file",
        "gone.png does not exist",
        "bad.wav is no readable sound file",
        "no command /dance; there are /image, /audio",
        "holds <|AUDIO|>",
        "Ctrl-C stops an answer",
    ):
        assert message in told, message
    assert [m.role for m in chat.messages] == ["user", "assistant"] and not chat.attached


def test_what_the_model_cannot_take_is_refused_at_once(world: Path) -> None:
    blind = Responder(talking_model("qwen2_audio"), tiny_processor("qwen2_audio"))
    with pytest.raises(DataError, match="the first message has image"):
        Chat(blind, Console(quiet=True), attached=[Part("image", world / "my picture.png")])
    chat = Chat(blind, Console(file=io.StringIO()))
    chat.run([f"/image {world}/my picture.png"])
    assert "error: the next message has image" in written(chat)


def test_an_interrupted_answer_is_kept(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.sampling = Sampling(900, temperature=0)
    write = chat._write

    def interrupting(text: str) -> None:
        write(text)
        if len(written(chat)) > 50 and "stopped" not in text and text != "\n":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "_write", interrupting)
    chat.run(["Hello"])
    assert chat.answers[0].finish_reason == "cancelled" and chat.answers[0].completion_tokens < 900
    assert written(chat).endswith(" [stopped]\n")
    assert chat.messages[1].parts[0].content in written(chat)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\tc\nd\u202e") == "a\ufffd]0;title\ufffdb\tc\nd\ufffd"
    assert printable("Größe 大きさ 👩\u200d🔬") == "Größe 大きさ 👩\u200d🔬"


class Microphone:
    """What sounddevice.InputStream does, with half a second of a ramp."""

    def __init__(self, callback: Any, **options: Any) -> None:
        assert options == {"samplerate": 16_000, "channels": 1, "dtype": "float32"}
        self.callback = callback

    def __enter__(self) -> None:
        for block in np.linspace(0, 0.5, 8000, dtype=np.float32).reshape(8, 1000, 1):
            self.callback(block, len(block), None, None)
            block[:] = 9  # the library uses its buffer again

    def __exit__(self, *_: Any) -> None:
        pass


def test_record(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(InputStream=Microphone, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    chat.run(["/record", "What do you hear?"])
    sound = chat.messages[0].parts[0].content
    assert sound["sampling_rate"] == 16_000
    np.testing.assert_array_equal(sound["array"], np.linspace(0, 0.5, 8000, dtype=np.float32))
    assert len(recording.record(lambda: None, max_seconds=0.2)["array"]) == 3000
    with pytest.raises(MasquantError, match="the microphone gave no sound"):
        recording.record(lambda: None, max_seconds=0.01)


def test_record_without_a_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(recording.RecordingError, match="masquant\\[record\\]"):
        recording.record(lambda: None, 1)

    class NoMicrophone:
        def __init__(self, **_: Any) -> None:
            raise OSError("Error querying device -1")

    fake = SimpleNamespace(InputStream=NoMicrophone, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    with pytest.raises(recording.RecordingError, match="no microphone can be used: Error querying device"):
        recording.record(lambda: None, 1)


def test_typed_lines_have_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUANT_CACHE", str(tmp_path))
    with create_pipe_input() as keys:
        keys.send_text("first\rhalf\x03second\r\x04")  # Ctrl-C clears the line, Ctrl-D ends
        assert list(typed_lines(input=keys, output=DummyOutput())) == ["first", "second"]
    assert list(FileHistory(str(tmp_path / "chat_history")).load_history_strings()) == ["second", "first"]
    assert oct((tmp_path / "chat_history").stat().st_mode & 0o777) == "0o600"
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASQUANT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set MASQUANT_CACHE"):
        list(typed_lines(input=None))


def run(*args: str, stdin: str | None = None, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["chat", *args], input=stdin)
    if code == 0 and done.exception:
        raise done.exception
    assert done.exit_code == code or isinstance(done.exception, MasquantError), done.output
    return done


def test_one_prompt_for_scripts(world: Path) -> None:
    options = ["--prompt", "What is it?", "--max-new-tokens", "12", "--temperature", "0"]
    media = ["--image", f"{world}/my picture.png", "--audio", f"{world}/sound.wav"]
    found = json.loads(run(f"{world}/model", *media, *options, "--json").stdout)
    text = run(f"{world}/model", *media, *options).stdout
    assert text == found["answer"] + "\n" or text.strip() == found["answer"]
    assert found["completion_tokens"] == 12 and found["finish_reason"] == "length" and found["tokens_per_second"] > 0
    assert 0 < found["model_bytes"] < found["peak_memory"]
    responder = Responder(talking_model(FAMILY), tiny_processor(FAMILY))
    parts = (Part("image", world / "my picture.png"), Part("audio", world / "sound.wav"), Part("text", "What is it?"))
    assert found["answer"] == "".join(responder.answer([Message("user", parts)], Sampling(12, 0))).strip()
    with_system = json.loads(run(f"{world}/model", *options, "--system", "Be short.", "--json").stdout)
    assert with_system["prompt_tokens"] != found["prompt_tokens"]


def test_a_pipe_is_a_conversation(world: Path) -> None:
    done = run(f"{world}/model", "--max-new-tokens", "5", stdin="/image /gone.png\nHello\nMore\n/quit\nnever\n")
    assert "gone.png does not exist" in done.stdout
    assert re.search(r"^2 answers, 10 tokens, [\d.]+ tokens/s; model .* peak memory", done.stderr, re.MULTILINE)


def test_wrong_usage(world: Path) -> None:
    assert "--json needs --prompt" in run(f"{world}/model", "--json", code=2).output
    failed = run(f"{world}/model", "--image", "gone.png", "--prompt", "x", code=1)
    assert isinstance(failed.exception, DataError) and "gone.png does not exist" in str(failed.exception)


def test_ctrl_c_stops_the_answer_and_not_the_program(world: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "MASQUANT_CACHE": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [sys.executable, "-m", "masquant.cli", "chat", f"{world}/model", "--max-new-tokens", "900"]
    process = subprocess.Popen(
        [*command, "--temperature", "0"], stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen, position = "", 0

    def until(pattern: str) -> None:
        """Read on until the pattern comes."""
        nonlocal seen, position
        end = time.monotonic() + 60
        while not (found := re.compile(pattern).search(seen, position)):
            assert time.monotonic() < end, f"{pattern} is not in {seen[-1000:]!r}"
            if select.select([master], [], [], 0.2)[0]:
                seen += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(master, 65536).decode(errors="replace"))
        position = found.end()

    try:
        until(">")
        os.write(master, b"Hello\r")
        until(r"\b[a-h]{3,} ")
        os.write(master, b"\x03")  # the terminal makes it SIGINT
        until(r"\[stopped\]")
        until(">")
        os.write(master, b"\x04")
        until(r"1 answers, \d+ tokens, [\d.]+ tokens/s")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert "Traceback" not in seen
