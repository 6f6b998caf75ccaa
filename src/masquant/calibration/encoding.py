# SPDX-License-Identifier: Apache-2.0
"""Samples to model inputs, through the model's own chat template and processor. Every output of the processor is
kept: some models compute their position ids from outputs that are easily dropped, and then run wrongly in silence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .dataset import Sample
from .media import load_audio, load_image, load_video


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of samples, padded on the left, on CPU.

    Attributes:
        samples: in the batch's order.
        inputs: every output of the processor.
        answer_mask: bool [batch, tokens], the tokens whose likelihood counts: the answer with the end of its turn; of
            a plain text all tokens but the first.
    """

    samples: tuple[Sample, ...]
    inputs: dict[str, Tensor]
    answer_mask: Tensor


class SampleEncoder:
    """Encodes samples with one processor."""

    def __init__(self, processor: Any, *, max_tokens: int = 2048) -> None:
        """Take a processor.

        Args:
            processor: as AutoProcessor gives it.
            max_tokens: plain texts are cut to this length, longer conversations are refused.

        Raises:
            DataError: the processor has no tokenizer.
        """
        self.processor, self.max_tokens = processor, max_tokens
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if self.tokenizer is None:
            raise DataError(f"{type(processor).__name__} has no tokenizer; a multimodal processor is needed")
        parameters = inspect.signature(type(processor).__call__).parameters
        self.audio_keyword = "audio" if "audio" in parameters or "audios" not in parameters else "audios"
        extractor = getattr(processor, "feature_extractor", None)
        self.sampling_rate: int | None = getattr(extractor, "sampling_rate", None)
        self.max_seconds: float | None = getattr(extractor, "chunk_length", None)
        self.accepts = {
            "image": getattr(processor, "image_processor", None) is not None,
            "video": getattr(processor, "video_processor", None) is not None,
            "audio": self.sampling_rate is not None,
        }

    def batches(
        self, samples: Sequence[Sample], batch_size: int, *, with_answer: bool = True
    ) -> Iterator[EncodedBatch]:
        """All samples in batches of like kind and length; the order depends on the samples alone."""

        def order(sample: Sample) -> tuple[bool, tuple[str, ...], int, str]:
            length = len(sample.text or sample.prompt + (sample.answer or ""))
            return sample.text is not None, sample.media, length, sample.id

        ordered = sorted(samples, key=order)
        for start in range(0, len(ordered), batch_size):
            yield self.encode(ordered[start : start + batch_size], with_answer=with_answer)

    def encode(self, samples: Sequence[Sample], *, with_answer: bool = True) -> EncodedBatch:
        """One batch.

        Args:
            samples: at least one.
            with_answer: the whole conversation; otherwise up to where the model should answer.

        Raises:
            DataError: a medium that the model cannot take, broken media, no chat template, or too many tokens.
        """
        texts, counts = [], []
        for sample in samples:
            text, count = self._text(sample, with_answer)
            texts.append(text)
            counts.append(count)
        with self._left_padding():
            inputs = dict(self.processor(text=texts, padding=True, return_tensors="pt", **self._media(samples)))
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        for sample, length in zip(samples, mask.sum(1).tolist(), strict=True):
            if length > self.max_tokens and sample.text is None:
                raise DataError(
                    f"sample {sample.id} has {length} tokens, more than {self.max_tokens}; shorten it or its media"
                )
        answers = torch.zeros_like(mask)
        for i, count in enumerate(counts):
            answers[i, ids.shape[1] - count :] = count > 0
        return EncodedBatch(tuple(samples), inputs, answers & mask)

    def _text(self, sample: Sample, with_answer: bool) -> tuple[str, int]:
        """The text that goes to the processor, and how many of its last tokens count."""
        if sample.text is not None:
            encoded = self.tokenizer(sample.text, return_offsets_mapping=True)
            offsets = encoded["offset_mapping"]
            if len(offsets) > self.max_tokens:
                return sample.text[: offsets[self.max_tokens - 1][1]], self.max_tokens - 1
            return sample.text, len(offsets) - 1
        content = [{"type": kind} for kind in sample.media] + [{"type": "text", "text": sample.prompt}]
        messages = [{"role": "user", "content": content}]
        if not with_answer:
            return self._render(messages, True), 0
        assert sample.answer is not None
        messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
        full = self._render(messages, False).rstrip()
        start = full.rfind(sample.answer.strip())
        if start < 0:
            raise DataError(f"sample {sample.id}: the chat template changed its answer {sample.answer!r}")
        offsets = self.tokenizer(full, return_offsets_mapping=True)["offset_mapping"]
        return full, sum(end > start for _, end in offsets)

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except ValueError as error:
            raise DataError(
                f"{type(self.processor).__name__} has no chat template ({error}); put chat_template.jinja into the "
                "model's folder"
            ) from error

    def _media(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The processor's media arguments. Images are nested per sample: flat lists change how some are tiled."""
        for sample in samples:
            for kind in sample.media:
                if not self.accepts[kind]:
                    raise DataError(
                        f"sample {sample.id} has {kind}, which {type(self.processor).__name__} cannot take"
                    )
        arguments: dict[str, Any] = {}
        if any(s.image is not None for s in samples):
            arguments["images"] = [[] if s.image is None else [load_image(s.image, f"sample {s.id}")] for s in samples]
        videos = [load_video(s.video, f"sample {s.id}") for s in samples if s.video is not None]
        if videos:
            arguments["videos"] = videos
        audio = [self._audio(s) for s in samples if s.audio is not None]
        if audio:
            arguments[self.audio_keyword] = audio
            arguments["audio_kwargs"] = {"sampling_rate": self.sampling_rate}
        return arguments

    def _audio(self, sample: Sample) -> Any:
        assert self.sampling_rate is not None
        wave = load_audio(sample.audio, self.sampling_rate, f"sample {sample.id}")
        seconds = len(wave) / self.sampling_rate
        if self.max_seconds is not None and seconds > self.max_seconds:
            raise DataError(
                f"sample {sample.id} has {seconds:.1f} s of audio; this model hears at most {self.max_seconds} s"
            )
        return wave

    @contextmanager
    def _left_padding(self) -> Iterator[None]:
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        try:
            yield
        finally:
            self.tokenizer.padding_side = side
