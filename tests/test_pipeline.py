"""The pipeline on tiny models: reproducible, resumable, honest about what it lacks."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model, tiny_processor, tiny_samples
from transformers import PreTrainedModel

import masquant
from masquant import pipeline
from masquant.api import save
from masquant.blocks import ResidentBlocks
from masquant.calibration.block_inputs import HiddenStates, capture_block_inputs
from masquant.calibration.encoding import EncodedBatch, SampleEncoder
from masquant.calibration.statistics import GroupStatistics
from masquant.errors import CheckpointError, DataError, ModelError, RecipeError
from masquant.integrations.transformers import quantized_linears
from masquant.modality import Modality, modality_ids
from masquant.models import decoder_blocks, linear_of, modality_tokens_of
from masquant.recipe import (
    PRESETS,
    BudgetArgs,
    CompensationArgs,
    LearnedArgs,
    Recipe,
    RefinementArgs,
    RotationArgs,
    SmoothingArgs,
)

FAMILY = "qwen2_5_omni"
OWN = {"selection": None, "compensation": CompensationArgs(rank=4)}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return tiny_samples(FAMILY, tmp_path_factory.mktemp("media"), count=12)


def run(samples: Any, recipe: Recipe, **options: Any) -> tuple[PreTrainedModel, pipeline.QuantizationReport]:
    model = tiny_model(FAMILY)
    report = masquant.quantize(model, tiny_processor(FAMILY), samples, recipe=recipe, batch_size=4, **options)
    return model, report


def same_tensors(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return set(left) == set(right) and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("method", sorted(PRESETS))
@pytest.mark.parametrize("scheme", ["W4A8", "W8A8"])
def test_every_recipe_runs_and_reports(samples: Any, method: str, scheme: str) -> None:
    recipe = Recipe.preset(method, scheme, 32 if scheme == "W4A8" else None)
    if recipe.smoothing.learned:
        learned = dataclasses.replace(recipe.smoothing.learned, steps=6)
        recipe = dataclasses.replace(recipe, smoothing=dataclasses.replace(recipe.smoothing, learned=learned))
    model, report = run(samples, recipe)
    found = report.to_dict()
    json.dumps(found)
    assert [b["block"] for b in found["blocks"]] == [0, 1]
    for block in found["blocks"]:
        assert set(block["error"]) == {"text", "vision", "audio"}
        assert all(0 <= e < 1 for e in block["error"].values())
        assert [g["group"] for g in block["groups"]] == ["qkv", "o", "gate_up", "down"]
        assert block["seconds"] > 0
    assert found["bytes"]["compensation"] == sum(
        sum(t.numel() * t.element_size() for t in m.buffers()) for m in _patches(model)
    )
    assert found["calibration"]["num_samples"] == 12
    assert all(n > 0 for n in found["calibration"]["tokens"].values())


def _patches(model: PreTrainedModel) -> list[Any]:
    from masquant.runtime.linear import Compensation

    return [m for m in model.modules() if isinstance(m, Compensation)]


def test_byte_accounting_is_rank_times_features(samples: Any) -> None:
    _, report = run(samples, Recipe.preset("masquant", "W4A8", 32, **OWN))
    model = tiny_model(FAMILY)
    block = decoder_blocks(model)[0]
    for group in report.blocks[0]["groups"]:
        names = next(g for g in report_groups() if g.name == group["group"]).linears
        linears = [linear_of(block, name) for name in names]
        wanted = sum(4 * (linears[0].in_features + sum(m.out_features for m in linears)) * 2 for _ in group["rank"])
        assert group["bytes"]["compensation"] == wanted


def report_groups() -> Any:
    from masquant.models.family import LLAMA_GROUPS

    return LLAMA_GROUPS


def test_same_inputs_give_the_same_bytes(samples: Any, tmp_path: Path) -> None:
    recipe = Recipe.preset("masquant", "W4A8", 32)
    files = []
    for name in ("a", "b"):
        model, report = run(samples, recipe)
        save(model, tiny_processor(FAMILY), tmp_path / name, report)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("after", [0, 1])
def test_resume_gives_the_same_tensors(
    samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    recipe = Recipe.preset("masquant", "W4A8", 32, **OWN, rotation=RotationArgs())  # nothing is rehearsed
    whole, whole_report = run(samples, recipe)
    work = tmp_path / "out.partial"
    original = pipeline.Run.solve

    def failing(self: pipeline.Run, block: Any, index: int, groups: Any) -> Any:
        if index > after:
            raise Interrupted
        return original(self, block, index, groups)

    monkeypatch.setattr(pipeline.Run, "solve", failing)
    if after == 0:
        with pytest.raises(Interrupted):
            run(samples, recipe, work_folder=work)
    else:
        run(samples, recipe, work_folder=work)
    monkeypatch.setattr(pipeline.Run, "solve", original)
    solved: list[int] = []
    monkeypatch.setattr(pipeline.Run, "solve", lambda self, b, i, g: solved.append(i) or original(self, b, i, g))
    resumed, report = run(samples, recipe, work_folder=work, resume=True)
    assert solved == list(range(after + 1, 2))
    assert same_tensors(whole, resumed)
    assert report.format == whole_report.format
    assert [b["error"] for b in report.blocks] == [b["error"] for b in whole_report.blocks]


def test_resume_of_another_run_is_refused(samples: Any, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    run(samples, Recipe.preset("rtn", "W4A8", 32), work_folder=work)
    with pytest.raises(CheckpointError, match=r"another run; what differs: recipe.method \(was rtn, is gptq\)"):
        run(samples, Recipe.preset("gptq", "W4A8", 32), work_folder=work, resume=True)
    with pytest.raises(CheckpointError, match=r"what differs: calibration.picture-0006 \(gone\)"):
        run(samples[:6], Recipe.preset("rtn", "W4A8", 32), work_folder=work, resume=True)
    next(work.glob("block-*")).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged"):
        run(samples, Recipe.preset("rtn", "W4A8", 32), work_folder=work, resume=True)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """Same words and bytes elsewhere: the same; changed bytes under the same name: another."""
    digests = []
    for folder, colour in (("a", 10), ("b", 10), ("a", 20)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / folder / "x.png")
        row = {"id": "1", "task": "t", "prompt": "p", "answer": "a", "image": tmp_path / folder / "x.png"}
        digests.append(pipeline.sample_digest(masquant.load_samples([row])[0]))
    assert digests[0] == digests[1] != digests[2]
    for kind, first, second in (
        ("image", Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (1, 0, 0))),
        (
            "audio",
            {"array": np.zeros(3200), "sampling_rate": 16_000},
            {"array": np.ones(3200), "sampling_rate": 16_000},
        ),
        ("video", [Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 8))] * 2),
    ):
        of = [
            pipeline.sample_digest(masquant.Sample("1", "t", "p", "a", **{kind: medium}))
            for medium in (first, copy.deepcopy(first), second)
        ]
        assert of[0] == of[1] != of[2]


def test_absent_modality_is_said(samples: Any) -> None:
    without_audio = [s for s in samples if "audio" not in s]
    _, report = run(without_audio, Recipe.preset("masquant", "W4A8", 32, **OWN))
    assert any("no audio tokens" in note for note in report.notes)
    assert all("audio" not in g["rank"] for b in report.blocks for g in b["groups"])
    assert any("vision" in g["rank"] for b in report.blocks for g in b["groups"])


def test_forbidden_modality_is_refused(samples: Any) -> None:
    recipe = Recipe.preset("rtn", "W4A8", 32, modalities=(Modality.TEXT, Modality.VISION))
    with pytest.raises(RecipeError, match="has audio tokens, which the recipe's modalities .* forbid"):
        run(samples, recipe)


def test_ignored_linears_stay_float_and_exact(samples: Any) -> None:
    """An ignored member of a group keeps working behind a folded norm, ignored value rows keep their fold."""
    ignore = ("re:.*k_proj", "re:.*v_proj", "re:.*gate_proj")
    recipe = dataclasses.replace(Recipe.preset("smoothquant", "W8A8"), ignore=ignore)
    model, _ = run(samples, recipe)
    block = decoder_blocks(model)[0]
    assert isinstance(block.get_submodule("self_attn.v_proj"), torch.nn.Linear)
    inputs = SampleEncoder(tiny_processor(FAMILY)).encode(masquant.load_samples(samples[:3])).inputs
    with torch.no_grad():
        a, b = model(**inputs).logits, tiny_model(FAMILY)(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert float((a - b)[mask].norm() / b[mask].norm()) < 0.1  # 8 bits


@pytest.mark.parametrize(
    ("ignore", "message"),
    [(("layers.0.mlp.nothing",), "matches none of the linears"), (("re:.*",), "nothing to quantize")],
)
def test_useless_ignore_patterns_are_refused(samples: Any, ignore: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(samples, dataclasses.replace(Recipe.preset("rtn", "W4A8", 32), ignore=ignore))


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        run([], Recipe.preset("rtn", "W4A8", 32))


def test_values_that_are_not_finite_are_refused(samples: Any) -> None:
    model = tiny_model(FAMILY)
    with torch.no_grad():
        decoder_blocks(model)[1].get_submodule("input_layernorm").weight[0] = float("nan")
    with pytest.raises(ModelError, match="layers.1: the input of qkv holds NaN"):
        masquant.quantize(model, tiny_processor(FAMILY), samples, recipe=Recipe.preset("rtn", "W4A8", 32))


def test_quantizing_twice_is_refused(samples: Any) -> None:
    model, _ = run(samples, Recipe.preset("rtn", "W4A8", 32))
    with pytest.raises(ModelError, match="already quantized"):
        masquant.quantize(model, tiny_processor(FAMILY), samples, recipe=Recipe.preset("rtn", "W4A8", 32))


def test_unknown_family_names_the_file_to_add(samples: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    with pytest.raises(ModelError, match=r"'llama' is not supported .* src/masquant/models/llama.py"):
        masquant.quantize(model, tiny_processor(FAMILY), samples)


def test_learned_smoothing_lowers_the_loss_and_is_kept_only_then(samples: Any) -> None:
    learned = LearnedArgs(steps=12, learning_rate=0.05, patience=4)
    smoothing = SmoothingArgs("modality", learned=learned)
    recipe = dataclasses.replace(Recipe.preset("rtn", "W4A6", 32), smoothing=smoothing)
    _, report = run(samples, recipe)
    for block in report.blocks:
        assert block["learned"]["after"] <= block["learned"]["before"]
    assert any(b["learned"]["after"] < b["learned"]["before"] for b in report.blocks)
    hopeless = dataclasses.replace(
        recipe, smoothing=dataclasses.replace(smoothing, learned=LearnedArgs(steps=3, learning_rate=0.9, patience=1))
    )
    _, report = run(samples, hopeless)
    undone = [b for b in report.blocks if b["learned"]["after"] == b["learned"]["before"]]
    assert len([n for n in report.notes if "did not lower the loss" in n]) == len(undone)


def batches_of(samples: Any, size: int) -> list[EncodedBatch]:
    encoder = SampleEncoder(tiny_processor(FAMILY))
    loaded = masquant.load_samples(samples)
    return list(encoder.batches(loaded, size))


def test_replay_block_by_block_is_the_models_own_forward(samples: Any) -> None:
    """Capture without tracing: the chain of replayed blocks gives the decoder's hidden states bit by bit."""
    model = tiny_model(FAMILY)
    batches = batches_of(samples, 4)
    tokens = modality_tokens_of(model.config)
    inputs = capture_block_inputs(model, iter(batches), tokens)
    blocks = decoder_blocks(model)
    with torch.no_grad():
        for i, batch in enumerate(b.inputs for b in batches):
            hidden = inputs.hidden[i]
            for index, block in enumerate(blocks):
                hidden = inputs.run(block, index, i, hidden, torch.device("cpu"))
            wanted = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
            mask = batch["attention_mask"].bool()
            final = decoder_norm(model)(hidden)
            assert torch.equal(final[mask], wanted[-1][mask])
            assert torch.equal(inputs.batches[i].ids, modality_ids(batch["input_ids"], tokens))
            assert torch.equal(inputs.batches[i].mask, mask)
    assert all("forward" not in vars(block) for block in blocks)


def decoder_norm(model: PreTrainedModel) -> torch.nn.Module:
    from masquant.models import decoder_of

    return decoder_of(model).get_submodule("norm")


def test_capture_restores_the_blocks_after_an_error(samples: Any) -> None:
    model = tiny_model(FAMILY)
    first, *_ = batches_of(samples, 4)
    batch = first.inputs
    broken = {k: v for k, v in batch.items() if k != "input_ids"}
    with pytest.raises(DataError, match="has no input_ids"):
        capture_block_inputs(model, [dataclasses.replace(first, inputs=broken)], modality_tokens_of(model.config))
    broken = {**batch, "input_ids": torch.full_like(batch["input_ids"], 10**6)}
    with pytest.raises((IndexError, ValueError)):
        capture_block_inputs(model, [dataclasses.replace(first, inputs=broken)], modality_tokens_of(model.config))
    assert all("forward" not in vars(block) for block in decoder_blocks(model))


def test_hidden_states_spill_to_disk() -> None:
    memory, disk = HiddenStates(), HiddenStates(memory=100)
    states = [torch.randn(2, i + 1, 8) for i in range(3)]
    for state in states:
        memory.append(state)
        disk.append(state)
    disk[1] = states[1] * 2
    memory[1] = states[1] * 2
    copied = disk.copy()
    disk[0] = states[0] * 0
    assert len(disk) == len(memory) == 3
    assert torch.equal(copied[0], states[0])
    assert torch.equal(disk[1], memory[1])


def test_statistics_stream_equals_one_shot_and_skip_padding() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 16, generator=g)
    ids, held = torch.randint(0, 3, (60,), generator=g), torch.rand(60, generator=g) < 0.3
    stream, once = (GroupStatistics.empty(3, 16, torch.device("cpu")) for _ in range(2))
    for part in range(0, 60, 7):
        stream.update(x[part : part + 7], ids[part : part + 7], held[part : part + 7])
    once.update(x, ids, held)
    for m in range(3):
        own = x[ids == m]
        total = stream.merged()
        assert total.moment is not None
        torch.testing.assert_close(total.moment[m], (own.double().t() @ own.double()), rtol=1e-5, atol=1e-5)
        assert float(torch.linalg.eigvalsh(total.moment[m]).min()) >= -1e-6 * float(total.moment[m].trace())
        assert torch.equal(total.absmax[m], own.abs().amax(0))
        assert int(total.counts[m]) == len(own)
        assert torch.equal(stream.held[m], x[(ids == m) & held])
    torch.testing.assert_close(stream.fitting.moment, once.fitting.moment, rtol=1e-5, atol=1e-5)


def test_padding_does_not_reach_the_statistics(samples: Any) -> None:
    """One sample a batch (no padding) and all in one batch (much padding) give the same statistics."""
    found = []
    for size in (1, 12):
        model = tiny_model(FAMILY)
        inputs = capture_block_inputs(model, iter(batches_of(samples, size)), modality_tokens_of(model.config))
        recipe = Recipe.preset("gptq", "W4A8", 32)
        plan = masquant.plan.make_plan(model, recipe)
        state = masquant.modality.ModalityState(modality_tokens_of(model.config))
        runner = pipeline.Run(
            ResidentBlocks(model), recipe, plan, state, inputs, torch.device("cpu"), [], masquant.progress.NoProgress()
        )
        with torch.no_grad():
            statistics = runner.observe(decoder_blocks(model)[0], 0, plan.blocks[0])
        found.append({name: s.merged() for name, s in statistics.items()})
    for name in found[0]:
        assert torch.equal(found[0][name].counts, found[1][name].counts)
        torch.testing.assert_close(found[0][name].moment, found[1][name].moment, rtol=1e-4, atol=1e-3)


def test_a_budget_is_kept_and_its_grids_are_loaded_again(samples: Any, tmp_path: Path) -> None:
    """Mixed grids: no more bytes than the plain scheme, patches and vectors included, and a round trip."""
    recipe = dataclasses.replace(Recipe.preset("masquant", "W4A8", 32), budget=BudgetArgs(patches=0.02))
    model, report = run(samples, recipe)
    total = sum(report.bytes[key] for key in ("packed", "smooth_scale", "compensation"))
    plain = run(samples, Recipe.preset("gptq", "W4A8", 32))[1].bytes["packed"]
    assert 0.9 * plain < total <= plain
    grids = {(g["num_bits"], g["group_size"]) for b in report.blocks for g in b["groups"]}
    assert len(grids) > 1
    save(model, tiny_processor(FAMILY), tmp_path / "out", report)
    assert same_tensors(masquant.load(tmp_path / "out"), model)


def test_integer_factors_take_half_the_bytes_and_survive_a_round_trip(samples: Any, tmp_path: Path) -> None:
    sizes, losses = {}, {}
    batch = batches_of(samples, 4)[0].inputs
    with torch.no_grad():
        wanted = tiny_model(FAMILY)(**batch).logits
    for factors in ("bfloat16", "int8"):
        compensation = CompensationArgs(rank=8, factors=factors)  # type: ignore[arg-type]
        recipe = Recipe.preset("gptq", "W4A8", 32, compensation=compensation)
        model, report = run(samples, recipe)
        sizes[factors] = report.bytes["compensation"]
        save(model, tiny_processor(FAMILY), tmp_path / factors, report)
        again = masquant.load(tmp_path / factors)
        assert same_tensors(again, model)
        with torch.no_grad():
            losses[factors] = float((again(**batch).logits - wanted).square().mean())
    assert 0.5 * sizes["bfloat16"] < sizes["int8"] < 0.53 * sizes["bfloat16"]
    assert losses["int8"] == pytest.approx(losses["bfloat16"], rel=0.1)


def test_refinement_lowers_the_loss_on_samples_that_decide(samples: Any) -> None:
    plain = Recipe.preset("masquant", "W4A8", 32, rotation=RotationArgs())
    refined = dataclasses.replace(plain, refinement=RefinementArgs(steps=80, learning_rate=0.03))
    _, before = run(samples, plain)
    model, after = run(samples, refined)
    found = [b["refined"] for b in after.blocks]
    assert all(f["after"] <= f["before"] for f in found) and any(f["after"] < f["before"] for f in found)
    assert all("refined" not in b for b in before.blocks)
    again, _ = run(samples, refined)
    assert same_tensors(model, again)


def test_methods_that_share_a_calibration_get_what_they_get_alone(samples: Any) -> None:
    shared = pipeline.Calibration(masquant.load_samples(samples), 4)
    for method in ("gptq", "quarot", "masquant"):
        recipe = Recipe.preset(method, "W4A8", 32)
        assert same_tensors(run(shared, recipe)[0], run(samples, recipe)[0]), method


def test_without_online_transforms_nothing_runs_with_the_model(samples: Any, tmp_path: Path) -> None:
    rotation = RotationArgs(online_transforms=False)
    model, report = run(samples, dataclasses.replace(Recipe.preset("masquant", "W4A8", 32), rotation=rotation))
    found = report.format.rotations
    assert found is not None and found.heads and not found.online
    assert all(module.spec.rotation is None for module in quantized_linears(model).values())
    assert not decoder_blocks(model)[0]._forward_pre_hooks


@pytest.mark.parametrize("method", ["quarot", "svdquant", "masquant"])
def test_transforms_and_patches_of_all_tokens_survive_a_round_trip(samples: Any, tmp_path: Path, method: str) -> None:
    model, report = run(samples, Recipe.preset(method, "W4A8", 32))
    save(model, tiny_processor(FAMILY), tmp_path / "out", report)
    again = masquant.load(tmp_path / "out")
    batch = batches_of(samples, 4)[0].inputs
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    if method == "svdquant":
        assert all(set(g["rank"]) == {"all"} for b in report.blocks for g in b["groups"])
    if method == "quarot":
        assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["rotation"]["residual"]


def test_vectors_of_rotated_inputs_are_not_folded_before_the_rotation(samples: Any) -> None:
    """At 8 bits a shared vector and rotations together lose as little as rotations alone."""
    batch = batches_of(samples, 4)[0].inputs
    mask, found = batch["attention_mask"].bool(), {}
    with torch.no_grad():
        wanted = tiny_model(FAMILY)(**batch).logits[mask]
        for mode in ("none", "shared"):
            changes: dict[str, Any] = {"selection": None, "compensation": None, "rotation": RotationArgs()}
            recipe = Recipe.preset("masquant", "W8A8", 32, smoothing=SmoothingArgs(mode), **changes)  # type: ignore[arg-type]
            found[mode] = float((run(samples, recipe)[0](**batch).logits[mask] - wanted).norm() / wanted.norm())
    assert found["shared"] < 1.5 * found["none"]


def test_rotations_are_left_out_where_a_modality_loses(samples: Any) -> None:
    """The report says what was compared; what is left out is neither in the format nor in the model."""
    model, report = run(samples, Recipe.preset("masquant", "W4A8", 32))
    (note,) = [n for n in report.notes if n.startswith("rotations multiply the error")]
    assert all(m in note for m in ("text", "vision", "audio"))
    kept = note.endswith("kept")
    assert (report.format.rotations is not None) == kept == (report.recipe.rotation is not None)
    assert bool(decoder_blocks(model)[0]._forward_pre_hooks) == kept
