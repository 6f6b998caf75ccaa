"""A model quantized from its files, a block at a time: the same bytes as quantized whole, and less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_files, tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import estimate_folder, load_processor, quantize_folder, save
from masquant.calibration.block_inputs import HiddenStates
from masquant.calibration.encoding import in_batches
from masquant.errors import CheckpointError, ModelError
from masquant.estimate import (
    batches_to_try,
    blocks_to_try,
    for_all_blocks,
    held_in_trial,
    kinds_of,
    padded_tokens,
    scaled,
)
from masquant.integrations.loading import load_any, load_streamed, meta_model
from masquant.models import decoder_blocks
from masquant.recipe import LearnedRotationArgs, Recipe, RotationArgs

CPU = torch.device("cpu")


def folder_of(family: str, folder: Path) -> Path:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tiny_files(family, folder))
    tiny_processor(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "method"),
    [*((f, "quarot") for f in FAMILIES), ("qwen2_5_omni", "masquant"), ("qwen3_vl_moe", "masquant")],
)
def test_streamed_gives_the_bytes_of_whole(family: str, method: str, tmp_path: Path) -> None:
    """Names, tensors, config and side files, with hidden states on disk and one group's statistics at a time."""
    path = folder_of(family, tmp_path / "model")
    samples = masquant.load_samples(tiny_samples(family, tmp_path / "media", count=8))
    recipe = Recipe.preset(method, "W4A8", 32)
    model = load_any(path)
    processor = load_processor(path)
    report = masquant.quantize(model, processor, samples, recipe=recipe, batch_size=4)
    save(model, processor, tmp_path / "whole", report, source=path)
    streamed = quantize_folder(path, tmp_path / "streamed", samples, recipe, batch_size=4, memory=8 * 30_000)
    assert streamed.format == report.format and streamed.bytes == report.bytes and streamed.model == report.model
    assert [block["groups"] for block in streamed.blocks] == [block["groups"] for block in report.blocks]
    names = {f.name for f in (tmp_path / "whole").iterdir()}
    assert names == {f.name for f in (tmp_path / "streamed").iterdir()}
    for name in names - {"report.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    masquant.check(tmp_path / "streamed")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["media", "model", "streamed", "whole"]


def test_a_trial_holds_back_as_many_samples_as_the_run() -> None:
    assert held_in_trial("abcdefgh", {"c", "x", "y"}) == {"c", "a", "b"}  # its own first
    assert held_in_trial("abcd", set("abcd")) == {"a", "b"}  # half of them are left to fit to
    assert held_in_trial("abcd", set()) == set()


def test_a_learned_rotation_is_streamed_too(tmp_path: Path) -> None:
    family = "qwen2_5_vl"
    path = folder_of(family, tmp_path / "model")
    samples = masquant.load_samples(tiny_samples(family, tmp_path / "media", count=4))
    recipe = Recipe.preset("quarot", "W4A8", 32, rotation=RotationArgs(learned=LearnedRotationArgs(steps=3)))
    quantize_folder(path, tmp_path / "out", samples, recipe)
    model = load_any(path)
    processor = load_processor(path)
    save(model, processor, tmp_path / "whole", masquant.quantize(model, processor, samples, recipe=recipe))
    found, wanted = (masquant.load(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_blocks_stay_on_disk_and_are_read_as_they_are(tmp_path: Path) -> None:
    path = folder_of("qwen2_5_vl", tmp_path / "model")
    blocks = load_streamed(path, dtype="auto", device=CPU)
    whole = decoder_blocks(load_any(path))
    assert len(blocks) == 2
    for index in range(2):
        assert all(t.is_meta for t in decoder_blocks(blocks.model)[index].parameters())
        found, wanted = blocks.copy(index).state_dict(), whole[index].state_dict()
        assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert not any(t.is_meta for n, t in blocks.model.state_dict().items() if ".layers." not in n)
    assert blocks.prefix(1) == "model.language_model.layers.1."


def test_what_does_not_fit_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder_of("qwen2_5_vl", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != name}, "missing"),
        ({**tensors, name: tensors[name][:5].clone()}, "shape|mismatched"),
        ({**tensors, "stray": torch.zeros(2)}, "unexpected keys, such as stray"),
    ):
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_streamed(path, dtype="auto", device=CPU)
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read a model config"):
        meta_model(path)


def test_hidden_states_beyond_their_bound_go_to_disk(tmp_path: Path) -> None:
    states = HiddenStates(memory=3 * 16, folder=tmp_path)
    for i in range(4):
        states.append(torch.full((4,), float(i)))  # 16 bytes each
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert [float(states[i][0]) for i in range(4)] == [0, 1, 2, 3]
    half = states.empty(sharing=3)
    assert half.memory == 16 and len(half) == 0
    del states
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["rtn", "masquant"])
def test_estimate_is_of_this_run(method: str, tmp_path: Path) -> None:
    family = "qwen2_5_omni"
    path = folder_of(family, tmp_path / "model")
    samples = masquant.load_samples(tiny_samples(family, tmp_path / "media", count=24))
    recipe = Recipe.preset(method, "W4A8", 32, quantize_lm_head=True)
    found = estimate_folder(path, samples, recipe, batch_size=3)
    stages = {"reading", "inputs", "head", "rotations", "blocks", "writing"}
    assert set(found.stages) == (stages if method == "rtn" else stages | {"gradients"})
    assert found.seconds == pytest.approx(sum(found.stages.values())) and 0.3 < found.share < 0.8
    report = quantize_folder(path, tmp_path / "out", samples, recipe, batch_size=3)
    assert set(report.stages) == stages | {"gradients", "losses"}
    assert report.seconds == pytest.approx(sum(report.stages.values()))
    assert found.peak_memory == pytest.approx(report.peak_memory, rel=0.25, abs=50 * 2**20)
    assert 1 / 3 < found.seconds / report.seconds < 3  # on a busy machine; what it measures is the run's own code
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert found.output == pytest.approx(written, rel=0.1, abs=20_000) and found.disk >= 2 * found.output
    assert sorted(f.name for f in tmp_path.iterdir()) == ["media", "model", "out"]


def test_only_what_sees_tokens_grows_with_them() -> None:
    assert scaled({"observe": 1.0, "advance": 2.0, "solve": 10.0}, ratio=3.0) == 3 * 3 + 10


def test_blocks_stand_for_their_kind() -> None:
    """The first block warms up and counts once; of every kind at least one is tried."""
    kinds = ["full"] * 6
    assert blocks_to_try(kinds) == 3 and blocks_to_try(kinds[:2]) == 2
    assert for_all_blocks([9.0, 2.0, 4.0], kinds) == 9 + 5 * 3
    mixed = ["linear", "linear", "linear", "full", "linear", "full"]
    assert blocks_to_try(mixed) == 4
    assert for_all_blocks([9.0, 1.0, 1.0, 5.0], mixed) == 9 + 1 + 1 + 5 + 1 + 5
    assert for_all_blocks([1.0, 1.0, 1.0, 7.0], mixed, special=3) == 1 + 1 + 1 + 7 + 1 + 7


def test_batches_tried_stand_for_all(tmp_path: Path) -> None:
    """They are batches that the run forms, of every kind of media, and their weights add up to all tokens."""
    samples = masquant.load_samples(tiny_samples("qwen2_5_omni", tmp_path, count=24))
    batches = in_batches(samples, 2)
    tried, weights = batches_to_try(samples, 2, mixed=True)
    assert all(batch in batches for batch in tried) and len(tried) < len(batches)
    assert [b for b in batches if b in tried] == tried
    assert in_batches([s for batch in tried for s in batch], 2) == tried  # a run on these alone forms the same
    assert {kinds_of(b) for b in tried} == {kinds_of(b) for b in batches}
    total = sum(padded_tokens(b) * w for b, w in zip(tried, weights, strict=True))
    assert total == pytest.approx(sum(map(padded_tokens, batches)))
