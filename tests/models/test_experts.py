# SPDX-License-Identifier: Apache-2.0
"""Experts: linear ones compute what fused ones do; statistics, routing and reports follow the tokens they see."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_processor, tiny_samples
from torch import nn

import masquant
from masquant.api import save
from masquant.calibration import statistics
from masquant.calibration.block_inputs import capture_block_inputs
from masquant.calibration.encoding import SampleEncoder
from masquant.calibration.statistics import collect_statistics
from masquant.errors import ModelError
from masquant.integrations.transformers import quantized_linears
from masquant.modality import ModalityState, ModalityTokens
from masquant.models import (
    LinearExperts,
    decoder_blocks,
    experts_in,
    family_of,
    groups_of,
    linear_of,
    linearize,
    modality_tokens_of,
)
from masquant.recipe import CompensationArgs, LearnedArgs, Recipe, RefinementArgs, SmoothingArgs

FAMILIES = ("qwen3_vl_moe", "qwen3_omni_moe")


def routing(tokens: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of every token, [tokens, k]."""
    generator = torch.Generator().manual_seed(1)
    weights, index = torch.randn(tokens, experts, generator=generator).softmax(-1).topk(k)
    return index, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_experts_equal_the_fused_ones(family: str) -> None:
    block = decoder_blocks(tiny_model(family))[1]
    fused = copy.deepcopy(block)
    experts = experts_in(linearize(block, family_of(tiny_model(family).config)))
    assert isinstance(experts, LinearExperts) and len(experts) == 4
    assert not any(p.dim() == 3 for p in block.parameters())
    x, (index, weights) = torch.randn(40, 64), routing(40, 4, 2)
    with torch.no_grad():
        wanted = fused.get_submodule("mlp.experts")(x, index, weights)
        torch.testing.assert_close(experts(x, index, weights), wanted, rtol=1e-5, atol=1e-5)
        whole = fused.get_submodule("mlp")(x[None])
        torch.testing.assert_close(block.get_submodule("mlp")(x[None]), whole, rtol=1e-5, atol=1e-5)
        experts.shown = torch.ones(4, 40, dtype=torch.bool)  # being shown more tokens changes nothing
        torch.testing.assert_close(experts(x, index, weights), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_and_its_plan_are_the_same_before_and_after(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    description = family_of(model.config)
    samples = masquant.load_samples(tiny_samples(family, tmp_path, count=4))
    inputs = next(iter(SampleEncoder(tiny_processor(family)).batches(samples, 4))).inputs
    blocks = decoder_blocks(model)
    before = [groups_of(block, description) for block in blocks]
    views = {name: linear_of(blocks[1], name).weight.clone() for g in before[1] for name in g.linears}
    with torch.no_grad():
        wanted = model(**inputs).logits
        for block in blocks:
            linearize(linearize(block, description), description)
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert [groups_of(block, description) for block in blocks] == before
    assert all(torch.equal(linear_of(blocks[1], name).weight, weight) for name, weight in views.items())


def test_other_ways_of_fusing_are_refused() -> None:
    block = decoder_blocks(tiny_model("qwen3_vl_moe"))[1]
    family = family_of(tiny_model("qwen3_vl_moe").config)
    block.get_submodule("mlp.experts").is_transposed = True  # type: ignore[assignment]
    with pytest.raises(ModelError, match="this way of fusing them is not supported"):
        linearize(block, family)


class Router(nn.Module):
    """A block of nothing but experts, with routing that is given."""

    def __init__(self, experts: nn.Module, index: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        self.experts, self.index, self.weights = experts, index, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x.flatten(0, 1), self.index, self.weights).view_as(x)


def test_statistics_are_of_the_routed_tokens_or_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a brute-force selection, with padding, a sample held back, and an expert that got no vision."""
    monkeypatch.setattr(statistics, "FEW_TOKENS", 5)
    source = linearize(decoder_blocks(tiny_model("qwen3_vl_moe"))[1], family_of(tiny_model("qwen3_vl_moe").config))
    experts = source.get_submodule("mlp.experts")
    assert isinstance(experts, LinearExperts)
    index, weights = routing(60, 4, 2)
    ids = (torch.arange(60) % 2).to(torch.uint8).view(3, 20)
    vision = (ids.flatten() == 1)[:, None]
    index = torch.where(vision & (index == 3), 0, index)  # expert 3 gets no vision
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :6] = False
    held = torch.tensor([False, False, True])
    x = torch.randn(3, 20, 64)
    block = Router(experts, index, weights)
    leaders = {f"{e}": f"experts.{e}.gate_proj" for e in range(4)}
    leaders |= {f"{e}.down": f"experts.{e}.down_proj" for e in range(4)}
    with torch.no_grad():
        found = collect_statistics(block, leaders, [(ids, mask, held)], lambda _: void(block(x)), 2)
    real, flat = mask.flatten(), x.flatten(0, 1)
    for e in range(4):
        routed = (index == e).any(-1) & real
        for m in (0, 1):
            own = routed & (ids.flatten() == m)
            seen = own if int(own[:40].sum()) >= 5 else real & (ids.flatten() == m)  # the last sample only decides
            assert int(experts.counts[e, m]) == int(own.sum())
            merged = found[f"{e}"].merged()
            assert merged.moment is not None and int(merged.counts[m]) == int(seen.sum())
            torch.testing.assert_close(
                merged.moment[m], flat[seen].double().t() @ flat[seen].double(), rtol=1e-3, atol=1e-4
            )
            hidden = experts[e].activation(experts[e].gate_proj(flat[seen])) * experts[e].up_proj(flat[seen])
            torch.testing.assert_close(found[f"{e}.down"].merged().absmax[m], hidden.abs().amax(0))
            late = seen.clone()
            late[:40] = False
            assert torch.equal(found[f"{e}"].held[m], flat[late])
    assert int(experts.counts[3, 1]) == 0
    assert experts.shown is None and experts.rows is None


def void(_: Any) -> None:
    return None


def test_ids_follow_the_tokens_of_each_expert() -> None:
    tokens = ModalityTokens((masquant.Modality.TEXT, masquant.Modality.VISION), {masquant.Modality.VISION: (7,)})
    state = ModalityState(tokens)
    ids = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.uint8)
    state.set(ids)
    with state.selected(torch.tensor([0, 2, 3]), 6):
        assert state.rows_for(torch.zeros(3, 8)).tolist() == [0, 1, 1]
        with pytest.raises(ModelError, match="cannot route"):
            state.rows_for(torch.zeros(4, 8))
    assert state.ids is ids


def test_blocks_that_get_the_last_tokens_only() -> None:
    vision = masquant.Modality.VISION
    for allowed in (False, True):
        state = ModalityState(ModalityTokens((masquant.Modality.TEXT, vision), {vision: (7,)}, allowed))
        state.set(torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.uint8))
        if not allowed:
            with pytest.raises(ModelError, match="cannot route"):
                state.rows_for(torch.zeros(2, 1, 8))
            continue
        assert state.rows_for(torch.zeros(2, 1, 8)).tolist() == [1, 0]
        assert state.rows_for(torch.zeros(2, 2, 8)).tolist() == [1, 1, 1, 0]
        with state.selected(torch.tensor([1, 3]), 4):
            assert state.rows_for(torch.zeros(2, 8)).tolist() == [1, 0]
        with pytest.raises(ModelError, match="cannot route"):
            state.rows_for(torch.zeros(1, 3, 8))


def test_report_and_checkpoint_of_experts(tmp_path: Path) -> None:
    family = "qwen3_omni_moe"
    model, processor = tiny_model(family), tiny_processor(family)
    samples = tiny_samples(family, tmp_path, count=8)
    recipe = Recipe.preset("masquant", "W4A8", 32, selection=None, compensation=CompensationArgs(rank=4))
    report = masquant.quantize(model, processor, samples, recipe=recipe, batch_size=3)
    save(model, processor, tmp_path / "out", report)
    found = json.loads((tmp_path / "out/report.json").read_text())
    total = found["calibration"]["tokens"]
    for block in found["blocks"]:
        for modality, counts in block["experts"]["tokens"].items():
            assert sum(counts) == 2 * total[modality]  # every token goes to two experts
            few = {number for number, count in enumerate(counts) if count < statistics.FEW_TOKENS}
            assert few <= set(block["experts"]["fitted_to_all_tokens"][modality])
        assert {g["group"] for g in block["groups"]} >= {"qkv", "o", "experts.0.gate_up", "experts.3.down"}
    names = quantized_linears(masquant.load(tmp_path / "out"))
    assert sum(".experts." in name for name in names) == 2 * 4 * 3
    checked = masquant.check(tmp_path / "out")
    assert checked["quantized_linears"] == len(names)


@pytest.mark.parametrize(
    "changes",
    [
        {"smoothing": SmoothingArgs(learned=LearnedArgs(steps=3))},
        {"refinement": RefinementArgs(steps=3)},
    ],
    ids=["learned", "refined"],
)
def test_what_learns_on_blocks_learns_on_experts(changes: dict[str, Any], tmp_path: Path) -> None:
    family = "qwen3_vl_moe"
    model, reference = tiny_model(family), tiny_model(family)
    samples = tiny_samples(family, tmp_path, count=8)
    recipe = Recipe.preset("masquant", "W8A8", 32, **({"selection": None, "compensation": None} | changes))
    masquant.quantize(model, tiny_processor(family), samples, recipe=recipe)
    inputs = next(iter(SampleEncoder(tiny_processor(family)).batches(masquant.load_samples(samples), 8))).inputs
    with torch.no_grad():
        a, b = model(**inputs).logits, reference(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert float((a - b)[mask].norm() / b[mask].norm()) < 0.3


def test_captured_calls_are_those_of_the_fused_model(tmp_path: Path) -> None:
    """Block by block, with linear experts and deep visual features added between blocks, the whole model's output."""
    family = "qwen3_vl_moe"
    model = tiny_model(family)
    samples = masquant.load_samples(tiny_samples(family, tmp_path, count=4))
    batch = next(iter(SampleEncoder(tiny_processor(family)).batches(samples, 4)))
    inputs = capture_block_inputs(model, [batch], modality_tokens_of(model.config))
    assert inputs.batches[0].added[1] is not None and inputs.batches[0].added[0] is None
    hidden = inputs.hidden[0]
    with torch.no_grad():
        wanted = model(**batch.inputs, output_hidden_states=True).hidden_states[-1]
        for index, block in enumerate(decoder_blocks(model)):
            block = linearize(block, family_of(model.config))
            hidden = inputs.run(block, index, 0, hidden, torch.device("cpu"))
        torch.testing.assert_close(model.get_decoder().norm(hidden), wanted, rtol=1e-4, atol=1e-4)
