"""Rotations: orthogonal, equal to their matrix, the same on every machine; and models that they do not change."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.block import rotate_block
from masquant.calibration.encoding import SampleEncoder
from masquant.models import core_of, decoder_blocks, decoder_of, linearize
from masquant.plan import make_plan
from masquant.recipe import Recipe
from masquant.rotation import Rotation, Rotations, cosine_transform, factor_sizes, hadamard, signs
from masquant.runtime.transforms import attach_residual_rotation


@given(st.integers(1, 700), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_size_is_orthogonal_and_inverted(size: int, seed: int) -> None:
    rotation = Rotation(size, seed)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ matrix)
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x)
    assert torch.prod(torch.tensor(factor_sizes(size))) == size


def test_factors_are_the_textbook_matrices() -> None:
    wanted = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    assert torch.equal(hadamard(4), wanted)
    c = cosine_transform(9)
    torch.testing.assert_close(c @ c.t(), torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert factor_sizes(576) == (9, 64) and factor_sizes(18944) == (37, 16, 32) and factor_sizes(1) == ()


def test_signs_never_change() -> None:
    """Stored checkpoints rely on them."""
    assert "".join("+-"[int(v < 0)] for v in signs(24, 0)) == "-++-+++-+-+-----+-+----+"
    assert not torch.equal(signs(64, 1), signs(64, 2)) and abs(float(signs(4096, 3).mean())) < 0.05


def test_rotation_spreads_one_channel_over_all() -> None:
    x = torch.zeros(1, 576)
    x[0, 17] = 100.0
    assert float(Rotation(576, 0).apply(x).abs().max()) < 6.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rotations",
    [
        Rotations(0, True, False, ()),
        Rotations(1, False, True, ()),
        Rotations(0, False, False, ("down",)),
        Rotations(2),
    ],
    ids=["residual", "heads", "down", "all"],
)
def test_a_rotated_model_is_the_same_model(family: str, rotations: Rotations, tmp_path: Path) -> None:
    model = core_of(tiny_model(family))
    samples = masquant.load_samples(tiny_samples(family, tmp_path, count=4))
    inputs = next(iter(SampleEncoder(tiny_processor(family)).batches(samples, 4))).inputs
    with torch.no_grad():
        wanted = model(**inputs).logits
        plan, decoder = make_plan(model, Recipe.preset("rtn", group_size="channel")), decoder_of(model)
        exact = not (rotations.residual and plan.family.unrotated)
        for block, groups in zip(decoder_blocks(model), plan.blocks, strict=True):
            rotate_block(linearize(block, plan.family), plan.family, groups, rotations, decoder.config)
        changed = model(**inputs).logits
        attach_residual_rotation(decoder, rotations, plan.family.stream_inputs)
        found = model(**inputs).logits
    if exact:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    else:  # what a family says it cannot do, it cannot do
        assert not torch.allclose(found, wanted, rtol=1e-2, atol=1e-2)
    if rotations.residual:
        assert not torch.allclose(changed, wanted, rtol=1e-2, atol=1e-2)
