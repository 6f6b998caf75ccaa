# SPDX-License-Identifier: Apache-2.0
"""The tiny models behave like real ones: every modality reaches the logits, batches may be mixed."""

from __future__ import annotations

import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import SAMPLING_RATE, VIDEO_SIZE
from tiny_models import FAMILIES, tiny_files, tiny_media, tiny_model, tiny_processor, tiny_samples
from torch import Tensor
from transformers import AutoModelForMultimodalLM, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from masquant.modality import Modality
from masquant.models import core_of, modality_tokens_of

WITH_FILES = [(family, kind) for family in FAMILIES for kind in tiny_media(family) if kind != "video"]
WITH_VIDEO = [family for family in FAMILIES if "video" in tiny_media(family)]
VIDEOS_AS_IMAGES = ("smolvlm", "internvl")  # their frames have pictures' placeholders
AUDIO_SEES_PADDING = (
    "phi4_multimodal",
    "qwen3_omni_moe",
    "qwen3_omni_moe_full",
)  # so sounds of a batch change each other
WITHOUT_REPORT = ("qwen2_5_omni_full",)  # their own from_pretrained cannot say what it loaded
# This processor's own defaults beat the size of its video processor
VIDEO_OPTIONS = {name: {"videos_kwargs": {"size": VIDEO_SIZE}} for name in FAMILIES if "omni" in name}

# Sums in another order (longer rows, padding); the logits have a standard deviation of about 1
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family)


@cache
def processor_of(family: str) -> ProcessorMixin:
    return tiny_processor(family)


def read_audio(path: str) -> np.ndarray:
    with wave.open(path, "rb") as file:
        assert file.getframerate() == SAMPLING_RATE
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768


def chat(processor: ProcessorMixin, kinds: tuple[str, ...], prompt: str, answer: str) -> str:
    user = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    template = processor.chat_template or processor.tokenizer.chat_template  # some processors do not load theirs
    return processor.apply_chat_template(messages, template, tokenize=False, add_generation_prompt=False)


def encode(processor: ProcessorMixin, samples: list[dict[str, Any]]) -> BatchFeature:
    texts, images, audio = [], [], []
    for sample in samples:
        kinds = tuple(kind for kind in ("image", "audio") if kind in sample)
        texts.append(sample.get("text") or chat(processor, kinds, sample["prompt"], sample["answer"]))
        images.append([Image.open(sample["image"]).convert("RGB")] if "image" in kinds else [])
        audio += [read_audio(sample["audio"])] if "audio" in kinds else []
    given: dict[str, Any] = {"images": images} if any(images) else {}
    if audio:
        given |= {"audio": audio, "audio_kwargs": {"sampling_rate": SAMPLING_RATE}}
    return processor(text=texts, padding=True, return_tensors="pt", **given)


@torch.no_grad()
def logits_of(family: str, batch: BatchFeature) -> Tensor:
    return core_of(model_of(family))(**batch).logits


def placeholders(family: str, kind: str, batch: BatchFeature) -> Tensor:
    """Number of placeholder tokens of a kind, per row."""
    kind = "image" if kind == "video" and family in VIDEOS_AS_IMAGES else kind
    config = core_of(model_of(family)).config
    tokens = modality_tokens_of(config).token_ids[Modality.AUDIO if kind == "audio" else Modality.VISION]
    number = getattr(config, f"{kind}_token_id", None)
    return (batch["input_ids"] == (tokens[0] if number is None else number)).sum(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_runs_and_holds_every_modality(family: str, tmp_path: Path) -> None:
    samples = tiny_samples(family, tmp_path)
    batch = encode(processor_of(family), samples)
    logits = logits_of(family, batch)
    assert logits.shape[:2] == batch["input_ids"].shape
    assert torch.isfinite(logits).all()
    for kind in tiny_media(family):
        if kind == "video" and family in VIDEOS_AS_IMAGES:
            continue
        expected = torch.tensor([kind in sample for sample in samples])
        assert torch.equal(placeholders(family, kind, batch) > 0, expected), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_gives_the_same_logits_alone_and_in_a_batch(family: str, tmp_path: Path) -> None:
    samples = tiny_samples(family, tmp_path, count=4)
    if family in AUDIO_SEES_PADDING:
        samples = [s for s in samples if "audio" not in s]
    batch = encode(processor_of(family), samples)
    logits = logits_of(family, batch)
    for row, sample in enumerate(samples):
        alone = logits_of(family, encode(processor_of(family), [sample]))[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, **TOLERANCE)  # padding is on the left


@pytest.mark.parametrize(("family", "kind"), WITH_FILES)
def test_logits_follow_the_media(family: str, kind: str, tmp_path: Path) -> None:
    samples = tiny_samples(family, tmp_path, count=2)
    before = logits_of(family, encode(processor_of(family), samples))
    if kind == "image":
        Image.open(samples[0]["image"]).rotate(180).save(samples[0]["image"])
    else:
        signal = read_audio(samples[0]["audio"])[::-1] * 0.5
        with wave.open(samples[0]["audio"], "wb") as file:
            file.setparams((1, 2, SAMPLING_RATE, 0, "NONE", "not compressed"))
            file.writeframes((signal * 32767).astype("<i2").tobytes())
    after = logits_of(family, encode(processor_of(family), samples))
    assert after.shape == before.shape
    assert (after[0, -1] - before[0, -1]).abs().max() > 1e-3
    assert torch.equal(after[1], before[1])


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # numpy about a processor
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_logits_follow_the_video(family: str) -> None:
    processor = processor_of(family)
    texts = [chat(processor, ("video",), "What moves?", "red"), chat(processor, (), "Hello", "Hello")]
    results = []
    for seed in (0, 1):
        frames = np.random.default_rng(seed).integers(0, 256, size=(4, 28, 28, 3), dtype=np.uint8)
        options = VIDEO_OPTIONS.get(family, {})
        batch = processor(text=texts, videos=[frames], padding=True, return_tensors="pt", **options)
        assert (placeholders(family, "video", batch) > 0).tolist() == [True, False]
        results.append(logits_of(family, batch))
    assert torch.isfinite(results[0]).all()
    assert (results[0][0, -1] - results[1][0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_starts_with_the_likeliest_token(family: str, tmp_path: Path) -> None:
    model, batch = core_of(model_of(family)), encode(processor_of(family), tiny_samples(family, tmp_path, count=4))
    likeliest = logits_of(family, batch)[:, -1].argmax(dim=-1)
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    new = tokens[:, batch["input_ids"].shape[1] :]
    assert new.shape == (4, 3)
    assert torch.equal(new[:, 0], likeliest)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    folder, samples = tiny_files(family, tmp_path / "model"), tiny_samples(family, tmp_path / "data", count=4)
    model_of(family).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    if family in WITHOUT_REPORT:
        loaded = AutoModelForMultimodalLM.from_pretrained(folder)
    else:
        loaded, report = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(loaded) is type(model_of(family))
    batch = encode(processor_of(family), samples)
    again = encode(AutoProcessor.from_pretrained(folder), samples)
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(core_of(loaded)(**again).logits, logits_of(family, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_reproducible_and_none_is_trivial(family: str) -> None:
    again, other = tiny_model(family).state_dict(), tiny_model(family, seed=1).state_dict()
    for name, parameter in model_of(family).named_parameters():
        assert parameter.dtype == torch.float32 and (parameter.numel() == 1 or parameter.std() > 0.05), name
        assert torch.equal(parameter, again[name]) and not torch.equal(parameter, other[name]), name
    model = core_of(model_of(family))
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert len(model.get_decoder().layers) == model.get_decoder().config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_reproducible_and_show_every_mix(family: str, tmp_path: Path) -> None:
    samples = tiny_samples(family, tmp_path)
    assert samples == tiny_samples(family, tmp_path)
    assert len({sample["id"] for sample in samples}) == 6
    mixes = {tuple(kind for kind in ("image", "audio") if kind in sample) for sample in samples}
    files = tuple(kind for kind in tiny_media(family) if kind != "video")
    assert mixes == {files, (), *((kind,) for kind in files)}
    assert all(Path(sample[kind]).is_absolute() for sample in samples for kind in files if kind in sample)
