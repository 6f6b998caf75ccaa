"""One group: the identities of base and patch, the choice on held-back tokens, and hard statistics."""

import dataclasses

import pytest
import torch
from torch import Tensor

from masquant.calibration.statistics import GroupStatistics
from masquant.modality import Modality
from masquant.quantization import fake_quantize_tokens
from masquant.recipe import CompensationArgs, Recipe, RoundingArgs, SelectionArgs, SmoothingArgs
from masquant.solver import (
    Choice,
    Fit,
    GroupProblem,
    GroupSolution,
    _solve,
    group_output,
    measure_errors,
    solve_group,
)

IN, OUT = 64, 48
MODALITIES = tuple(Modality)


def tokens(seed: int = 0, count: int = 300, loud: float = 20.0) -> list[Tensor]:
    """Inputs per modality; vision is loud in some channels, audio in others."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=torch.Generator().manual_seed(99)) * 0.3 + torch.eye(IN)
    data = [torch.randn(count, IN, generator=g) @ mix for _ in MODALITIES]
    data[1][:, :8] *= loud
    data[2][:, 8:20] *= loud / 2
    return data


def problem(recipe: Recipe, data: list[Tensor], held: list[Tensor] | None = None, **changes: object) -> GroupProblem:
    statistics = GroupStatistics.empty(len(data), IN, torch.device("cpu"))
    for m, x in enumerate(data):
        for part, is_held in ((x, False), (held[m] if held else x[:0], True)):
            statistics.update(part, torch.full((len(part),), m), torch.full((len(part),), is_held))
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    values = {
        "name": "qkv", "weight": weight, "statistics": statistics, "modalities": MODALITIES, "recipe": recipe,
        "grid": recipe.scheme.weights, "modality_weights": dict.fromkeys(MODALITIES, 1.0),
        "realize_text": lambda s: s, "row_fold": torch.ones(OUT), **changes,
    }  # fmt: skip
    return GroupProblem(**values)  # type: ignore[arg-type]


def recipe_of(mode: str = "modality", rounding: str = "gptq", scheme: str = "W4A8", **changes: object) -> Recipe:
    return dataclasses.replace(
        Recipe.preset("rtn", scheme),
        smoothing=SmoothingArgs(mode),  # type: ignore[arg-type]
        rounding=RoundingArgs(rounding),  # type: ignore[arg-type]
        **changes,  # type: ignore[arg-type]
    )


def relative_errors(p: GroupProblem, s: GroupSolution, data: list[Tensor]) -> list[float]:
    result = []
    for m, x in enumerate(data):
        wanted = x @ p.weight.t()
        result.append(float((group_output(p, s, x, m) - wanted).square().sum() / wanted.square().sum()))
    return result


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_full_rank_at_16_bits_is_the_float_linear(rounding: str) -> None:
    """Identity 2: whatever the base, modalities with a patch of full rank lose only the factors' bfloat16."""
    data = tokens()
    p = problem(recipe_of(rounding=rounding, scheme="W4A16", compensation=CompensationArgs(rank_ratio=1.0)), data)
    s = solve_group(p)
    errors = relative_errors(p, s, data)
    assert errors[1] < 2e-5 and errors[2] < 2e-5
    assert errors[0] > 1e-3  # text: the weight's rounding, which no patch touches


def test_full_rank_leaves_only_the_activations_rounding() -> None:
    """Identity 3: y - y_ref == (Q(A) - A) B^T, up to the factors' bfloat16."""
    data = tokens()
    p = problem(recipe_of(compensation=CompensationArgs(rank_ratio=1.0)), data)
    s = solve_group(p)
    assert s.smooth_scale is not None
    for m in (1, 2):
        a = data[m] / (s.text_scale * s.smooth_scale[m])
        difference = group_output(p, s, data[m], m) - data[m] @ p.weight.t()
        wanted = (fake_quantize_tokens(a, 8) - a) @ s.base.t()
        assert float((difference - wanted).norm()) < 0.01 * float((data[m] @ p.weight.t()).norm())


def test_same_vectors_need_no_patch_but_the_rounding() -> None:
    """Identity 6: with one shared vector the divisors are all one, and no tensor is stored for them."""
    s = solve_group(problem(recipe_of("shared"), tokens()))
    assert s.smooth_scale is None and not s.patches


def test_base_optimum_serves_all_modalities() -> None:
    """B* = W G H^-1 minimises the summed error: moving away from it in any direction is worse."""
    data = [x.double() for x in tokens(count=200)]
    vectors = [torch.rand(IN, generator=torch.Generator().manual_seed(m)).double() + 0.3 for m in range(3)]
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5)).double()
    smoothed = [x / v for x, v in zip(data, vectors, strict=True)]
    h = sum(a.t() @ a for a in smoothed)
    g = sum(x.t() @ a for x, a in zip(data, smoothed, strict=True))
    best = torch.linalg.solve(h, (w @ g).t()).t()  # type: ignore[operator]

    def loss(b: Tensor) -> float:
        return sum(float((x @ w.t() - a @ b.t()).square().sum()) for x, a in zip(data, smoothed, strict=True))

    at_best = loss(best)
    for seed in range(5):
        step = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)).double()
        assert loss(best + 1e-3 * step) > at_best
        d = 1e-3 * step
        assert loss(best + d) - at_best == pytest.approx(float(((d @ h) * d).sum()), rel=1e-3)  # type: ignore[operator]


def test_gptq_beats_nearest_and_own_vectors_help_quiet_modalities_at_six_bits() -> None:
    data = tokens(loud=60.0)
    nearest = problem(recipe_of("none", "nearest"), data)
    gptq = problem(recipe_of("none"), data)
    a, b = (relative_errors(p, solve_group(p), data) for p in (nearest, gptq))
    assert sum(b) < 0.8 * sum(a)
    shared = problem(recipe_of("shared", scheme="W4A6"), data)
    own = problem(recipe_of("modality", scheme="W4A6", compensation=CompensationArgs(rank=24)), data)
    a, b = (relative_errors(p, solve_group(p), data) for p in (shared, own))
    assert b[1] + b[2] < a[1] + a[2]


def test_selection_is_never_worse_than_the_simplest_on_held_tokens() -> None:
    held = tokens(seed=7, count=60)
    selection = SelectionArgs(activation_share=0.0, byte_price=0.0)
    recipe = recipe_of(compensation=CompensationArgs(max_bytes=0.1), selection=selection)
    p = problem(recipe, tokens(), held)
    s = solve_group(p)
    simplest = dict(s.candidates[0][1])
    assert s.candidates[0][0] == "no smoothing" and len(s.candidates) >= 5
    for modality, error in s.errors.items():
        assert error <= simplest[modality] * (1 + recipe.selection.margin)  # type: ignore[union-attr]
    chosen = next(errors for name, errors in s.candidates if name == str(s.choice))
    assert chosen == s.errors


def test_absent_modality_keeps_texts_vector_and_gets_no_patch() -> None:
    data = tokens()
    data[2] = data[2][:0]
    s = solve_group(problem(recipe_of(compensation=CompensationArgs(rank=4)), data))
    assert s.smooth_scale is not None
    assert torch.equal(s.smooth_scale[2], torch.ones(IN))
    assert set(s.patches) == {Modality.VISION}


@pytest.mark.parametrize("case", ["few tokens", "outlier", "dead channel", "many tokens of one", "one token"])
def test_hard_statistics(case: str) -> None:
    data = tokens(count={"few tokens": 5, "one token": 1}.get(case, 300))
    if case == "outlier":
        data[1][:, 3] *= 1000
    if case == "dead channel":
        for x in data:
            x[:, 11] = 0
    if case == "many tokens of one":
        data[1] = torch.cat([data[1]] * 50)
    selection = SelectionArgs(byte_price=0.0)
    p = problem(recipe_of(compensation=CompensationArgs(rank=4), selection=selection), data, tokens(3, 40))
    s = solve_group(p)
    for tensor in (s.text_scale, s.weight_scale, s.base, *(t for p_ in s.patches.values() for t in (p_.a, p_.b))):
        assert bool(tensor.isfinite().all())
    baseline = solve_group(problem(recipe_of("none", "nearest"), data))
    if case not in ("few tokens", "one token"):
        ours, theirs = measure_errors(p, s), measure_errors(p, baseline)
        assert all(ours[m] < 1.5 * theirs[m] for m in ours)


def test_rank_rules() -> None:
    def ranks(**args: object) -> set[int]:
        s = solve_group(problem(recipe_of(compensation=CompensationArgs(**args)), tokens()))  # type: ignore[arg-type]
        return {patch.rank for patch in s.patches.values()}

    assert ranks(rank=5) == {5}
    assert ranks(rank_ratio=0.1) == {5}  # ceil(0.1 * 48)
    assert ranks(rank_ratio=0.1, min_rank=32) == {32}
    assert ranks(rank=1000) == {48}
    packed = OUT * (IN // 2 + 2)
    assert ranks(max_bytes=0.5) == {int(0.25 * packed // (2 * (IN + OUT)))}
    assert ranks(max_bytes=0.001) == set()


def test_deterministic() -> None:
    p = problem(Recipe.preset("masquant"), tokens(), tokens(3, 40))
    a, b = solve_group(p), solve_group(p)
    assert torch.equal(a.q, b.q) and torch.equal(a.weight_scale, b.weight_scale)
    assert a.choice == b.choice and a.errors == b.errors


def test_base_solved_again_for_its_patches_is_better_on_the_data_it_is_solved_on() -> None:
    """Alternating minimisation: with the patches given, no base does better than the one solved for them."""
    data = tokens(loud=30.0)
    recipe = recipe_of("none", scheme="W4A16", compensation=CompensationArgs(rank=6))
    p = problem(recipe, data)
    fit = Fit(p, p.statistics.merged())
    once, twice = (_solve(fit, Choice(0.0, 0.0, True, again)) for again in (False, True))

    def loss(s: GroupSolution) -> float:
        differences = (group_output(p, s, x, m) - x @ p.weight.t() for m, x in enumerate(data))
        return sum(
            w * float(d.square().sum()) for w, d in zip(fit.importance, differences, strict=True)
        )  # what the Hessian sums up

    assert loss(twice) < loss(once)
    assert once.choice != twice.choice and str(twice.choice).endswith("patch, base again")


def test_vectors_are_tried_only_where_activations_matter() -> None:
    """At 16 bits activations lose nothing, so that no vector is tried; at 6 bits they are."""
    for scheme, tried in (("W4A16", False), ("W4A6", True)):
        recipe = recipe_of(scheme=scheme, selection=SelectionArgs())
        names = [name for name, _ in solve_group(problem(recipe, tokens(), tokens(1, 60))).candidates]
        assert any("vector" in name for name in names) == tried
