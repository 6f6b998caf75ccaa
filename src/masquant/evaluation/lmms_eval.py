# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in lmms-eval: `lmms-eval --model masquant --model_args pretrained=OUT --tasks ...`.

lmms-eval finds `manifest` by the entry point `lmms_eval.models`. Conversations are encoded as everywhere in masquant,
with all of their pictures and sounds where the task puts them, and decoded as the task asks, greedily by default.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

from ..calibration.encoding import SampleEncoder
from ..calibration.media import load_image, load_video
from ..errors import DataError, ModelError
from ..integrations.loading import load_any
from .scoring import GREEDY, evaluating, projecting

DEFAULT_NEW_TOKENS = 1024
_ONLY_GENERATION = "lmms-eval asks models that take messages only to generate; choose a task with generate_until"


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest(model_id="masquant", chat_class_path=f"{__name__}.MasquantLmm")


class MasquantLmm(lmms):
    """A checkpoint (or any model that transformers loads) as lmms-eval's model."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        max_batch_size: int | str | None = None,
    ) -> None:
        """Load it.

        Args:
            pretrained: folder or hub id.
            device: default, a GPU if there is one; with several processes, each its own.
            batch_size: conversations that are decoded together.
            dtype: to load in.
            max_batch_size: accepted because lmms-eval passes it; the batch size is the one given.

        Raises:
            ModelError, CheckpointError: it cannot be loaded.
            DataError: the batch size is no positive number.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise DataError(f"batch_size must be a positive number, got {batch_size}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = f"cuda:{self.accelerator.local_process_index}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(own if device is None or self._world_size > 1 else device)
        self.model = load_any(pretrained, dtype=dtype).to(self.device)  # type: ignore[arg-type]
        self.encoder = SampleEncoder(AutoProcessor.from_pretrained(pretrained))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers of all requests, in their order.

        Raises:
            DataError: a medium is broken, or of a kind that the model does not take.
        """
        waiting: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            waiting.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(number)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="masquant answers") as bar:
            for numbers in waiting.values():
                for start in range(0, len(numbers), self.batch_size):
                    chunk = numbers[start : start + self.batch_size]
                    conversations = [self._messages(requests[number].args) for number in chunk]
                    settings = requests[chunk[0]].args[2]
                    answers.update(zip(chunk, self._decode(conversations, settings), strict=True))
                    bar.update(len(chunk))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval does not ask for it.

        Raises:
            ModelError: always.
        """
        raise ModelError(_ONLY_GENERATION)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"tasks of several rounds are not supported; {_ONLY_GENERATION}")

    def _messages(self, arguments: Sequence[Any]) -> list[Mapping[str, Any]]:
        """The conversation of a request: messages with `role` and `content`, a list of parts.

        Where a task has no messages of its own, media come before the text, as everywhere in masquant. lmms-eval's own
        version of that takes arrays of sound for videos.
        """
        _, doc_to_messages, _, doc_id, name, split = arguments
        doc, task = self.task_dict[name][split][doc_id], getattr(doc_to_messages, "__self__", None)
        if task is None or task.config.doc_to_messages is not None or task.config.doc_to_visual is None:
            found: list[Mapping[str, Any]] = doc_to_messages(doc)
            return found
        content = [media_part(visual) for visual in task.doc_to_visual(doc) or ()]
        return [{"role": "user", "content": [*content, {"type": "text", "text": task.doc_to_text(doc)}]}]

    def _decode(self, conversations: Sequence[list[Mapping[str, Any]]], settings: Mapping[str, Any]) -> list[str]:
        """Answers of one batch."""
        texts = [
            self.encoder.render(
                [{"role": m["role"], "content": [_plain(part) for part in m["content"]]} for m in messages],
                "the task's conversation",
                invite=True,
            )
            for messages in conversations
        ]
        try:
            inputs = self.encoder.process(texts, self._media(conversations))
        except ValueError as error:
            raise DataError(f"{type(self.encoder.processor).__name__} refuses the task's media: {error}") from error
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.inference_mode(), evaluating(self.model), projecting(self.model, lambda hidden: hidden[:, -1:]):
            output = self.model.generate(
                **inputs, **generation_settings(settings), pad_token_id=self.encoder.tokenizer.pad_token_id
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        decoded = self.encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [cut_at(text, settings.get("until") or ()).strip() for text in decoded]

    def _media(self, conversations: Sequence[list[Mapping[str, Any]]]) -> dict[str, Any]:
        """The processor's media arguments: images nested per conversation, videos and sounds in order."""
        images: list[list[Any]] = []
        videos, waves = [], []
        for messages in conversations:
            images.append([])
            for part in (part for message in messages for part in message["content"] if part["type"] != "text"):
                kind, source = part["type"], part["url"]
                source = Path(source) if isinstance(source, str) else source
                where = f"the task's {kind}"
                self.encoder.check_kind(kind, where)
                if kind == "image":
                    images[-1].append(load_image(source, where))
                elif kind == "video":
                    videos.append(load_video(source, where))
                else:
                    waves.append(self.encoder.load_sound(source, where))
        arguments: dict[str, Any] = {"images": images} if any(images) else {}
        return arguments | ({"videos": videos} if videos else {}) | self.encoder.sounds(waves)


def _plain(part: Mapping[str, Any]) -> dict[str, str]:
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}


def media_part(visual: Any) -> dict[str, Any]:
    """Part of a message for what a task's `doc_to_visual` gives: pictures, sounds, lists of frames, or paths.

    Raises:
        DataError: it is something else.
    """
    if isinstance(visual, Image.Image):
        return {"type": "image", "url": visual}
    if hasattr(visual, "get_all_samples"):  # a sound that the datasets library decodes when asked
        samples = visual.get_all_samples()
        return {"type": "audio", "url": {"array": samples.data.numpy(), "sampling_rate": samples.sample_rate}}
    if isinstance(visual, Mapping) and "array" in visual:
        return {"type": "audio", "url": {key: visual[key] for key in ("array", "sampling_rate")}}
    if isinstance(visual, Mapping) and visual.get("type") in ("image", "audio", "video") and "url" in visual:
        return {"type": visual["type"], "url": visual["url"]}
    if isinstance(visual, Sequence) and not isinstance(visual, str | bytes):
        return {"type": "video", "url": list(visual)}
    if isinstance(visual, str | Path):
        kind = (mimetypes.guess_type(visual)[0] or "").partition("/")[0]
        if kind in ("image", "audio", "video"):
            return {"type": "video" if Path(visual).suffix.lower() == ".gif" else kind, "url": str(visual)}
    raise DataError(f"the task gives {type(visual).__name__} as media; pictures, sounds and frames are supported")


def generation_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' generate for a task's `generation_kwargs`."""
    found = {**GREEDY, "max_new_tokens": int(settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS)}
    found["num_beams"] = int(settings.get("num_beams") or 1)
    temperature = float(settings.get("temperature") or 0.0)
    if temperature > 0 and settings.get("do_sample", True):
        found |= {"do_sample": True, "temperature": temperature, "top_p": float(settings.get("top_p") or 1.0)}
    return found


def cut_at(text: str, stops: str | Sequence[str]) -> str:
    """Text before the first of the strings that end an answer."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
