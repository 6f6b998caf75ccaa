"""Encoding: what goes to the model is what the processor says, and the answer's mask is the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_processor, tiny_samples

from masquant.calibration.dataset import load_samples
from masquant.calibration.encoding import SampleEncoder
from masquant.errors import DataError


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_answer_mask_decodes_to_the_answer(family: str, tmp_path: Path) -> None:
    encoder = SampleEncoder(tiny_processor(family))
    samples = load_samples(tiny_samples(family, tmp_path, count=8))
    seen = 0
    for batch in encoder.batches(samples, 3):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        for i, sample in enumerate(batch.samples):
            seen += 1
            text = encoder.tokenizer.decode(ids[i][batch.answer_mask[i]])
            if sample.text is None:
                assert text.strip().startswith(str(sample.answer).strip())
                ending = text.strip().removeprefix(str(sample.answer).strip())
                assert len(encoder.tokenizer(ending, add_special_tokens=False)["input_ids"]) <= 1
            else:
                assert int(batch.answer_mask[i].sum()) == int(mask[i].sum()) - 1
            assert not (batch.answer_mask[i] & ~mask[i]).any()
    assert seen == len(samples)


def test_prompts_end_where_the_answer_begins_and_pad_left(family: str, tmp_path: Path) -> None:
    processor = tiny_processor(family)
    encoder = SampleEncoder(processor)
    samples = [s for s in load_samples(tiny_samples(family, tmp_path, count=8)) if s.text is None][:3]
    side = processor.tokenizer.padding_side
    prompts = encoder.encode(samples, with_answer=False)
    assert processor.tokenizer.padding_side == side
    assert not prompts.answer_mask.any()
    assert bool(prompts.inputs["attention_mask"][:, -1].all())


def test_every_output_of_the_processor_is_kept(family: str, tmp_path: Path) -> None:
    processor = tiny_processor(family)
    encoder = SampleEncoder(processor)
    (sample,) = [s for s in load_samples(tiny_samples(family, tmp_path, count=8)) if s.media][:1]
    arguments = encoder._media([sample])
    direct = processor(text=[encoder._text(sample, True)[0]], padding=True, return_tensors="pt", **arguments)
    found = encoder.encode([sample]).inputs
    assert set(found) == set(direct)
    assert all(torch.equal(found[k], direct[k]) for k in found)


def test_batches_are_deterministic_and_complete(tmp_path: Path) -> None:
    encoder = SampleEncoder(tiny_processor("qwen2_5_omni"))
    samples = load_samples(tiny_samples("qwen2_5_omni", tmp_path, count=10))
    order = [s.id for batch in encoder.batches(samples, 3) for s in batch.samples]
    assert sorted(order) == sorted(s.id for s in samples)
    assert order == [s.id for batch in encoder.batches(list(reversed(samples)), 3) for s in batch.samples]


def test_long_texts_are_cut_and_long_conversations_refused() -> None:
    encoder = SampleEncoder(tiny_processor("qwen2_5_omni"), max_tokens=10)
    batch = encoder.encode(load_samples([{"id": "1", "task": "text", "text": "a" * 50}]))
    assert int(batch.inputs["attention_mask"].sum()) == 10
    assert int(batch.answer_mask.sum()) == 9
    with pytest.raises(DataError, match="sample 2 has .* tokens, more than 10"):
        encoder.encode(load_samples([{"id": "2", "task": "t", "prompt": "b" * 50, "answer": "c"}]))


def test_media_that_a_model_cannot_take(tmp_path: Path) -> None:
    samples = load_samples([s for s in tiny_samples("qwen2_5_omni", tmp_path, count=8) if "audio" in s])
    with pytest.raises(DataError, match="has audio, which .* cannot take"):
        SampleEncoder(tiny_processor("llava")).encode(samples[:1])


def test_audio_longer_than_the_model_hears(tmp_path: Path) -> None:
    encoder = SampleEncoder(tiny_processor("qwen2_5_omni"))
    encoder.max_seconds = 0.001
    sample = next(s for s in load_samples(tiny_samples("qwen2_5_omni", tmp_path, count=8)) if s.audio)
    with pytest.raises(DataError, match="hears at most"):
        encoder.encode([sample])


def test_no_chat_template_or_tokenizer() -> None:
    processor: Any = tiny_processor("qwen2_5_omni")
    processor.chat_template = None
    processor.tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        SampleEncoder(processor).encode(load_samples([{"id": "1", "task": "t", "prompt": "p", "answer": "a"}]))
    with pytest.raises(DataError, match="has no tokenizer"):
        SampleEncoder(object())
