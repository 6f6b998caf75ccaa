"""What `inspect` says of plans and checkpoints adds up, for every family, without a weight in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_files, tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import quantize_folder
from masquant.contents import ranges_of
from masquant.description import Description, describe_checkpoint, describe_plan
from masquant.errors import RecipeError
from masquant.integrations.loading import load_any
from masquant.recipe import BudgetArgs, CompensationArgs, Recipe, SmoothingArgs


def folder_of(family: str, root: Path) -> Path:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tiny_files(family, root / "model"))
    tiny_processor(family).save_pretrained(root / "model")
    return root / "model"


def in_float(found: Description) -> int:
    return sum(entry.bytes for entry in found.skipped)


def total(found: Description, when: str) -> int:
    return sum(sizes[when] for sizes in found.bytes.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_add_up(family: str, tmp_path: Path) -> None:
    """Of the plan: before, all tensors; after, packed linears and what is skipped. Of the checkpoint: its file."""
    path = folder_of(family, tmp_path)
    recipe = Recipe.preset("rtn", "W4A8", 32)
    plan = describe_plan(path, recipe)
    tensors = {id(t): t.nbytes for t in load_any(path).state_dict(keep_vars=True).values()}
    assert total(plan, "before") == sum(tensors.values())
    assert sum(row.before for row in plan.groups) == plan.bytes["decoder linears"]["before"]
    assert sum(row.after for row in plan.groups) == plan.bytes["decoder linears"]["after"]
    assert in_float(plan) == total(plan, "after") - plan.bytes["decoder linears"]["after"]
    assert all(entry.bytes >= 0 and entry.reason for entry in plan.skipped)

    samples = masquant.load_samples(tiny_samples(family, tmp_path / "data", count=4))
    quantize_folder(path, tmp_path / "out", samples, recipe, batch_size=4)
    found = describe_checkpoint(tmp_path / "out")
    assert found.bytes == plan.bytes and found.skipped == plan.skipped
    assert [(r.group, r.blocks, r.after) for r in found.groups] == [(r.group, r.blocks, r.after) for r in plan.groups]
    assert sum(r.groups * len(r.linears) for r in found.groups) == found.memory["quantized_linears"]
    assert not any(row.patches for row in found.groups) and found.method == "rtn" and not found.notes


def test_patches_and_vectors_of_a_checkpoint(tmp_path: Path) -> None:
    path = folder_of("qwen2_5_omni", tmp_path)
    recipe = Recipe.preset(
        "masquant", "W4A8", 32, selection=None, compensation=CompensationArgs(rank=2, groups=("qkv", "down"))
    )
    samples = masquant.load_samples(tiny_samples("qwen2_5_omni", tmp_path / "data", count=4))
    report = quantize_folder(path, tmp_path / "out", samples, recipe, batch_size=4)
    plan, found = describe_plan(path, recipe), describe_checkpoint(tmp_path / "out")
    for description in (plan, found):
        patched = {row.group: dict(row.patches) for row in description.groups}
        assert patched == {"qkv": {"vision": 2, "audio": 2}, "o": {}, "gate_up": {}, "down": {"vision": 2, "audio": 2}}
    sizes = report.bytes
    stored = sizes["packed"] + sizes["smooth_scale"] + sizes["compensation"]
    assert found.bytes["decoder linears"]["after"] == stored > plan.bytes["decoder linears"]["after"]
    rotated = report.format.rotations is not None
    down = next(row for row in found.groups if row.group == "down")
    assert ("input, when the model runs" in down.rotated) == rotated
    assert {row.text_vector for row in found.groups if row.group == "qkv"} == {"folded into input_layernorm"}
    (tmp_path / "out/report.json").write_text("{")
    blind = describe_checkpoint(tmp_path / "out")
    assert "cannot be read" in blind.notes[0] and blind.method is None
    assert {row.text_vector for row in blind.groups if row.group == "qkv"} == {"not known"}


def test_what_a_plan_says(tmp_path: Path) -> None:
    path = folder_of("qwen2_5_omni", tmp_path)
    rows = {row.group: row for row in describe_plan(path, Recipe.preset("masquant", "W4A8", 32)).groups}
    assert rows["qkv"].blocks == (0, 1) and rows["qkv"].text_vector == "folded into input_layernorm"
    assert rows["down"].text_vector == "none: the input is rotated when the model runs"
    assert rows["o"].rotated == ("output, with the residual stream (folded)", "input, within heads (folded)")
    smoothed = Recipe.preset("rtn", "W4A8", 32, smoothing=SmoothingArgs("shared", groups=("qkv",)))
    rows = {row.group: row for row in describe_plan(path, smoothed).groups}
    assert rows["o"].text_vector == "none: the recipe does not smooth it" and not rows["o"].rotated
    assert rows["qkv"].own_vectors == "none" and not rows["qkv"].patches
    bought = describe_plan(path, Recipe.preset("masquant", "W4A8", 32, budget=BudgetArgs(0.05)))
    assert "bought with the byte budget" in bought.patches
    with pytest.raises(RecipeError, match="matches none of the linears"):
        describe_plan(path, Recipe.preset("rtn", ignore=("nothing",)))


def test_experts_are_one_line(tmp_path: Path) -> None:
    path = folder_of("qwen3_vl_moe", tmp_path)
    plan = describe_plan(path, Recipe.preset("rtn", "W4A8", 32))
    experts = [row for row in plan.groups if row.group == "experts.*.gate_up"]
    assert len(experts) == 1 and experts[0].groups == 4 * len(experts[0].blocks)
    kept = next(entry for entry in plan.skipped if entry.name == "mlp.gate")
    assert kept.reason == "kept by the family" and kept.bytes > 0


def test_ranges() -> None:
    assert ranges_of([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges_of([]) == ""
