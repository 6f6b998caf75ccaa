# SPDX-License-Identifier: Apache-2.0
"""`masquant chat`: a conversation in the terminal, with pictures and sounds, printed while it is written."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from .api import resident_bytes
from .calibration.media import MAX_SECONDS, check_audio, check_image
from .conversation import Answer, Message, Part, Responder, Sampling
from .demo import cache_directory
from .errors import DataError, MasquantError
from .evaluation import human_bytes
from .measuring import peak_memory
from .recording import record

_EMBEDDINGS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
HELP = """\
/image PATH   show a picture with the next message
/audio PATH   let it hear a sound with the next message
/record       record such a sound with the microphone
/reset        forget the conversation
/help         this
/quit         end (also Ctrl-D)
Ctrl-C stops an answer."""
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))


def attachment(kind: Literal["image", "audio"], path: str) -> Part:
    """A file for a message, its header checked.

    Raises:
        DataError: missing, broken or out of bounds.
    """
    if not path:
        raise DataError(f"/{kind} needs the path of a file")
    file = Path(path.strip("\"'")).expanduser()
    _check(Part(kind, file), kind)
    return Part(kind, file)


def _check(part: Part, where: str) -> None:
    if part.kind == "image":
        check_image(part.content, where)
    else:
        check_audio(part.content, where)


def printable(text: str) -> str:
    """Text without what could command the terminal or turn the writing's direction; newlines and tabs stay."""
    return "".join("\ufffd" if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return control or unicodedata.bidirectional(character) in _EMBEDDINGS


class Chat:
    """A conversation that goes on until the lines end.

    Attributes:
        messages: what was said so far.
        attached: media for the next message.
    """

    def __init__(
        self,
        responder: Responder,
        console: Console,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        attached: Sequence[Part] = (),
    ) -> None:
        self.responder, self.console, self.sampling = responder, console, sampling or Sampling()
        self._start = [Message.of_text("system", system)] if system else []
        self.messages = list(self._start)
        self.attached = list(attached)
        self.answers: list[Answer] = []
        for part in self.attached:
            responder.encoder.check_kind(part.kind, "the first message")

    def run(self, lines: Iterable[str]) -> None:
        """Take lines, commands or messages, until they end or one is /quit. Mistakes are told, and it goes on."""
        for line in lines:
            try:
                if not self.take(line.strip()):
                    break
            except MasquantError as error:
                self._tell(f"error: {error}")
            except KeyboardInterrupt:
                self._tell("stopped")

    def take(self, line: str) -> bool:
        """Obey a command, or answer a message; False at /quit.

        Raises:
            MasquantError: it cannot be done; the conversation is as before.
        """
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            self._tell(HELP)
        elif command == "/reset":
            self.messages, self.attached = list(self._start), []
            self._tell("forgotten")
        elif command in ("/image", "/audio"):
            kind: Literal["image", "audio"] = "image" if command == "/image" else "audio"
            self.responder.encoder.check_kind(kind, "the next message")
            self._attach(attachment(kind, rest.strip()))
        elif command == "/record":
            self.responder.encoder.check_kind("audio", "the next message")
            self._attach(self._recording())
        elif line.startswith("/"):
            self._tell(f"no command {command}; there are {', '.join(COMMANDS)}")
        elif line:
            self.say(line)
        return True

    def say(self, text: str) -> Answer:
        """Answer a message with what is attached, printing it; Ctrl-C stops the answer, what was said is kept.

        Raises:
            MasquantError: the model cannot take it; the message is dropped, media stay attached.
        """
        message = Message("user", (*self.attached, Part("text", text)) if text else tuple(self.attached))
        answer, said = self.responder.answer([*self.messages, message], self.sampling), ""
        try:
            for piece in answer:
                said += piece
                self._write(piece)
        except KeyboardInterrupt:
            answer.close()
            self._write(" [stopped]")
        except BaseException:
            answer.close()
            raise
        self._write("\n")
        self.attached = []
        self.answers.append(answer)
        if said.strip():  # some templates refuse an empty turn
            self.messages += [message, Message.of_text("assistant", said.strip())]
        return answer

    def summary(self) -> str:
        """Answers, speed and memory, in a line."""
        return (
            f"{len(self.answers)} answers, {sum(a.completion_tokens for a in self.answers)} tokens, "
            f"{tokens_per_second(self.answers):.1f} tokens/s; model {human_bytes(self.memory)}, "
            f"peak memory {human_bytes(peak_memory())}"
        )

    @property
    def memory(self) -> int:
        """Bytes of the model."""
        return sum(resident_bytes(self.responder.model).values())

    def _attach(self, part: Part) -> None:
        self.attached.append(part)
        self._tell(f"{part.kind} goes with the next message")

    def _recording(self) -> Part:
        self._tell("recording; Enter stops it")
        part = Part("audio", record(sys.stdin.readline, self.responder.encoder.max_seconds or MAX_SECONDS))
        _check(part, "the recording")
        return part

    def _write(self, text: str) -> None:
        self.console.print(printable(text), end="", markup=False, highlight=False, soft_wrap=True)

    def _tell(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """Speed of decoding over all answers, their first tokens left out; 0 if there are no others."""
    seconds = sum(a.decode_seconds for a in answers)
    return sum(max(a.completion_tokens - 1, 0) for a in answers) / seconds if seconds > 0 else 0.0


def typed_lines(**options: Any) -> Iterator[str]:
    """Lines as they are typed, with a history that is kept in masquant's cache folder, and completion of commands and
    paths; lines of a pipe where standard input is no terminal. Ctrl-C clears the line, Ctrl-D ends.

    Args:
        options: for prompt_toolkit's PromptSession, such as its input and output.

    Raises:
        DataError: the cache folder cannot be written.
    """
    if not sys.stdin.isatty() and not options:
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
    from prompt_toolkit.history import FileHistory

    file = cache_directory() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError as error:
        remedy = "set MASQUANT_CACHE to a folder that you may write to"
        raise DataError(f"cannot keep what is typed in {file}: {error}; {remedy}") from error
    paths = PathCompleter(expanduser=True)
    completer = NestedCompleter.from_nested_dict(
        {command: paths if command in ("/image", "/audio") else None for command in COMMANDS}
    )
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(file)), completer=completer, complete_while_typing=False, **options
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
