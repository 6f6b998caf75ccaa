"""Every family through quantize -> save -> load -> generate on tiny random models of the real classes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_files, tiny_model, tiny_processor, tiny_samples
from torch import Tensor
from transformers import PreTrainedModel

import masquant
from masquant.api import resident_bytes, save
from masquant.calibration.encoding import SampleEncoder
from masquant.errors import CheckpointError, ModelError
from masquant.integrations.loading import load_any
from masquant.integrations.transformers import quantized_linears, state_of
from masquant.modality import modality_ids
from masquant.models import core_of, decoder_blocks, family_of, groups_of, linearize
from masquant.plan import make_plan
from masquant.recipe import CompensationArgs, Recipe
from masquant.runtime import MasquantLinear, native
from masquant.runtime.packed import PackedGroup

OWN_VECTORS = {"selection": None, "compensation": CompensationArgs(rank=4)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantized tiny model, its checkpoint and a mixed batch."""

    model: PreTrainedModel
    float_model: PreTrainedModel
    folder: Path
    inputs: dict[str, Tensor]
    prompts: dict[str, Tensor]
    samples: list[Any]
    media: list[Any]
    processor: Any


def batch_for(processor: Any, samples: list[Any], *, with_answer: bool = True) -> dict[str, Tensor]:
    return SampleEncoder(processor).encode(masquant.load_samples(samples), with_answer=with_answer).inputs


def quantized(family: str, folder: Path, recipe: Recipe) -> Case:
    model, processor = tiny_model(family), tiny_processor(family)
    samples = tiny_samples(family, folder, count=8)
    media = [sample for sample in samples if "text" not in sample]
    report = masquant.quantize(model, processor, samples, recipe=recipe, batch_size=3)
    save(model, processor, folder / "out", report, source=tiny_files(family, folder / "float"))
    return Case(
        model,
        tiny_model(family),
        folder / "out",
        batch_for(processor, media[:4]),
        batch_for(processor, media[:4], with_answer=False),
        samples,
        media,
        processor,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    recipe = Recipe.preset("masquant", "W4A8", 32, **OWN_VECTORS)
    return quantized(request.param, tmp_path_factory.mktemp(request.param), recipe)


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Case:
    recipe = Recipe.preset("masquant", "W4A8", 32, **OWN_VECTORS)
    return quantized("qwen2_5_omni", tmp_path_factory.mktemp("omni"), recipe)


@pytest.mark.skipif(native.library() is None, reason="masquant was installed without kernels")
def test_every_group_runs_in_the_kernels_and_only_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to PyTorch, of experts either, and no linear repeats what the first of its group computed."""
    calls: Counter[int] = Counter()
    forward = PackedGroup.forward

    def counted(group: PackedGroup, x: Tensor, rows: Tensor | None) -> list[Tensor]:
        calls[group.handle] += 1
        return forward(group, x, rows)

    monkeypatch.setattr(PackedGroup, "forward", counted)
    monkeypatch.setattr(MasquantLinear, "_prepare", lambda *_: pytest.fail("a linear was computed in PyTorch"))
    with torch.no_grad():
        core_of(case.model)(**case.inputs, use_cache=False)
    linears = quantized_linears(case.model)
    groups = {name: linear.packed(torch.device("cpu")) for name, linear in linears.items()}
    assert all(groups.values()) and set(calls.values()) == {1}
    assert {g.handle for name, g in groups.items() if g is not None and ".experts." not in name} <= set(calls)
    planned = [
        group for block in make_plan(case.float_model, Recipe.preset("rtn", group_size=32)).blocks for group in block
    ]
    assert len(planned) == len({g.handle for g in groups.values() if g is not None})


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return core_of(model)(**inputs).logits


def test_round_trip_is_bit_exact(case: Case) -> None:
    loaded = masquant.load(case.folder)
    family, blocks = family_of(loaded.config), decoder_blocks(loaded)
    linears = sum(len(group.linears) for block in blocks for group in groups_of(block, family))
    assert len(quantized_linears(loaded)) == linears
    assert loaded.dtype == torch.float32
    ours, theirs = case.model.state_dict(), loaded.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert torch.equal(logits(case.model, case.inputs), logits(loaded, case.inputs))


def test_ids_follow_the_placeholders(case: Case) -> None:
    seen: list[Tensor] = []
    state = state_of(case.model)
    linear = next(iter(quantized_linears(case.model).values()))
    handle = linear.register_forward_pre_hook(lambda *_: seen.append(state.ids))
    try:
        logits(case.model, case.inputs)
    finally:
        handle.remove()
    assert torch.equal(seen[0], modality_ids(case.inputs["input_ids"], state.tokens))
    assert seen[0].unique().tolist() == list(range(len(state.tokens.modalities)))


def test_quantized_output_stays_near_the_float_one(case: Case) -> None:
    a, b = logits(case.model, case.inputs), logits(case.float_model, case.inputs)
    mask = case.inputs["attention_mask"].bool()
    relative = float((a - b)[mask].norm() / b[mask].norm())
    assert 1e-4 < relative < 0.6  # 4-bit weights of a random model


def test_generate_dynamic_static_batched_and_beams(case: Case) -> None:
    loaded = core_of(masquant.load(case.folder))
    options = {"max_new_tokens": 4, "do_sample": False}
    dynamic = loaded.generate(**case.prompts, **options)
    static = loaded.generate(**case.prompts, **options, cache_implementation="static")
    assert torch.equal(dynamic, static)
    raw = {"input_features", "audio_input_features", "image_pixel_values"}
    if not raw & set(case.prompts):  # transformers refuses to split media that it has not encoded yet
        assert torch.equal(loaded.generate(**case.prompts, **options, prefill_chunk_size=40), dynamic)
    beams = loaded.generate(**case.prompts, **options, num_beams=2)
    assert beams.shape[0] == dynamic.shape[0]
    one = batch_for(case.processor, case.media[:1], with_answer=False)
    alone = loaded.generate(**one, **options)
    new = alone.shape[1] - one["input_ids"].shape[1]
    assert torch.equal(alone[0, -new:], dynamic[0, case.prompts["input_ids"].shape[1] :][:new])


def test_full_rank_at_16_bits_equals_float(
    request: pytest.FixtureRequest, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights already on the grid make text exact; media tokens are exact through patches of full rank. The kernels
    keep 15 bits of the activations, PyTorch all."""
    family = request.node.callspec.params["case"]
    model, reference = on_grid(tiny_model(family)), on_grid(tiny_model(family))
    recipe = dataclasses.replace(
        Recipe.preset("rtn", "W4A16", "channel"), compensation=CompensationArgs(rank_ratio=1.0)
    )
    masquant.quantize(model, case.processor, case.samples, recipe=recipe)
    found, wanted = logits(model, case.inputs), logits(reference, case.inputs)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    monkeypatch.setattr(native, "library", lambda: None)
    model.to(model.dtype)  # back to the checkpoint's tensors
    assert all(linear.group.packed is None for linear in quantized_linears(model).values())
    torch.testing.assert_close(logits(model, case.inputs), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def on_grid(model: PreTrainedModel) -> PreTrainedModel:
    """Every decoder linear rounded to -7..7 times a power of two per row, each row reaching 7."""
    for block in decoder_blocks(model):
        for module in linearize(block, family_of(model.config)).modules():
            if isinstance(module, torch.nn.Linear):
                scale = 2.0 ** (module.weight.abs().amax(1, keepdim=True) / 7).log2().ceil()
                q = (module.weight / scale).round().clamp(-7, 7)
                q[:, 0] = 7
                module.weight.copy_(q * scale)
    return model


def test_text_only_is_the_plain_smoothed_linear(omni: Case) -> None:
    """A batch without media never calls a patch, and does not read smooth_scale."""
    inputs = {"input_ids": torch.tensor([[65, 66, 67, 68]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    before = logits(omni.model, inputs)
    changed = masquant.load(omni.folder)
    for module in quantized_linears(changed).values():
        if module.smooth_scale is not None:
            module.smooth_scale[1:] = 123.0
        for factors in module.compensation.values():
            factors.b.fill_(float("nan"))
    assert torch.equal(logits(changed, inputs), before)
    count = native.patched_tokens()
    logits(omni.model, inputs)
    assert native.patched_tokens() == count
    logits(omni.model, omni.inputs)
    media = int((modality_ids(omni.inputs["input_ids"], state_of(omni.model).tokens) != 0).sum())
    patched = sum(bool(m.compensation) and m.is_leader for m in quantized_linears(omni.model).values())
    assert 0 < native.patched_tokens() - count <= media * patched


def test_editing_media_leaves_text_rows_of_a_linear_unchanged(omni: Case) -> None:
    module = next(m for m in quantized_linears(omni.model).values() if m.smooth_scale is not None)
    state = state_of(omni.model)
    x = torch.randn(1, 6, module.in_features, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 0, 2, 1, 0]], dtype=torch.uint8)
    changed = x.clone()
    changed[ids != 0] *= 3
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    try:
        state.set(ids)
        with torch.no_grad():
            y, z = module(x), module(changed)
            state.set(ids[:, order])
            permuted = module(x[:, order])
    finally:
        state.set(None)
    assert torch.equal(y[ids == 0], z[ids == 0])
    assert not torch.equal(y[ids != 0], z[ids != 0])
    torch.testing.assert_close(permuted, y[:, order])


def test_padding_and_batching_change_nothing(omni: Case) -> None:
    """A batch of two equals two batches of one, up to float32 summation order and activations that round otherwise."""
    pair = batch_for(omni.processor, omni.media[:2])
    together = logits(omni.model, pair)
    for i in range(2):
        single = batch_for(omni.processor, omni.media[i : i + 1])
        length = single["input_ids"].shape[1]
        alone = logits(omni.model, single)[0]
        assert float((together[i, -length:] - alone).norm() / alone.norm()) < 1e-2


def test_decode_equals_the_last_row_of_prefill(omni: Case) -> None:
    """Text: one token through the cache gives the row that prefill gives, and leaves no ids behind."""
    ids = torch.arange(65, 77)[None]
    position = torch.arange(12)[None, None].expand(3, 1, 12)
    with torch.no_grad():
        whole = omni.model(input_ids=ids, position_ids=position, use_cache=False).logits
        first = omni.model(input_ids=ids[:, :11], position_ids=position[..., :11], use_cache=True)
        step = omni.model(
            input_ids=ids[:, 11:],
            position_ids=position[..., 11:],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(step.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)
    assert state_of(omni.model).ids is None


def test_chunked_prefill(omni: Case) -> None:
    options = {"max_new_tokens": 3, "do_sample": False}
    text = {"input_ids": torch.arange(65, 85)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    whole = omni.model.generate(**text, **options)
    assert torch.equal(omni.model.generate(**text, **options, prefill_chunk_size=8), whole)


def test_embeddings_without_ids_are_refused_and_routed_ones_work(omni: Case) -> None:
    ids = torch.tensor([[65, 66, 67]])
    embeddings = omni.model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        with pytest.raises(ModelError, match="inputs_embeds and no input_ids"):
            omni.model(inputs_embeds=embeddings, attention_mask=mask)
        with masquant.routed(omni.model, torch.zeros(1, 3, dtype=torch.uint8)):
            routed = omni.model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert torch.equal(routed, logits(omni.model, {"input_ids": ids, "attention_mask": mask}))


def test_training_is_refused(omni: Case) -> None:
    with pytest.raises(ValueError, match="does not support"):
        omni.model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="cannot be trained"):
        omni.model(input_ids=torch.tensor([[65, 66]]), attention_mask=torch.ones(1, 2, dtype=torch.long))


def test_sharded_and_saved_again(omni: Case, tmp_path: Path) -> None:
    loaded = masquant.load(omni.folder)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = masquant.load(tmp_path / "again")
    assert torch.equal(logits(again, omni.inputs), logits(omni.model, omni.inputs))
    ours = json.loads((omni.folder / "config.json").read_text())
    theirs = json.loads((tmp_path / "again/config.json").read_text())
    assert ours["quantization_config"] == theirs["quantization_config"]


def test_other_dtype_at_load(omni: Case) -> None:
    loaded = masquant.load(omni.folder, dtype=torch.bfloat16)
    module = next(m for m in quantized_linears(loaded).values() if m.bias is not None)
    assert module.bias is not None and module.bias.dtype == torch.bfloat16
    assert module.weight_packed.dtype == torch.int32
    a, b = logits(loaded, omni.inputs).float(), logits(omni.model, omni.inputs)
    assert float((a - b).norm() / b.norm()) < 0.1


def test_memory_is_the_packed_bytes(omni: Case) -> None:
    loaded = masquant.load(omni.folder)
    sizes = resident_bytes(loaded)
    linears = quantized_linears(loaded).values()
    wanted = sum(
        m.out_features * m.in_features // 2 + 2 * m.weight_scale.numel() + 16
        + (0 if m.bias is None else m.bias.numel() * m.bias.element_size())
        for m in linears
    )  # fmt: skip
    assert sizes["packed"] == wanted
    assert not any(isinstance(m, torch.nn.Linear) for block in decoder_blocks(loaded) for m in block.modules())


def test_torch_compile(omni: Case) -> None:
    inputs = {"input_ids": torch.arange(65, 75)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    expected = logits(omni.model, inputs)
    module = next(m for m in quantized_linears(omni.model).values() if m.smooth_scale is not None)
    x = torch.randn(1, 5, module.in_features)
    ids = torch.tensor([[0, 1, 2, 0, 1]], dtype=torch.uint8)
    state = state_of(omni.model)
    try:
        state.set(ids)
        with torch.no_grad():
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), module(x))
    finally:
        state.set(None)
    assert bool(expected.isfinite().all())


def tampered(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint with its tensors and config changed by `change(tensors, config)`."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def key(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def _drop(ending: str) -> Any:
    return lambda tensors, config: tensors.pop(key(tensors, ending))


def _set(ending: str, function: Any) -> Any:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        name = key(tensors, ending)
        tensors[name] = function(tensors[name])

    return change


def _config(name: str, value: Any) -> Any:
    return lambda tensors, config: config["quantization_config"].__setitem__(name, value)


DAMAGE = {
    "missing packed weight": (_drop("down_proj.weight_packed"), "lacks the tensor .*down_proj.weight_packed"),
    "missing scale": (_drop("o_proj.weight_scale"), "lacks the tensor .*o_proj.weight_scale"),
    "missing vector": (_drop("smooth_scale"), "lacks the tensor .*smooth_scale"),
    "missing patch": (_drop("compensation.audio.b"), "lacks the tensor .*compensation.audio.b"),
    "missing norm": (_drop("input_layernorm.weight"), "missing keys"),
    "reshaped packed weight": (_set("k_proj.weight_packed", lambda t: t[:-1].clone()), "has shape"),
    "wrong dtype": (_set("k_proj.weight_packed", lambda t: t.to(torch.int64)), "has dtype"),
    "stored shape differs": (_set("k_proj.weight_shape", lambda t: t + 1), "weight_shape says"),
    "NaN scale": (_set("up_proj.weight_scale", lambda t: t * float("nan")), "zero or not finite"),
    "zero scale": (_set("up_proj.weight_scale", torch.zeros_like), "zero or not finite"),
    "text not folded": (_set("smooth_scale", lambda t: t * 2), "row 0 .text. must be ones"),
    "infinite patch": (_set("compensation.vision.a", lambda t: t + float("inf")), "not finite"),
    "extra tensor": (
        lambda tensors, config: tensors.__setitem__(
            key(tensors, "v_proj.weight_packed").replace("weight_packed", "smooth_scale"), torch.ones(3, 64)
        ),
        "does not know",
    ),
    "float beside packed": (
        lambda tensors, config: tensors.__setitem__(
            key(tensors, "v_proj.weight_packed").replace("weight_packed", "weight"), torch.ones(32, 64)
        ),
        "both .* and a float",
    ),
    "future version": (_config("format_version", 3), "format_version 3 is unknown"),
    "unknown key": (_config("surprise", 1), "unknown keys surprise"),
    "unknown modality": (_config("modalities", ["text", "smell"]), "unknown modality 'smell'"),
    "bad site": (_config("sites", {"99.qkv": {"smooth_scale": True, "rank": {}}}), "names no quantized group"),
    "no quantization_config": (lambda tensors, config: config.pop("quantization_config"), "no masquant checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(omni: Case, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    folder = tampered(omni.folder, tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=message):
        masquant.check(folder)
    if damage != "no quantization_config":
        with pytest.raises(CheckpointError, match=message):
            masquant.load(folder)


def test_truncated_file(omni: Case, tmp_path: Path) -> None:
    folder = tampered(omni.folder, tmp_path / "bad", lambda tensors, config: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError):
        masquant.load(folder)
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        masquant.check(folder)


def test_check_of_a_good_checkpoint(omni: Case) -> None:
    found = masquant.check(omni.folder)
    assert found["scheme"] == "W4A8"
    assert found["quantized_linears"] == 14
    assert found["modalities"] == ["text", "vision", "audio"]


def test_missing_plugin_is_detected(omni: Case) -> None:
    """Without `import masquant` transformers builds a float model from a packed checkpoint, with a mere warning."""
    script = (
        "import sys, transformers; from pathlib import Path\n"
        f"model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained({str(omni.folder)!r})\n"
        "from masquant.integrations.transformers import state_of\n"
        "from masquant.errors import ModelError\n"
        "try:\n    state_of(model)\nexcept ModelError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "refused: the model has no masquant linears" in done.stdout, done.stderr


def test_auto_classes_load_it(omni: Case) -> None:
    from transformers import AutoModelForMultimodalLM

    loaded = AutoModelForMultimodalLM.from_pretrained(omni.folder)
    assert torch.equal(logits(loaded, omni.inputs), logits(omni.model, omni.inputs))
    assert load_any(omni.folder).config.quantization_config.quant_method == "masquant"
