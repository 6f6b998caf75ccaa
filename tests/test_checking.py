"""A checkpoint is checked a tensor at a time: what is refused, and that it is never in memory as a whole."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_files, tiny_model, tiny_processor, tiny_samples
from torch import Tensor

import masquant
from masquant.api import quantize_folder, resident_bytes
from masquant.checking import check, verify_checksums
from masquant.checkpoint.shards import TensorFile
from masquant.errors import CheckpointError
from masquant.integrations.transformers import quantized_linears
from masquant.recipe import CompensationArgs, LearnedRotationArgs, Recipe, RotationArgs


def checkpoint(family: str, root: Path, recipe: Recipe) -> Path:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tiny_files(family, root / "model"))
    tiny_processor(family).save_pretrained(root / "model")
    samples = masquant.load_samples(tiny_samples(family, root / "data", count=4))
    quantize_folder(root / "model", root / "out", samples, recipe, batch_size=4)
    return root / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.preset(
        "masquant",
        "W4A8",
        32,
        selection=None,
        compensation=CompensationArgs(rank=2),
        rotation=RotationArgs(learned=LearnedRotationArgs(steps=2)),
        quantize_lm_head=True,
    )
    return checkpoint("qwen2_5_omni", tmp_path_factory.mktemp("checking"), recipe)


def changed(folder: Path, target: Path, name: str, tensor: Tensor) -> Path:
    """A copy without checksums whose first tensor with this ending is another."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "checksums.json":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    full = next(n for n in sorted(tensors) if n.endswith(name))
    assert tensors[full].shape == tensor.shape or tensor.dim() == 0
    tensors[full] = tensor.to(tensors[full].dtype).expand(tensors[full].shape).clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_says_of_every_family_what_loading_says(family: str, tmp_path: Path) -> None:
    folder = checkpoint(family, tmp_path, Recipe.preset("rtn", "W4A8", 32))
    found, loaded = check(folder), masquant.load(folder)
    assert found["quantized_linears"] == len(quantized_linears(loaded)) > 0
    sizes = resident_bytes(loaded)
    assert {name: found[name] for name in sizes} == sizes


def test_one_tensor_is_in_memory_at_a_time(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    read, names = TensorFile.read, set()

    def watched(self: TensorFile, name: str) -> Tensor:
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        names.add(name)
        return tensor

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a file was loaded as a whole")

    monkeypatch.setattr(TensorFile, "read", watched)
    monkeypatch.setattr("safetensors.torch.load_file", loads)
    check(out)
    assert names == set(TensorFile(out / "model.safetensors").entries)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_layernorm.weight", float("nan"), "input_layernorm.weight holds values that are not finite"),
        ("down_proj.weight_scale", float("inf"), "weight_scale holds values that are zero or not finite"),
        ("embed_tokens.weight_scale", 0.0, "embed_tokens.weight_scale holds values that are zero or not finite"),
        ("smooth_scale", -1.0, "smooth_scale holds values that are not positive and finite"),
        ("smooth_scale", 2.0, "row 0 .text. must be ones"),
        ("compensation.vision.b", float("nan"), "compensation.vision.b holds values that are not finite"),
        ("k_proj.bias", float("inf"), "k_proj.bias holds values that are not finite"),
        ("residual_rotation", 0.5, "is not orthogonal"),
        ("patch_embed.proj.weight", float("inf"), "patch_embed.proj.weight holds values that are not finite"),
    ],
)
def test_values_are_checked(out: Path, tmp_path: Path, name: str, value: float, message: str) -> None:
    check(out)
    with pytest.raises(CheckpointError, match=message):
        check(changed(out, tmp_path / "bad", name, torch.tensor(value)))


def test_the_index_must_be_of_the_files(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for file in out.iterdir():
        if file.name not in ("checksums.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        own = {n: t for n, t in tensors.items() if weight_map[n] == name}
        save_file(own, folder / name, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    with pytest.raises(CheckpointError, match=r"but no model\.safetensors\.index\.json"):
        check(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check(folder)
    first, second = sorted(tensors)[:2]
    for wrong, message in (
        ({**weight_map, first: names[1]}, "says that .* is in model-00002"),
        ({n: f for n, f in weight_map.items() if n != second}, "is in no file, it is in model-00002"),
        ({**weight_map, "stray": names[0]}, "stray is in model-00001.*, it is in none"),
        ({**weight_map, first: "model-00003.safetensors"}, "lacks the shard model-00003"),
        ({**weight_map, first: ["a"]}, "lacks the shard"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
        with pytest.raises(CheckpointError, match=message):
            check(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check(folder)


def test_checksums_cover_every_file_that_says_what_the_model_does(out: Path, tmp_path: Path) -> None:
    listed = json.loads((out / "checksums.json").read_text())
    rewritten = {"checksums.json", "README.md", "report.json"}
    assert set(listed) == {file.name for file in out.iterdir()} - rewritten
    for name in (*listed, *rewritten):
        folder = tmp_path / name
        folder.mkdir()
        for file in out.iterdir():
            (folder / file.name).write_bytes(file.read_bytes() + (b"\n" if file.name == name else b""))
        if name in rewritten:
            verify_checksums(folder)
            continue
        with pytest.raises(CheckpointError, match=f"{name} was changed since it was written"):
            verify_checksums(folder)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"../../etc/passwd": "x"}, "is no file of the folder"),
        ({"gone.json": "x"}, "cannot be compared"),
        ({}, "does not list config.json"),
        ([], "does not list config.json"),
        (3, "cannot be compared"),
    ],
)
def test_strange_checksums(out: Path, tmp_path: Path, listed: object, message: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "checksums.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=message):
        check(folder)
