"""What reports say of the float model, measured while a rotated one is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.calibration.dataset import load_samples
from masquant.calibration.encoding import SampleEncoder
from masquant.modality import modality_ids
from masquant.models import decoder_blocks, modality_tokens_of
from masquant.quantization import absmax_scale, dequantize_weight, fake_quantize_tokens, quantize_weight
from masquant.recipe import Recipe

FAMILY = "qwen2_5_omni"
LEADERS = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
MEMBERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return load_samples(tiny_samples(FAMILY, tmp_path_factory.mktemp("samples"), count=8))


@pytest.fixture(scope="module")
def float_inputs(samples: list[Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per group of the first block: its input tokens [tokens, in] in the float model, and their modality ids."""
    model, encoder = tiny_model(FAMILY), SampleEncoder(tiny_processor(FAMILY))
    tokens = modality_tokens_of(model.config)
    found: dict[str, list[torch.Tensor]] = {group: [] for group in LEADERS}
    ids, masks = [], []
    for group, name in LEADERS.items():
        decoder_blocks(model)[0].get_submodule(name).register_forward_pre_hook(
            lambda _, args, group=group: found[group].append(args[0].detach())
        )
    with torch.no_grad():
        for batch in encoder.batches(samples, 4):
            model(**batch.inputs, use_cache=False)
            ids.append(modality_ids(batch.inputs["input_ids"], tokens))
            masks.append(batch.inputs["attention_mask"].bool())
    own = torch.cat([i[m] for i, m in zip(ids, masks, strict=True)])
    return {group: (torch.cat([x[m] for x, m in zip(xs, masks, strict=True)]), own) for group, xs in found.items()}


@pytest.mark.parametrize("method", ["rtn", "quarot", "masquant-paper"])
def test_ranges_and_plain_errors_are_those_of_the_float_model(
    method: str, samples: list[Any], float_inputs: dict[str, tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    model, original = tiny_model(FAMILY), tiny_model(FAMILY)
    report = masquant.quantize(model, tiny_processor(FAMILY), samples, recipe=Recipe.preset(method, "W4A8", 32))
    for record in report.blocks[0]["groups"]:
        x, ids = float_inputs[record["group"]]
        for m, name in enumerate(("text", "vision", "audio")):
            absmax = x[ids == m].abs().amax(0)
            channels = record["ranges"]["before"]["channels"][name]
            assert channels["max"] == pytest.approx(float(absmax.max()), rel=1e-3)
            assert channels["median"] == pytest.approx(float(absmax.quantile(0.5)), rel=1e-2)
        block = decoder_blocks(original)[0]
        weight = torch.cat([block.get_submodule(n).weight.detach() for n in MEMBERS[record["group"]]])  # type: ignore
        scale = absmax_scale(weight, 4, 32)
        rounded = dequantize_weight(quantize_weight(weight, scale, 4), scale)
        for m, name in enumerate(("text", "vision", "audio")):
            own = x[ids == m][:128]  # the tokens that are kept where no sample is held back
            y = own @ weight.t()
            error = (fake_quantize_tokens(own, 8) @ rounded.t() - y).square().sum() / y.square().sum()
            assert record["plain_errors"][name] == pytest.approx(float(error), rel=2e-2), record["group"]
            if method == "rtn":
                assert record["errors"][name] == pytest.approx(float(error), rel=2e-2)


def test_smoothing_narrows_the_ranges(samples: list[Any]) -> None:
    """Own vectors divide every modality's input: what is left is flatter, and both modalities need the same."""
    report = masquant.quantize(
        tiny_model(FAMILY), tiny_processor(FAMILY), samples, recipe=Recipe.preset("masquant-paper", "W4A8", 32)
    )
    spread, aligned = [], []
    for block in report.blocks:
        for record in block["groups"]:
            before, after = (record["ranges"][state] for state in ("before", "after"))
            for name in ("vision", "audio"):
                if record["bytes"]["smooth_scale"]:
                    ratio = [s["channels"][name]["max"] / s["channels"][name]["median"] for s in (before, after)]
                    spread.append(ratio[1] < ratio[0])
                    aligned.append(after["misalignment_db"][name] > before["misalignment_db"][name])
    assert len(spread) >= 4 and sum(spread) > 0.7 * len(spread) and sum(aligned) > 0.7 * len(aligned)


def test_spectrum_is_the_whole_where_all_ranks_are_listed(samples: list[Any]) -> None:
    report = masquant.quantize(
        tiny_model(FAMILY), tiny_processor(FAMILY), samples, recipe=Recipe.preset("masquant-paper", "W4A8", 32)
    )
    found = [
        (record["spectrum"][key], rank, record["patch_bytes"][key])
        for block in report.blocks
        for record in block["groups"]
        for key, rank in record["rank"].items()
    ]
    assert found
    for shares, rank, size in found:
        assert shares == sorted(shares, reverse=True) and size > 0
        assert 0 < sum(shares[:rank]) <= 1.001
        assert sum(shares) == pytest.approx(1.0, abs=2e-3) if len(shares) < 64 else sum(shares) <= 1.001
