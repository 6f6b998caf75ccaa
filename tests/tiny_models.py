# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the real transformers classes, with real processors and little conversations.

Nothing is downloaded. A model has 2 decoder layers of width 64; its norm weights and biases are random too, so that
an error in folding shows. One image patch is 7 pixels; in the Qwen families 2 x 2 patches are one token. Audio lasts
at most one second, which is 25 tokens.

Example:
    model, processor = tiny_model("qwen2_5_omni"), tiny_processor("qwen2_5_omni")
    samples = tiny_samples("qwen2_5_omni", tmp_path)
"""

from __future__ import annotations

import wave
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tiny_families import SAMPLING_RATE, TINY_FAMILIES, VOCAB_SIZE, TinyFamily
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["FAMILIES", "SAMPLING_RATE", "tiny_files", "tiny_media", "tiny_model", "tiny_processor", "tiny_samples"]

FAMILIES: tuple[str, ...] = tuple(TINY_FAMILIES)


def tiny_media(family: str) -> tuple[str, ...]:
    """What a family takes besides text, of `image`, `video` and `audio`."""
    return TINY_FAMILIES[family].media


def tiny_files(family: str, folder: Path) -> Path:
    """`folder`, created if missing, with what the family's models have beside config, weights and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    TINY_FAMILIES[family].write_files(folder)
    return folder


def tiny_model(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model of a family: float32, in eval mode, the same for the same seed."""
    settings = TINY_FAMILIES[family]
    model = settings.model_class(settings.model_class.config_class(**settings.config(settings.token_ids))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            one = 1 - settings.norm_offset if "language_model" in name else 1.0
            parameter.copy_(one + 0.2 * values if is_norm_weight else 0.15 * values)
    return model


def talking_model(family: str) -> hf.PreTrainedModel:
    """`tiny_model` whose generation config makes it write words of the letters a to h without end."""
    model = tiny_model(family)
    letters = {index for index, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) if c in "abcdefgh\u0120"}
    others = [token for token in range(VOCAB_SIZE) if token not in letters]
    model.generation_config.update(suppress_tokens=others, no_repeat_ngram_size=4, eos_token_id=VOCAB_SIZE)
    return model


def _tokenizer(settings: TinyFamily) -> hf.PreTrainedTokenizerFast:
    """One token per byte, plus the special tokens; a `bos_token` is put before every text."""
    tokens, ids = settings.special_tokens, settings.token_ids
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens.values()])
    if "bos_token" in tokens:
        bos = tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids["bos_token"])])
    common = {name: tokens[name] for name in ("bos_token", "eos_token", "pad_token") if name in tokens}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={k: v for k, v in tokens.items() if k.endswith("_token") and k not in common},
        padding_side="left",
        model_max_length=1024,
        chat_template=settings.chat_template,
        **common,
    )


def tiny_processor(family: str) -> hf.ProcessorMixin:
    """The family's processor: byte tokenizer, chat template, left padding, pictures of at most 56 pixels."""
    settings = TINY_FAMILIES[family]
    return settings.processor_class(
        tokenizer=_tokenizer(settings), chat_template=settings.chat_template, **settings.components()
    )


_COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
_SENTENCES = ("The bridge was closed at night.", "Seven boats left the harbour.", "She counts in whole numbers.")


def _write_image(path: Path, colour: str, random: np.random.Generator) -> str:
    """A coloured square on noise; the sides are 28 to 56 pixels."""
    height, width = random.choice([28, 42, 56], size=2)
    pixels = random.integers(0, 120, size=(height, width, 3), dtype=np.uint8)
    pixels[8:22, 8:22] = _COLOURS[colour]
    Image.fromarray(pixels).save(path)
    return str(path.resolve())


def _write_audio(path: Path, semitone: int, random: np.random.Generator) -> str:
    """A noisy tone of 0.3 to 0.9 seconds."""
    time = np.arange(int(random.uniform(0.3, 0.9) * SAMPLING_RATE)) / SAMPLING_RATE
    signal = 0.5 * np.sin(2 * np.pi * 220 * 2 ** (semitone / 12) * time) + 0.05 * random.standard_normal(time.size)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((signal.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return str(path.resolve())


_TASKS = {("image", "audio"): "spoken-question", ("image",): "picture", ("audio",): "speech"}


def tiny_samples(family: str, folder: Path, count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with all that the family takes from a file (so no video), in the toolkit's data format.

    Args:
        family: one of `FAMILIES`.
        folder: where the PNG and WAV files go; created if missing.
        count: number of samples; 4 are enough to see every mix.
        seed: for the content.

    Returns:
        `{"id", "task", "image"?, "audio"?, "prompt", "answer"}` or `{"id", "task": "text", "text"}`, with absolute
        paths.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(kind for kind in tiny_media(family) if kind != "video")
    mixes = (files, (), *((kind,) for kind in files if len(files) > 1))  # all media, none, each alone
    samples: list[dict[str, Any]] = []
    for number, media in enumerate(islice(cycle(mixes), count)):
        if not media:
            samples.append({"id": f"text-{number:04d}", "task": "text", "text": str(random.choice(_SENTENCES))})
            continue
        colour, semitone = str(random.choice(list(_COLOURS))), int(random.integers(0, 24))
        name = f"{_TASKS[media]}-{number:04d}"
        sample = {"id": name, "task": _TASKS[media], "prompt": "What is it?", "answer": f"{colour} {semitone}"}
        if "image" in media:
            sample["image"] = _write_image(folder / f"{name}.png", colour, random)
        if "audio" in media:
            sample["audio"] = _write_audio(folder / f"{name}.wav", semitone, random)
        samples.append(sample)
    return samples
