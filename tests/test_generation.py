"""Decoding in the kernels against `generate`, on tiny models of every family that it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_processor, tiny_samples
from torch import Tensor

import masquant
from masquant.calibration.encoding import SampleEncoder
from masquant.errors import KernelError, ModelError
from masquant.generation import native_decoder, stream
from masquant.models import core_of, decoder_of
from masquant.recipe import CompensationArgs, Recipe
from masquant.runtime import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="masquant was installed without kernels")

NEW = 12


def recipe_of(**changes: Any) -> Recipe:
    # 16-bit activations: those of 8 bits round to the other side at a difference in float32's last bit
    plain = dataclasses.replace(Recipe.preset("masquant", "W4A16", 32), selection=None, compensation=None)
    return dataclasses.replace(plain, compensation=CompensationArgs(rank=3), **changes)


def quantized(family: str, folder: Path, **changes: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """A quantized tiny model and prompts of one conversation each, with and without media."""
    model, processor = tiny_model(family), tiny_processor(family)
    samples = tiny_samples(family, folder, count=8)
    masquant.quantize(model, processor, samples, recipe=recipe_of(**changes), batch_size=3)
    encoder = SampleEncoder(processor)
    loaded = [s for s in masquant.load_samples(samples) if s.text is None][:3]
    return model, [encoder.encode([sample], with_answer=False).inputs for sample in loaded]


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Tensor]]]:
    return quantized("qwen2_5_omni", tmp_path_factory.mktemp("omni"), quantize_lm_head=True)


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[int]:
    with torch.inference_mode():
        out = core_of(model).generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_generates(family: str, tmp_path: Path) -> None:
    model, prompts = quantized(family, tmp_path)
    text = {"input_ids": torch.tensor([[65, 66, 67, 68, 69]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    try:
        native_decoder(model)
    except KernelError as error:
        pytest.skip(str(error))
    for inputs in (text, *prompts):
        assert list(stream(model, inputs, max_new_tokens=NEW)) == generated(model, inputs)


def test_head_of_8_bits_and_long_prompts(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    """More tokens than one pass of the kernels takes, and a cache that grows while it is used."""
    model, _ = omni
    ids = torch.randint(1, 250, (1, 700), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        wanted = model(**inputs, use_cache=False).logits[0, -1]
        decoder = native_decoder(model)
        decoder.reset()
        with decoder.in_place():
            found = model(**inputs).logits[0, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_answers_come_one_by_one_and_follow_each_other(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, prompts = omni
    first = list(stream(model, prompts[0], max_new_tokens=NEW))
    iterator = stream(model, prompts[0], max_new_tokens=NEW)
    assert next(iterator) == first[0]
    iterator.close()  # type: ignore[attr-defined]
    assert list(stream(model, prompts[0], max_new_tokens=NEW)) == first
    assert "forward" not in vars(decoder_of(model))


def test_one_answer_at_a_time_and_changed_models(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, prompts = omni
    one = stream(model, prompts[0], max_new_tokens=NEW)
    next(one)
    next(stream(model, prompts[1], max_new_tokens=NEW))
    with pytest.raises(ModelError, match="one at a time"):
        list(one)
    before = native_decoder(model)
    decoder_of(model).layers.float()  # unpacks the linears
    assert native_decoder(model) is not before


def test_every_option_means_what_it_does_in_generate(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, prompts = omni
    for options in ({"no_repeat_ngram_size": 2}, {"suppress_tokens": list(range(100, 200))}, {"min_new_tokens": 9}):
        found = list(stream(model, prompts[1], max_new_tokens=NEW, **options))
        assert found == generated(model, prompts[1], **options), options


def test_sampling_is_repeatable_and_warped(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, prompts = omni
    options: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_p": 0.99}
    runs = [list(stream(model, prompts[0], max_new_tokens=NEW, seed=seed, **options)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    only_best = list(stream(model, prompts[0], max_new_tokens=NEW, do_sample=True, top_k=1))
    assert only_best == list(stream(model, prompts[0], max_new_tokens=NEW))


def test_repetition_penalty_equals_generates(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, prompts = omni
    found = list(stream(model, prompts[1], max_new_tokens=NEW, repetition_penalty=1.7))
    assert found == generated(model, prompts[1], repetition_penalty=1.7)


def test_decoding_touches_no_patch(omni: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, prompts = omni
    answer = stream(model, prompts[0], max_new_tokens=NEW)
    before = native.patched_tokens()
    next(answer)
    after_prompt = native.patched_tokens()
    assert after_prompt > before
    list(answer)
    assert native.patched_tokens() == after_prompt


def test_what_it_does_not_run_is_refused(omni: tuple[Any, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    model, prompts = omni
    with pytest.raises(ModelError, match="no option surprise"):
        stream(model, prompts[0], surprise=1)
    with pytest.raises(ModelError, match="num_beams must be 1"):
        stream(model, prompts[0], num_beams=4)
    two = {name: torch.cat((t, t)) for name, t in prompts[0].items() if name in ("input_ids", "attention_mask")}
    with pytest.raises(ModelError, match="one conversation at a time, got 2"):
        stream(model, two)
    with pytest.raises(KernelError, match="linears that the kernels do not run"):
        stream(tiny_model("qwen2_5_omni"), prompts[0])


def test_another_formula_is_noticed(tmp_path: Path) -> None:
    """A norm that computes something else is found by running the model beside the kernels."""
    model, _ = quantized("qwen2_5_omni", tmp_path)
    norm = decoder_of(model).layers[1].input_layernorm
    norm.register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(KernelError, match="block 1 computes something else"):
        native_decoder(model)
