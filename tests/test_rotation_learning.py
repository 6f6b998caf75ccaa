"""A learned rotation: orthogonal, better at what it is learned for, stored, and the same model with or without it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import save
from masquant.calibration.encoding import SampleEncoder
from masquant.errors import CheckpointError
from masquant.models import decoder_of
from masquant.recipe import LearnedRotationArgs, Recipe, RotationArgs
from masquant.rotation import Rotation
from masquant.rotation_learning import group_ranges, learn_rotation

FAMILY = "qwen2_5_omni"


def test_learning_narrows_the_groups() -> None:
    g = torch.Generator().manual_seed(0)
    heavy = [torch.randn(48, 64, generator=g) * torch.rand(64, generator=g).pow(-1) for _ in range(3)]
    columns = [torch.randn(64, 16, generator=g) * torch.rand(64, 1, generator=g).pow(-1) for _ in range(2)]
    found = learn_rotation(heavy, columns, 16, LearnedRotationArgs(steps=80))
    q = found.matrix
    torch.testing.assert_close(q @ q.t(), torch.eye(64), rtol=0, atol=1e-5)
    wanted = [float(group_ranges(rows @ q, 16)) for rows in heavy]
    wanted += [float(group_ranges(q.t() @ c, 16)) for c in columns]
    assert found.after == pytest.approx(sum(wanted) / 5, rel=1e-3)
    assert found.after < 0.7 * found.before
    hadamard = Rotation(64, 0).matrix().float()
    fixed = learn_rotation(
        [rows @ hadamard for rows in heavy], [hadamard.t() @ c for c in columns], 16, LearnedRotationArgs(steps=80)
    )
    assert fixed.before < 0.5 * found.before  # what the fixed rotation does already
    assert fixed.after < 0.95 * fixed.before


def test_a_learned_part_is_applied_and_inverted() -> None:
    q = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))[0]
    rotation, x = Rotation(96, 3, q), torch.randn(5, 96, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ Rotation(96, 3).matrix() @ q)
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x)


def test_it_is_stored_loaded_and_checked(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    samples: Any = tiny_samples(FAMILY, tmp_path / "media", count=8)
    model, processor = tiny_model(FAMILY), tiny_processor(FAMILY)
    recipe = dataclasses.replace(
        Recipe.preset("quarot", "W8A8", 32), rotation=RotationArgs(learned=LearnedRotationArgs(steps=8))
    )
    report = masquant.quantize(model, processor, samples, recipe=recipe, batch_size=4)
    save(model, processor, tmp_path / "out", report)
    again = masquant.load(tmp_path / "out")
    batch = SampleEncoder(processor).encode(masquant.load_samples(samples)[:4]).inputs
    with torch.no_grad():
        found, wanted = again(**batch).logits, tiny_model(FAMILY)(**batch).logits
        assert torch.equal(found, model(**batch).logits)
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 0.01  # 8 bits: nearly the float model
    assert not torch.allclose(decoder_of(again).residual_rotation, torch.eye(64), atol=1e-2)  # type: ignore[arg-type]
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("residual_rotation"))
    for damaged in ({**tensors, name: tensors[name] * 2}, {n: t for n, t in tensors.items() if n != name}):
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError):
            masquant.load(tmp_path / "out")
