# SPDX-License-Identifier: Apache-2.0
"""Samples to model inputs, through the model's own chat template and processor. Every output of the processor is
kept: some models compute their position ids from outputs that are easily dropped, and then run wrongly in silence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .dataset import Sample
from .media import check_audio, check_image, check_video, load_audio, load_image, load_video

KINDS = ("image", "video", "audio")
_MARKER = "\ue000"  # stands for the answer while its place is looked for; a private character, in no real text


def by_length(samples: Sequence[Sample]) -> list[Sample]:
    """Samples in the order in which they form batches: by kind, then by length."""
    return sorted(samples, key=lambda s: (*_kind(s), estimated_tokens(s), s.id))


def _kind(sample: Sample) -> tuple[bool, tuple[str, ...]]:
    return sample.text is not None, sample.media


def in_batches(samples: Sequence[Sample], batch_size: int, *, mixed: bool = True) -> list[list[Sample]]:
    """Samples in batches of like kind and length; without `mixed`, none has samples of two kinds.

    Raises:
        DataError: the batch size is not positive.
    """
    if batch_size < 1:
        raise DataError(f"the batch size must be at least 1, got {batch_size}")
    ordered = by_length(samples)
    groups = [ordered] if mixed else [list(group) for _, group in groupby(ordered, _kind)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of samples, padded on the left, on CPU.

    Attributes:
        samples: in the batch's order.
        inputs: every output of the processor.
        answer_mask: bool [batch, tokens], the tokens whose likelihood counts: the answer with the end of its turn; of
            a plain text all tokens but the first. All False where the answer is left out.
    """

    samples: tuple[Sample, ...]
    inputs: dict[str, Tensor]
    answer_mask: Tensor


class SampleEncoder:
    """Encodes samples with one processor. What a processor takes is read off its parts, not off its name."""

    def __init__(self, processor: Any, *, max_tokens: int = 2048) -> None:
        """Take a processor.

        Args:
            processor: as AutoProcessor gives it.
            max_tokens: plain texts are cut to this length, longer conversations are refused.

        Raises:
            DataError: the processor has no tokenizer, or that no padding token; or `max_tokens` is below 2.
        """
        name = type(processor).__name__
        if max_tokens < 2:
            raise DataError(f"max_tokens must be at least 2, got {max_tokens}")
        self.processor, self.max_tokens = processor, max_tokens
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if self.tokenizer is None:
            raise DataError(f"{name} has no tokenizer; a multimodal processor is needed")
        if self.tokenizer.pad_token is None:
            raise DataError(
                f"the tokenizer of {name} has no padding token; set one, such as processor.tokenizer.pad_token = "
                "processor.tokenizer.eos_token"
            )
        parameters = inspect.signature(type(processor).__call__).parameters
        self.audio_keyword = "audio" if "audio" in parameters or "audios" not in parameters else "audios"
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.sampling_rate: int | None = getattr(extractor, "sampling_rate", None)
        self.max_seconds: float | None = getattr(extractor, "chunk_length", None)
        self.accepts = {
            "image": getattr(processor, "image_processor", None) is not None,
            "video": getattr(processor, "video_processor", None) is not None,
            "audio": self.sampling_rate is not None,
        }
        self.placeholders: dict[str, str] = {
            kind: token for kind in KINDS if isinstance(token := getattr(processor, f"{kind}_token", None), str)
        }
        # Models that compute positions from it get it by default in most versions; without it they go wrong in silence
        self.needs_token_types = "mm_token_type_ids" in getattr(processor, "model_input_names", ())
        first = self.tokenizer("a")["input_ids"][0]
        self.adds_bos = self.tokenizer.bos_token is not None and first == self.tokenizer.bos_token_id

    @property
    def chat_template(self) -> str | None:
        """The processor's, or its tokenizer's, which is where some processors leave it when they are loaded."""
        return getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)

    def batches(
        self, samples: Sequence[Sample], batch_size: int, *, with_answer: bool = True
    ) -> Iterator[EncodedBatch]:
        """All samples in ceil(samples / batch_size) batches of like kind and length.

        The order depends on the samples alone, not on how they are ordered. Media are decoded batch by batch.

        Raises:
            DataError: as `encode`, or `batch_size` is below 1.
        """
        for batch in in_batches(samples, batch_size):
            yield self.encode(batch, with_answer=with_answer)

    def encode(self, samples: Sequence[Sample], *, with_answer: bool = True) -> EncodedBatch:
        """One batch.

        Args:
            samples: at least one.
            with_answer: the whole conversation; otherwise up to where the model should answer. A plain text is itself
                in both cases.

        Raises:
            DataError: a medium that the model cannot take, broken media, no chat template, no answer, nothing to
                predict, or too many tokens.
        """
        if not samples:
            raise DataError("no samples: a batch needs at least one")
        for sample in samples:
            self._check(sample)
        texts = [self._text(sample, with_answer) for sample in samples]
        inputs = self._process(samples, [text for text, _ in texts])
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        self._check_tokens(samples, ids, mask)
        answers = torch.zeros_like(mask)
        if with_answer:
            for row, (sample, (_, start)) in enumerate(zip(samples, texts, strict=True)):
                count = self._answer_tokens(sample, texts[row][0], start, ids[row][mask[row]])
                answers[row, ids.shape[1] - count :] = True
        return EncodedBatch(tuple(samples), inputs, answers)

    def _check(self, sample: Sample) -> None:
        for kind in sample.media:
            self.check_kind(kind, f"sample {sample.id}")
        for field in ("prompt", "answer", "text"):
            self.check_text(getattr(sample, field) or "", f"sample {sample.id}: its {field}")

    def check_kind(self, kind: str, where: str) -> None:
        """Refuse a kind of media that the processor cannot take.

        Raises:
            DataError: naming `where`, and what it takes.
        """
        if not self.accepts[kind]:
            takes = ", ".join(k for k in KINDS if self.accepts[k]) or "text only"
            raise DataError(
                f"{where} has {kind}, which {type(self.processor).__name__} cannot take (it takes {takes})"
            )

    def check_text(self, text: str, where: str) -> None:
        """Refuse text that holds a placeholder of media.

        Raises:
            DataError: naming `where` and the placeholder.
        """
        for token in self.placeholders.values():
            if token in text:
                raise DataError(f"{where} holds {token}, which stands for media; remove it, media are put in apart")

    def _text(self, sample: Sample, with_answer: bool) -> tuple[str, int]:
        """The text that goes to the processor, and where in it the answer starts."""
        if sample.text is not None:
            return self._cut(sample), 0
        if not with_answer:
            text = self._render(sample, None)
            return text, len(text)
        answer = (sample.answer or "").strip()
        if not answer:
            raise DataError(f"sample {sample.id} has no answer, so its likelihood cannot be measured; give one")
        text = self._render(sample, answer).rstrip()  # after the end of the turn
        start = self._render(sample, _MARKER).rfind(_MARKER)
        if start < 0 or not text.startswith(answer, start):
            raise DataError(f"sample {sample.id}: the chat template does not show its answer {answer!r} as it is")
        return text, start

    def _render(self, sample: Sample, answer: str | None) -> str:
        """The conversation in the model's own format: media, prompt, answer. Without `answer` it invites one."""
        content: list[dict[str, str]] = [{"type": kind} for kind in sample.media]
        if sample.prompt:
            content.append({"type": "text", "text": sample.prompt})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.render(messages, f"sample {sample.id}", invite=answer is None)

    def render(self, messages: Sequence[Mapping[str, Any]], where: str, *, invite: bool) -> str:
        """A conversation as the model's chat template writes it, for a tokenizer that may add a first token itself.

        Args:
            messages: mappings with `role` and `content`, a list of parts such as {"type": "image"}.
            where: what to call the conversation in an error.
            invite: end where the model should answer.

        Raises:
            DataError: there is no template, or it refuses the conversation.
        """
        own = getattr(self.processor, "chat_template", None) is not None
        if self.chat_template is None:
            raise DataError(
                f"{type(self.processor).__name__} has no chat template, so conversations cannot be written in the "
                "model's format; put the model's chat_template.jinja into its folder"
            )
        try:
            text = str(
                self.processor.apply_chat_template(
                    messages, None if own else self.chat_template, tokenize=False, add_generation_prompt=invite
                )
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: the model's chat template refuses it: {error}") from error
        return text.removeprefix(self.tokenizer.bos_token) if self.adds_bos else text  # the tokenizer adds it again

    def _cut(self, sample: Sample) -> str:
        """The start of a plain text that has at most `max_tokens` tokens."""
        text = str(sample.text)
        offsets = self.tokenizer.is_fast
        encoded = self.tokenizer(text, return_offsets_mapping=offsets, verbose=False)
        if len(encoded["input_ids"]) <= self.max_tokens:
            return text
        if not offsets:
            raise DataError(
                f"sample {sample.id} has more than {self.max_tokens} tokens, and its tokenizer cannot tell where to "
                "cut; shorten the text"
            )
        end = encoded["offset_mapping"][self.max_tokens - 1][1]
        while len(self.tokenizer(text[:end])["input_ids"]) > self.max_tokens:  # a character may take several tokens
            end -= 1
        return text[:end]

    def _answer_tokens(self, sample: Sample, text: str, start: int, ids: Tensor) -> int:
        """How many of the last of `ids`, int [tokens] without padding, are measured."""
        if sample.text is not None:
            count = len(ids) - 1
        else:
            full = self.tokenizer(text, verbose=False)["input_ids"]
            before = self.tokenizer(text[:start], verbose=False)["input_ids"]
            common = next((i for i, (a, b) in enumerate(zip(full, before, strict=False)) if a != b), len(before))
            count = len(full) - common
            if ids[len(ids) - count :].tolist() != full[common:]:
                raise DataError(
                    f"sample {sample.id}: {type(self.processor).__name__} writes the answer in other tokens than its "
                    "tokenizer, so they cannot be found; is its padding on the left?"
                )
        if count < 1:
            raise DataError(f"sample {sample.id} has no token to predict; a text needs at least 2 tokens")
        return count

    def _process(self, samples: Sequence[Sample], texts: list[str]) -> dict[str, Tensor]:
        """Call the processor. An error that it raises names the sample that it is about."""
        arguments = self._media(samples)
        try:
            return self.process(texts, arguments)
        except DataError:
            raise
        except Exception as error:  # settings that are none make processors raise nearly anything
            for sample, text in zip(samples, texts, strict=True):
                if len(samples) > 1:
                    self._process([sample], [text])
            ids = ", ".join(s.id for s in samples)
            raise DataError(
                f"sample {ids}: {type(self.processor).__name__} refuses it: {error}; change it, or leave it out; "
                "if it refuses all, its configuration is damaged"
            ) from error

    def process(self, texts: list[str], media: Mapping[str, Any]) -> dict[str, Tensor]:
        """All outputs of the processor for a batch, padded on the left.

        Args:
            texts: as the chat template writes them.
            media: the processor's arguments: `images` nested per text, `videos`, and what `sounds` gives.

        Raises:
            ValueError: from the processor, about the texts or media.
            DataError: an output is no tensor.
        """
        types = {"return_mm_token_type_ids": True} if self.needs_token_types else {}
        with self._left_padding(), _seeded():
            outputs = dict(self.processor(text=texts, padding=True, return_tensors="pt", **media, **types))
        for name, value in outputs.items():
            if not isinstance(value, Tensor):
                raise DataError(f"{type(self.processor).__name__} gives {name} as {type(value).__name__}, no tensor")
        return outputs

    def _media(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's media arguments. Images are nested per sample: flat lists change how some are tiled."""
        arguments: dict[str, Any] = {}
        if any(s.image is not None for s in samples):
            arguments["images"] = [[] if s.image is None else [load_image(s.image, f"sample {s.id}")] for s in samples]
        videos = [load_video(s.video, f"sample {s.id}") for s in samples if s.video is not None]
        if videos:
            arguments["videos"] = videos
        return arguments | self.sounds(
            [self.load_sound(s.audio, f"sample {s.id}") for s in samples if s.audio is not None]
        )

    def sounds(self, waves: Sequence[np.ndarray]) -> dict[str, Any]:
        """The processor's arguments for sounds, float32 [frames] each at its rate, in the order of the texts."""
        if not waves:
            return {}
        return {self.audio_keyword: list(waves), "audio_kwargs": {"sampling_rate": self.sampling_rate}}

    def load_sound(self, source: Any, where: str) -> np.ndarray:
        """Mono float32 [frames] at the processor's rate; no longer than what it hears, beyond which it cuts.

        Raises:
            DataError: too long for the model, or as `load_audio`.
        """
        assert self.sampling_rate is not None
        seconds = check_audio(source, where)
        if self.max_seconds is not None and seconds > self.max_seconds:
            raise DataError(
                f"{where} has {seconds:.1f} s of audio; this model hears at most {self.max_seconds:g} s, cut it"
            )
        return load_audio(source, self.sampling_rate, where)

    def _check_tokens(self, samples: Sequence[Sample], ids: Tensor, mask: Tensor) -> None:
        """Lengths are in bounds, padding is on the left, and all media got tokens."""
        name = type(self.processor).__name__
        for row, sample in enumerate(samples):
            length = int(mask[row].sum())
            if length == 0:
                raise DataError(f"sample {sample.id} has no token to predict, it is empty; leave it out")
            if not bool(mask[row, -1]):
                raise DataError(f"{name} pads on the right although the left was asked for; it cannot be used")
            if length > self.max_tokens:
                raise DataError(
                    f"sample {sample.id} has {length} tokens, more than {self.max_tokens}; shorten it or its media"
                )
            for kind in sample.media:
                shown = [kind, "image"] if kind == "video" else [kind]  # some write videos as pictures
                names = [self.placeholders[k] for k in shown if k in self.placeholders]
                tokens = torch.tensor(self.tokenizer.convert_tokens_to_ids(names), dtype=ids.dtype)
                if kind in self.placeholders and not bool(torch.isin(ids[row], tokens).any()):
                    raise DataError(
                        f"sample {sample.id}: {name} or its chat template drops the {kind}; leave it out, or use a "
                        "chat template that shows it"
                    )

    @contextmanager
    def _left_padding(self) -> Iterator[None]:
        """Padding on the left; afterwards the tokenizer is as it was, as it may be saved with the model."""
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        padding = None if backend is None else backend.padding
        try:
            yield
        finally:
            self.tokenizer.padding_side = side
            if backend is not None:
                backend.no_padding() if padding is None else backend.enable_padding(**padding)


def group_batches(
    encoder: SampleEncoder, samples: Sequence[Sample], batch_size: int, *, with_answer: bool = True
) -> tuple[int, Iterator[EncodedBatch]]:
    """Batches whose samples all have the same kinds of media, and how many there are.

    A short question about a picture in one batch with speech would mostly be padding.
    """
    parts = in_batches(samples, batch_size, mixed=False)
    return len(parts), (encoder.encode(part, with_answer=with_answer) for part in parts)


def estimated_tokens(sample: Sample) -> int:
    """About how many tokens a sample has, from its characters and the headers of its media; to sort by.

    Raises:
        DataError: missing or unreadable media.
    """
    where = f"sample {sample.id}"
    tokens = len(sample.text or sample.prompt + (sample.answer or "")) // 4
    if sample.image is not None:
        width, height = check_image(sample.image, where)
        tokens += min(width * height // 28**2, 1024)
    if sample.video is not None:
        tokens += check_video(sample.video, where) * 64
    if sample.audio is not None:
        tokens += int(check_audio(sample.audio, where) * 25)
    return tokens


@contextmanager
def _seeded() -> Iterator[None]:
    """Fixed random numbers for feature extractors that dither; the caller's generators on CPU stay as they were."""
    of_torch, of_numpy = torch.get_rng_state(), np.random.get_state()
    torch.default_generator.manual_seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
