"""Keys and values in 8 bits: what is read back, when it is rounded, what transformers does with a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import talking_model, tiny_model, tiny_processor, tiny_samples
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

import masquant
from masquant.cache import Int8Cache, Int8Layer, cache_arguments
from masquant.calibration.encoding import SampleEncoder
from masquant.cli import app
from masquant.conversation import Message, Responder, Sampling
from masquant.errors import ModelError
from masquant.evaluation import evaluate
from masquant.evaluation.scoring import answer_logits
from masquant.models import core_of

OMNI = "qwen2_5_omni"


def states(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, tokens, 16), 5 * torch.randn(batch, 3, tokens, 16)


def step(x: Tensor) -> Tensor:
    """Distance between neighbouring integers: one scale per token and head."""
    return x.abs().amax(-1, keepdim=True) / 127


def within_half_a_step(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= 0.501 * step(wanted)).all())


@pytest.mark.parametrize("residual_length", [0, 1, 4, 128])
def test_what_is_read_is_within_half_a_step(residual_length: int) -> None:
    layer = Int8Layer(residual_length)
    pieces = [states(n) for n in (7, 1, 1, 2, 1, 5)]
    for i, (keys, values) in enumerate(pieces):
        found = layer.update(keys, values)
        for which in (0, 1):
            wanted = torch.cat([piece[which] for piece in pieces[: i + 1]], dim=-2)
            assert found[which].shape == wanted.shape and within_half_a_step(found[which], wanted)
            exact = found[which][..., -keys.shape[-2] :, :]
            assert torch.equal(exact, pieces[i][which]) is (residual_length > 0)  # the newest, unless told otherwise
        waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        assert layer.get_seq_length() == wanted.shape[-2] and waiting <= max(residual_length - 1, 0)
        assert layer.get_mask_sizes(3) == (wanted.shape[-2] + 3, 0)


def test_tokens_are_rounded_once() -> None:
    """However often others are appended, what was rounded is read back the same."""
    layer = Int8Layer(2)
    keys, values = states(4)
    layer.update(keys, values)
    first = layer.update(*states(1))[0][..., :4, :].clone()
    for _ in range(9):
        found = layer.update(*states(1))[0][..., :4, :]
    assert torch.equal(found, first)


def test_bytes_are_about_half_of_bfloat16() -> None:
    layer = Int8Layer()
    keys, values = torch.randn(1, 2, 256, 64).bfloat16(), torch.randn(1, 2, 256, 64).bfloat16()
    assert layer.nbytes == 0
    layer.update(keys, values)
    assert layer.nbytes == 2 * 2 * 256 * (64 + 4)
    assert layer.nbytes < 0.54 * (keys.nbytes + values.nbytes)
    layer.update(keys[..., :1, :], values[..., :1, :])
    assert layer.nbytes == 2 * 2 * 256 * (64 + 4) + 2 * 2 * 64 * 2  # one token waits in bfloat16


def filled(residual_length: int, tokens: tuple[int, ...] = (5, 1, 1)) -> tuple[Int8Layer, Tensor]:
    layer = Int8Layer(residual_length)
    keys = []
    for n in tokens:
        k, v = states(n)
        keys.append(k)
        layer.update(k, v)
    return layer, torch.cat(keys, dim=-2)


@pytest.mark.parametrize("residual_length", [1, 128])
@pytest.mark.parametrize("removed", [0, 1, 2, 3, 7, 9])
def test_crop(residual_length: int, removed: int) -> None:
    layer, keys = filled(residual_length)
    layer.crop(-removed)
    left = max(7 - removed, 0)
    assert layer.get_seq_length() == left
    new = states(2)
    found = layer.update(*new)[0]
    wanted = torch.cat([keys[..., :left, :], new[0]], dim=-2)
    assert found.shape == wanted.shape and within_half_a_step(found, wanted)
    with pytest.raises(ValueError, match="negative number"):
        layer.crop(3)


@pytest.mark.parametrize("residual_length", [1, 128])
def test_reorder_repeat_and_select(residual_length: int) -> None:
    order = torch.tensor([1, 0, 1])
    for change, rows in (
        (lambda layer: layer.reorder_cache(order), order),
        (lambda layer: layer.batch_select_indices(order), order),
        (lambda layer: layer.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
    ):
        layer, keys = filled(residual_length)
        change(layer)
        new = states(1, batch=len(rows))
        assert within_half_a_step(layer.update(*new)[0], torch.cat([keys[rows], new[0]], dim=-2))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    assert torch.equal(layer.update(*(new := states(3)))[0], new[0])
    Int8Layer().reorder_cache(order)  # nothing is there yet


def prompt(text: str = "How many bridges are closed?") -> dict[str, Tensor]:
    tokenizer = tiny_processor(OMNI).tokenizer
    return dict(tokenizer([text], return_tensors="pt"))


@torch.no_grad()
def test_generate_gives_the_same_greedy_tokens() -> None:
    model: Any = talking_model(OMNI)
    options = {"max_new_tokens": 24, "do_sample": False}
    wanted = model.generate(**prompt(), **options)
    cache = cache_arguments(model, "int8")
    found = model.generate(**prompt(), **options, **cache)
    (kept,) = cache.values()
    assert torch.equal(found, wanted) and kept.get_seq_length() == wanted.shape[1] - 1
    plain = DynamicCache(config=model.config.get_text_config())
    model(**prompt(), **{next(iter(cache)): plain}, use_cache=True)
    ours = Int8Cache(model.config)
    model(**prompt(), **{next(iter(cache)): ours}, use_cache=True)
    assert ours.nbytes < 0.4 * sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)  # float32
    assert cache_arguments(model, "float") == {}


@torch.no_grad()
def test_beams_and_batches(tmp_path: Path) -> None:
    model: Any = talking_model(OMNI)
    samples = masquant.load_samples([s for s in tiny_samples(OMNI, tmp_path, count=8) if "text" not in s][:3])
    inputs = SampleEncoder(tiny_processor(OMNI)).encode(samples, with_answer=False).inputs
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        wanted = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, **cache_arguments(model, "int8")), wanted)


@torch.no_grad()
def test_evaluation_rounds_every_token(tmp_path: Path) -> None:
    model, processor = tiny_model(OMNI), tiny_processor(OMNI)
    samples = masquant.load_samples(tiny_samples(OMNI, tmp_path, count=4))
    batch = SampleEncoder(processor).encode(samples)
    plain, rounded = answer_logits(model, batch), answer_logits(model, batch, "int8")
    error = float((rounded.logits - plain.logits).norm() / plain.logits.norm())
    assert 0 < error < 0.05 and torch.equal(rounded.targets, plain.targets)
    (cache,) = cache_arguments(model, "int8", residual_length=0).values()
    assert isinstance(cache, Int8Cache) and all(layer.residual_length == 0 for layer in cache.layers)
    result = evaluate(model, processor, samples, baseline=tiny_model(OMNI), kv_cache="int8", max_new_tokens=3)
    assert sum(sample.kl or 0.0 for sample in result.samples) > 0
    same = evaluate(model, processor, samples, baseline=tiny_model(OMNI), max_new_tokens=3)
    assert sum(sample.kl or 0.0 for sample in same.samples) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("family", "named"), [("gemma3", "DynamicSlidingWindowLayer"), ("qwen3_5", "LinearAttention")]
)
def test_other_attention_is_refused(family: str, named: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ModelError, match=f"needs blocks that attend to all tokens.*{named}"):
        Int8Cache(core_of(model).config)
    with pytest.raises(ModelError, match="needs blocks that attend to all tokens"):
        Responder(model, tiny_processor(family), kv_cache="int8")


def test_a_conversation_uses_it_and_says_so() -> None:
    model, processor = talking_model(OMNI), tiny_processor(OMNI)
    told = [Message.of_text("user", "Count.")]
    responder = Responder(model, processor, kv_cache="int8")
    answer = "".join(responder.answer(told, Sampling(12, temperature=0)))
    assert responder.decoding == "decoded by transformers with an int8 KV cache"
    inputs = responder.encode(told)
    responder.close()
    options = {"max_new_tokens": 12, "do_sample": False, **cache_arguments(model, "int8")}
    wanted = core_of(model).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(wanted) != ""


def test_commands_take_it(tmp_path: Path) -> None:
    model = tmp_path / "model"
    talking_model(OMNI).save_pretrained(model)
    tiny_processor(OMNI).save_pretrained(model)
    rows = tiny_samples(OMNI, tmp_path / "data", count=2)
    rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in row.items()} for row in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runner = CliRunner()
    done = runner.invoke(
        app, ["evaluate", str(model), "--data", str(tmp_path / "data"), "--kv-cache", "int8", "--no-generate", "-q",
              "--json", str(tmp_path / "result.json")]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "result.json").read_text())["scheme"] == "float, int8 KV cache"
    done = runner.invoke(
        app, ["chat", str(model), "--prompt", "Hi", "--kv-cache", "int8", "--max-new-tokens", "4", "--device", "cpu"]
    )
    assert done.exit_code == 0 and done.output.strip()
    shown = " ".join(runner.invoke(app, ["chat", "--help"]).output.replace("│", " ").split())
    assert "--kv-cache" in shown and "generate" in shown
