"""Linears of encoders with 8-bit rows: what they compute, checkpoints, every family, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_files, tiny_model, tiny_processor, tiny_samples
from torch import Tensor, nn

import masquant
from masquant.api import check, quantize_folder, resident_bytes, save
from masquant.calibration.encoding import SampleEncoder
from masquant.description import describe_checkpoint
from masquant.errors import CheckpointError, DataError, RecipeError
from masquant.integrations.loading import load_any
from masquant.integrations.transformers import encoder_modules, quantized_linears
from masquant.modality import Modality
from masquant.models import core_of, family_of
from masquant.pipeline import Calibration
from masquant.plan import default_encoders, make_plan
from masquant.quantization import quantize_tokens, unpack
from masquant.recipe import Recipe
from masquant.runtime import native
from masquant.runtime.outer import OuterLinear

OMNI = "qwen2_5_omni"
BOTH = {Modality.VISION: "W8A8", Modality.AUDIO: "W8A16"}


def recipe(encoders: dict[Modality, Any], **changes: Any) -> Recipe:
    return Recipe.preset("rtn", "W4A8", 32, encoders=encoders, **changes)


def outer(in_features: int, activation_bits: int, weight: Tensor, bias: Tensor | None = None) -> OuterLinear:
    linear = OuterLinear(in_features, len(weight), bias is not None, torch.float32, None, activation_bits)
    linear.fill(weight, bias)
    return linear


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("in_features", [32, 147, 1])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_it_is_the_dequantized_linear(
    activation_bits: int, in_features: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    weight, bias, x = torch.randn(24, in_features), torch.randn(24), torch.randn(2, 5, in_features)
    linear = outer(in_features, activation_bits, weight, bias)
    step = weight.abs().amax(1, keepdim=True) / 127
    rounded = linear.dequantize()
    assert bool(((rounded - weight).abs() <= 0.5 * step + 2**-8 * weight.abs() + 1e-6).all())
    integers = unpack(linear.weight_packed, 8, in_features).double()
    if activation_bits == 8:
        q, scale = quantize_tokens(x.reshape(-1, in_features), 8)
        y = (q.double() @ integers.t()) * linear.weight_scale.double().t() * scale.double() + bias
        tolerance = 1e-6
    else:
        y = x.reshape(-1, in_features).double() @ rounded.double().t() + bias
        tolerance = 1e-6 if not kernels else 2**-14  # kernels read 16 bits as two integers of 8
    found = linear(x)
    assert found.shape == (2, 5, 24) and found.dtype == torch.float32
    scale_of = rounded.abs().sum(1) * x.abs().max() + 1
    assert bool(((found.reshape(-1, 24).double() - y).abs() <= tolerance * scale_of).all())
    assert torch.equal(linear.dequantize(), rounded)  # also read back from the kernels' layout


def inputs_of(family: str, folder: Path) -> dict[str, Tensor]:
    samples = [s for s in tiny_samples(family, folder, count=8) if "text" not in s][:4]
    return SampleEncoder(tiny_processor(family)).encode(masquant.load_samples(samples)).inputs


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return core_of(model)(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips(family: str, tmp_path: Path) -> None:
    model, processor, reference = tiny_model(family), tiny_processor(family), tiny_model(family)
    described = family_of(model.config)
    encoders = default_encoders(described)
    assert set(encoders) == set(described.modalities[1:])
    samples, inputs = tiny_samples(family, tmp_path, count=4), inputs_of(family, tmp_path / "media")
    report = masquant.quantize(model, processor, samples, recipe=recipe(encoders))
    wanted = logits(model, inputs)
    save(model, processor, tmp_path / "out", report, source=tiny_files(family, tmp_path / "float"))
    loaded = masquant.load(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), wanted)
    found = check(tmp_path / "out")
    modules = encoder_modules(loaded)
    assert found["encoder_linears"] == len(modules) == len(make_plan(reference, recipe(encoders)).encoders) > 0
    for path, module in modules.items():
        encoder, name = described.encoder_of(path) or ("", "")
        assert module.spec.activation_bits == (8 if described.encoders[encoder] is Modality.VISION else 16)
        weight = reference.get_submodule(path).weight.detach()
        assert float((module.dequantize() - weight).norm() / weight.norm()) < 0.01, name
    left = {p for p, m in loaded.named_modules() if isinstance(m, nn.Linear) and described.encoder_of(p)}
    for path in left:  # all of them are named in the report, by themselves or by the part that holds them
        name = (described.encoder_of(path) or ("", ""))[1]
        assert any(name == listed or name.startswith(f"{listed}.") for listed in report.not_quantized), name


def test_streamed_is_in_memory_and_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny_processor(OMNI)
    tiny_model(OMNI).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = load_any(tmp_path / "float")
    processor.save_pretrained(tmp_path / "float")
    samples = masquant.load_samples(tiny_samples(OMNI, tmp_path, count=4))
    chosen = recipe(BOTH)
    streamed = quantize_folder(tmp_path / "float", tmp_path / "streamed", samples, chosen)
    report = masquant.quantize(model, processor, samples, recipe=chosen)
    save(model, processor, tmp_path / "whole", report)
    assert streamed.bytes == report.bytes and streamed.not_quantized == report.not_quantized
    names = ("model.safetensors", "config.json", "recipe.yaml", "README.md")
    for name in ("config.json", "recipe.yaml"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("streamed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "visual.blocks.0.mlp.gate_proj.weight_packed" in ours and "audio_tower.proj.weight_packed" in ours
    assert Recipe.from_yaml(tmp_path / "whole" / "recipe.yaml") == chosen

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("masquant.api.write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(tmp_path / "float", tmp_path / "again", samples, chosen)
    with pytest.raises(CheckpointError, match=r"recipe.encoders.audio \(was W8A16, is None\)"):
        quantize_folder(
            tmp_path / "float", tmp_path / "again", samples, recipe({Modality.VISION: "W8A8"}), resume=True
        )
    quantize_folder(tmp_path / "float", tmp_path / "again", samples, chosen, resume=True)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_bytes_are_counted(tmp_path: Path) -> None:
    model, processor = tiny_model(OMNI), tiny_processor(OMNI)
    total = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    samples = tiny_samples(OMNI, tmp_path, count=4)
    report = masquant.quantize(model, processor, samples, recipe=recipe(BOTH, quantize_lm_head=True))
    sizes = report.bytes
    rows = [(m.out_features, m.in_features, m.bias is not None) for m in encoder_modules(model).values()]
    assert sizes["encoders_before"] == sum(4 * o * (i + b) for o, i, b in rows)
    assert sizes["encoders"] == sum(o * (4 * -(-i // 4) + 2 + 4 * b) + 16 for o, i, b in rows)
    assert sizes["kept"] + sizes["encoders_before"] + sizes["lm_head_before"] + sizes["float_before"] == total
    save(model, processor, tmp_path / "out", report)
    resident = resident_bytes(masquant.load(tmp_path / "out"))
    assert resident["encoders"] == sizes["encoders"] and resident["lm_head"] == sizes["lm_head"]
    assert sizes["kept"] - 2048 <= resident["float"] <= sizes["kept"]  # rotary frequencies that share memory
    biases = sum(m.bias.nbytes for m in quantized_linears(model).values() if m.bias is not None)
    assert (
        describe_checkpoint(tmp_path / "out").memory["packed_on_disk"] == sizes["packed"] + biases
    )  # the decoder's alone
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| linears of encoders in 8 bits |" in card and "The vision encoder's linears are W8A8" in card
    assert "visual" not in report.not_quantized and "convolutions" in report.not_quantized


def test_the_decoder_is_fitted_to_what_quantized_encoders_give(tmp_path: Path) -> None:
    """Inputs that recipes share are captured once for each setting of the encoders."""
    processor, samples = tiny_processor(OMNI), masquant.load_samples(tiny_samples(OMNI, tmp_path, count=4))
    calibration = Calibration(samples)
    packed = []
    for encoders in ({}, BOTH, {}, BOTH):
        model = tiny_model(OMNI)
        masquant.quantize(model, processor, calibration, recipe=Recipe.preset("gptq", "W4A8", 32, encoders=encoders))
        packed.append(model.state_dict()["model.language_model.layers.1.mlp.down_proj.weight_packed"])
    assert torch.equal(packed[0], packed[2]) and torch.equal(packed[1], packed[3])
    assert not torch.equal(packed[0], packed[1])
    alone = tiny_model(OMNI)
    masquant.quantize(alone, processor, samples, recipe=Recipe.preset("gptq", "W4A8", 32, encoders=BOTH))
    name = "model.language_model.layers.1.mlp.down_proj.weight_packed"
    assert torch.equal(alone.state_dict()[name], packed[1])


def test_a_model_is_as_before_when_its_samples_are_broken(tmp_path: Path) -> None:
    model = tiny_model(OMNI)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = tiny_samples(OMNI, tmp_path, count=4)
    Path(samples[0]["image"]).write_bytes(b"no picture")
    with pytest.raises(DataError):
        masquant.quantize(model, tiny_processor(OMNI), masquant.load_samples(samples), recipe=recipe(BOTH))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_ignore_applies_to_encoders(tmp_path: Path) -> None:
    model, processor = tiny_model(OMNI), tiny_processor(OMNI)
    chosen = recipe({Modality.VISION: "W8A8"}, ignore=("re:visual\\.merger\\..*",))
    report = masquant.quantize(model, processor, tiny_samples(OMNI, tmp_path, count=4), recipe=chosen)
    assert {"visual.merger.mlp.0", "visual.merger.mlp.2", "audio_tower"} <= set(report.not_quantized)
    save(model, processor, tmp_path / "out", report)
    loaded = masquant.load(tmp_path / "out")
    assert type(loaded.get_submodule("model.visual.merger.mlp.0")) is nn.Linear
    assert all(".visual.blocks." in path for path in encoder_modules(loaded))
    with pytest.raises(RecipeError, match="matches none of the linears"):
        make_plan(tiny_model(OMNI), recipe({}, ignore=("re:visual\\.merger\\..*",)))


def test_what_a_model_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match="LLaVA-1.5 has no audio encoder; take it out of the recipe's encoders"):
        make_plan(tiny_model("llava"), recipe(BOTH))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    model, processor = tiny_model(OMNI), tiny_processor(OMNI)
    report = masquant.quantize(model, processor, tiny_samples(OMNI, folder, count=4), recipe=recipe(BOTH))
    save(model, processor, folder / "out", report)
    return folder / "out"


def copied(out: Path, folder: Path, change: Any, config: Any = lambda c: None) -> Path:
    folder.mkdir(exist_ok=True)
    for file in out.iterdir():
        if file.name != "checksums.json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((out / "config.json").read_text())
    config(found["quantization_config"])
    (folder / "config.json").write_text(json.dumps(found))
    return folder


FC1 = "audio_tower.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop(FC1 + "_packed"), None, "lacks the tensor audio_tower.layers.0.fc1.weight_packed"),
        (lambda t: t.update({FC1: torch.zeros(64, 32)}), None, "has both audio_tower.layers.0.fc1.weight_packed and"),
        (lambda t: t.update({FC1 + "_scale": torch.ones(64, 1)}), None, "fc1.weight_scale has dtype torch.float32"),
        (lambda t: t.update({FC1 + "_packed": t[FC1 + "_packed"][:8]}), None, r"has shape \[8, 8\]"),
        (lambda t: t[FC1 + "_scale"].zero_(), None, "zero or not finite"),
        (lambda t: None, lambda c: c["encoders"].pop("audio_tower"), "audio_tower.*which its configuration does not"),
        (lambda t: None, lambda c: c["encoders"].update(ear="W8A8"), "has no encoder 'ear'"),
        (lambda t: None, lambda c: c["encoders"].update(visual="W2A8"), "encoders.visual: unknown scheme 'W2A8'"),
        (lambda t: None, lambda c: c.update(encoders=["visual"]), "encoders must be a mapping"),
        (lambda t: None, lambda c: c.update(decoders={}), "unknown keys decoders"),
    ],
)
def test_damage_is_named(out: Path, tmp_path: Path, change: Any, config: Any, message: str) -> None:
    folder = copied(out, tmp_path / "damaged", change, config or (lambda c: None))
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_an_undamaged_copy_is_whole(out: Path, tmp_path: Path) -> None:
    assert check(copied(out, tmp_path / "copy", lambda t: None))["encoder_linears"] > 0


def test_a_recipe_without_encoders_writes_none(tmp_path: Path) -> None:
    model, processor = tiny_model(OMNI), tiny_processor(OMNI)
    samples = tiny_samples(OMNI, tmp_path, count=4)
    report = masquant.quantize(model, processor, samples, recipe=dataclasses.replace(recipe({})))
    assert report.bytes["encoders"] == report.bytes["encoders_before"] == 0
    assert "encoders" not in report.format.to_dict() and not encoder_modules(model)
