# SPDX-License-Identifier: Apache-2.0
"""Conversations with a model: messages with pictures and sounds go in, an answer comes out while it is written.

`stream` is the one place that runs the model. It decodes in a worker thread, so that a terminal or a server can read,
and stop, what is written meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .cache import KvCache, cache_arguments
from .calibration.encoding import SampleEncoder
from .calibration.media import check_audio, check_image, load_image
from .errors import DataError
from .evaluation.scoring import projecting
from .generation import decodes_natively
from .generation import stream as native_stream
from .models import core_of

Role = Literal["system", "user", "assistant"]

# No tokenizer's tokens are this long on average; a longer text is refused before it is tokenized
_CHARACTERS_PER_TOKEN = 16
_DEFAULT_CONTEXT = 4096  # of models that do not say


@dataclass(frozen=True)
class Part:
    """A piece of a message.

    Attributes:
        kind: `text`, `image` or `audio`.
        content: a string; a picture as path, file content or PIL picture; a sound as path, file content, or mapping
            with `array` and `sampling_rate`.
    """

    kind: Literal["text", "image", "audio"]
    content: Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; only a user's has media."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def of_text(cls, role: Role, text: str) -> Message:
        """A message of words alone."""
        return cls(role, (Part("text", text),))


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; None leaves it to the model's generation config.
        top_p: sample from the likeliest tokens that have this probability together; None as for `temperature`.
        stop: the answer ends before any of these strings.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' generate."""
        if self.temperature == 0:  # sampling's settings get their defaults: transformers warns that others are ignored
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        found: dict[str, Any] = {}
        if self.temperature is not None:
            found |= {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None:
            found |= {"do_sample": True, "top_p": self.top_p}
        return found


class _Watch(StoppingCriteria):
    """Counts the tokens of an answer in progress, and stops it when asked to."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.tokens, self.last = prompt_tokens, 0, -1
        self.stop = threading.Event()
        self.started, self.first, self.latest = time.monotonic(), 0.0, 0.0

    def count(self, token: int) -> None:
        """One more token is there."""
        self.latest = time.monotonic()
        self.first = self.first or self.latest
        self.tokens, self.last = self.tokens + 1, token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        self.count(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class Answer(Iterator[str]):
    """An answer while it is written: iterate over its pieces of text. `cancel` may be called from any thread.

    Attributes:
        prompt_tokens: tokens that the model read, media included.
    """

    def __init__(
        self, watch: _Watch, streamer: TextIteratorStreamer, job: Future[Any], end: frozenset[int], stop: Sequence[str]
    ) -> None:
        self.prompt_tokens = watch.prompt_tokens
        self._watch, self._job, self._end = watch, job, end
        self._stopped_by_text = False
        self._pieces = self._until_stop(streamer, stop)

    def __next__(self) -> str:
        return next(self._pieces)

    def _until_stop(self, streamer: TextIteratorStreamer, stop: Sequence[str]) -> Iterator[str]:
        """Pieces up to the first of `stop`; what could be the start of one is held back until it is decided."""
        held = ""
        for piece in streamer:
            held += piece
            found = [position for text in stop if (position := held.find(text)) >= 0]
            if found:
                self._stopped_by_text = True
                self.close()
                held = held[: min(found)]
                break
            keep = max((n for text in stop for n in range(len(text)) if held.endswith(text[:n])), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        if held:
            yield held
        self._job.result()  # what the model raised, if it did

    def cancel(self) -> None:
        """Stop after the token in progress; returns at once."""
        self._watch.stop.set()

    def close(self) -> None:
        """Stop, and wait until the model is free. Raises nothing of what the model raised."""
        self.cancel()
        self._job.exception()

    @property
    def completion_tokens(self) -> int:
        """Tokens written so far."""
        return self._watch.tokens

    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled"]:
        """Why it ended: the model or a stop string ended it, it became too long, or somebody cancelled it."""
        if self._stopped_by_text or self._watch.last in self._end:
            return "stop"
        return "cancelled" if self._watch.stop.is_set() else "length"

    @property
    def first_token_seconds(self) -> float:
        """From the start to the first token: mostly the time to read the prompt; 0 before it."""
        return max(self._watch.first - self._watch.started, 0.0)

    @property
    def decode_seconds(self) -> float:
        """From the first token to the latest."""
        return self._watch.latest - self._watch.first

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, the first token left out; 0 below two tokens."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


def stream(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    sampling: Sampling,
    worker: Executor,
    kv_cache: KvCache = "float",
) -> Answer:
    """Decode one answer.

    Args:
        model: float or quantized.
        tokenizer: to write the tokens as text.
        inputs: all outputs of the processor for one conversation, [1, ...] each.
        sampling: how to choose tokens.
        worker: runs the model; with one thread, so that answers follow each other.
        kv_cache: the model's own, or `Int8Cache`, which transformers' generate uses and the kernels' decoder does not.
    """
    watch = _Watch(inputs["input_ids"].shape[1])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    end = _end_tokens(model, tokenizer)

    options = {**sampling.arguments(), "eos_token_id": sorted(end) or None, "pad_token_id": tokenizer.pad_token_id}

    def run() -> None:
        watch.started = time.monotonic()
        try:
            if kv_cache == "float" and decodes_natively(model):
                streamer.put(inputs["input_ids"])
                for token in native_stream(model, inputs, max_new_tokens=sampling.max_new_tokens, **options):
                    watch.count(token)
                    streamer.put(torch.tensor([token]))
                    if watch.stop.is_set():
                        break
                return
            with torch.inference_mode(), projecting(model, lambda hidden: hidden[:, -1:]):
                core_of(model).generate(
                    **{name: value.to(model.device) for name, value in inputs.items()},
                    **options,
                    **cache_arguments(model, kv_cache),
                    max_new_tokens=sampling.max_new_tokens,
                    use_cache=True,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
        finally:
            streamer.end()

    return Answer(watch, streamer, worker.submit(run), end, sampling.stop)


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation config or else by the tokenizer."""
    config: Any = core_of(model).generation_config
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())


class Responder:
    """Answers conversations with one model, one after the other.

    Attributes:
        accepts: of `image` and `audio`, what the model takes.
        max_tokens: of prompt and answer together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        max_tokens: int | None = None,
        kv_cache: KvCache = "float",
    ) -> None:
        """Take a model.

        Args:
            model: float or quantized, on its device.
            processor: its processor.
            max_tokens: bound of prompt and answer together; never more than the model's own context.
            kv_cache: see `stream`.

        Raises:
            DataError: the processor cannot be used; see `SampleEncoder`.
            ModelError: the model cannot use the cache.
        """
        cache_arguments(model, kv_cache)
        self.kv_cache: KvCache = kv_cache
        own: int = (
            getattr(core_of(model).config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_CONTEXT
        )
        self.max_tokens = min(own, max_tokens or own)
        self.model = model
        self.encoder = SampleEncoder(processor, max_tokens=self.max_tokens)
        self.accepts = tuple(kind for kind in ("image", "audio") if self.encoder.accepts[kind])
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="masquant-answer")

    def check(self, messages: Sequence[Message]) -> None:
        """Check what can be known without decoding media: roles, kinds of media, their headers, lengths.

        Raises:
            DataError: saying what is wrong where.
        """
        if not messages or messages[-1].role != "user":
            raise DataError("a conversation must end with a message of the user, which the model answers")
        characters = 0
        for number, message in enumerate(messages, 1):
            where = f"message {number}"
            if not message.parts:
                raise DataError(f"{where} is empty; give it text or media")
            for part in message.parts:
                if part.kind == "text":
                    characters += len(part.content)
                    self.encoder.check_text(part.content, where)
                    continue
                if message.role != "user":
                    raise DataError(f"{where} is the {message.role}'s and has {part.kind}; only a user's has media")
                self.encoder.check_kind(part.kind, where)
                if part.kind == "image":
                    check_image(part.content, where)
                else:
                    check_audio(part.content, where)
        if characters > self.max_tokens * _CHARACTERS_PER_TOKEN:
            raise DataError(
                f"the conversation has {characters:,} characters, more than {self.max_tokens:,} tokens hold; "
                "shorten it"
            )

    def encode(self, messages: Sequence[Message]) -> dict[str, Tensor]:
        """All outputs of the processor for a conversation that the model should go on with, [1, ...] each, on CPU.

        Raises:
            DataError: as `check`, or broken media, or a conversation that leaves no token for an answer.
        """
        self.check(messages)
        content = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": p.content} if p.kind == "text" else {"type": p.kind}
                    for p in message.parts
                ],
            }
            for message in messages
        ]
        text = self.encoder.render(content, "the conversation", invite=True)
        images, waves = self._media(messages)
        try:
            inputs = self.encoder.process(
                [text], ({"images": [images]} if images else {}) | self.encoder.sounds(waves)
            )
        except ValueError as error:
            name = type(self.encoder.processor).__name__
            raise DataError(f"{name} refuses the conversation: {error}; change it") from error
        self._check_tokens(inputs["input_ids"], images, waves)
        return inputs

    def _media(self, messages: Sequence[Message]) -> tuple[list[Any], list[np.ndarray]]:
        images, waves = [], []
        for number, message in enumerate(messages, 1):
            for part in message.parts:
                if part.kind == "image":
                    images.append(load_image(part.content, f"message {number}"))
                elif part.kind == "audio":
                    waves.append(self.encoder.load_sound(part.content, f"message {number}"))
        return images, waves

    def _check_tokens(self, ids: Tensor, images: Sequence[Any], waves: Sequence[np.ndarray]) -> None:
        if ids.shape[1] >= self.max_tokens:
            raise DataError(
                f"the conversation has {ids.shape[1]:,} tokens; fewer than {self.max_tokens:,} leave room for an "
                "answer, shorten it or its media"
            )
        for kind, media in (("image", images), ("audio", waves)):
            token = self.encoder.placeholders.get(kind)
            if media and token and not bool((ids == self.encoder.tokenizer.convert_tokens_to_ids(token)).any()):
                raise DataError(
                    f"the model's chat template drops the {kind}; leave it out, or use a template that shows it"
                )

    def answer(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Answer:
        """Start answering; the answer is written after those that were started before.

        Args:
            messages: the last one is the user's.
            sampling: how to choose tokens; the answer is shortened to what the context leaves.

        Raises:
            DataError: as `encode`.
        """
        sampling = sampling or Sampling()
        inputs = self.encode(messages)
        room = self.max_tokens - inputs["input_ids"].shape[1]
        if sampling.max_new_tokens > room:
            sampling = Sampling(room, sampling.temperature, sampling.top_p, sampling.stop)
        return stream(self.model, self.encoder.tokenizer, inputs, sampling, self._worker, self.kv_cache)

    @property
    def decoding(self) -> str:
        """How answers are decoded, for people."""
        if self.kv_cache == "int8":
            return "decoded by transformers with an int8 KV cache"
        return "decoded in masquant's kernels" if decodes_natively(self.model) else "decoded by transformers"

    def close(self) -> None:
        """End the worker thread, after the answers that were started."""
        self._worker.shutdown()
