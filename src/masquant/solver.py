# SPDX-License-Identifier: Apache-2.0
"""One linear group: smoothing vectors, base weight and patches, chosen together.

With A_m = X_m / s_m and importance w_m of modality m the group's error is

    sum_m w_m || X_m W^T - (Q(A_m) B^T + A_m a_m^T b_m^T) ||^2

- The vectors lie between the shared and each modality's own (`smoothing.scales`); each is scaled by its gauge.
- The base B serves all modalities. In floating point its optimum is B* = W G H^-1 with H = sum_m w_m A_m^T A_m and
  G = sum_m w_m X_m^T A_m; B* = W diag(s) where all vectors are equal. GPTQ then rounds B* under H, which is exact,
  because the error is quadratic around B* with Hessian H. Rounding to nearest starts from text's W diag(s_text), as
  in the paper.
- The patch of each modality removes what it can of W diag(s_m) - B, B's rounding error included. B may then be solved
  and rounded once more for what the patches leave to it, and the patches after it.

Where the recipe has a selection, candidates are solved on the fitting samples and judged by the real error,
activations quantized, on tokens of samples held back. It goes from simple to complex: first the strength of one
shared vector, then the spread towards each modality's own vector (both only where rounding the activations matters),
then the patch, then the base again. A step must be better by the margin than what it replaces, or by more where it
takes bytes, and leave no modality worse than the simplest candidate does. The winner is solved again on all samples.
Where no sample is held back, the simplest candidate is taken. Everything is a pure function of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .calibration.statistics import GroupStatistics, Moments
from .compensation import ALL_TOKENS, Patch, Spectrum, leading_spectrum, low_rank_patch, rank_bytes, rank_for_bytes
from .modality import Modality
from .quantization import (
    GptqFactor,
    absmax_scale,
    dequantize_weight,
    factorize,
    fake_quantize_tokens,
    quantize_weight,
    round_gptq,
    search_scale,
)
from .quantization.rounding import damped
from .recipe import CompensationArgs, Recipe, WeightArgs
from .runtime.linear import SMOOTH_DTYPE
from .smoothing.scales import awq_scale, gauge, smooth_scale, spread_scale

MOST_RANKS = 32  # of one patch that is bought by its price
_LISTED_ENERGIES = 64  # of one patch, for the report


@dataclass(frozen=True)
class GroupProblem:
    """One group to solve.

    Attributes:
        name: `qkv`, `o`, `gate_up` or `down`.
        weight: float32 [out, in], the linears' rows one below the other.
        statistics: of the group's input.
        modalities: of the model, text first.
        recipe: what to do.
        grid: of the weight.
        modality_weights: importance of each modality's error.
        realize_text: the vector for text [in] that can really be folded, nearest to the one wanted.
        row_fold: [out], the factor by which each stored row will be multiplied (a later group's vector, folded).
        learned: [modalities, in], learned vectors that replace the closed form.
        price: squared error (in the statistics' units) that a byte of a patch must remove; None where the recipe has
            no budget and gives ranks instead.
        patch_bytes: what the group's vectors and patches may take together, with a price.
    """

    name: str
    weight: Tensor
    statistics: GroupStatistics
    modalities: tuple[Modality, ...]
    recipe: Recipe
    grid: WeightArgs
    modality_weights: Mapping[Modality, float]
    realize_text: Callable[[Tensor], Tensor]
    row_fold: Tensor
    learned: Tensor | None = None
    price: float | None = None
    patch_bytes: int = 0

    @property
    def group_size(self) -> int | None:
        """Inputs per weight scale."""
        return self.grid.group_size_for(self.weight.shape[1])


@dataclass(frozen=True)
class Choice:
    """What distinguishes one candidate."""

    strength: float
    spread: float
    patched: bool
    again: bool = False

    def __str__(self) -> str:
        if self.strength == 0 and self.spread == 0:
            vectors = "no smoothing"
        else:
            kind = {0.0: "shared vector", 1.0: "own vectors"}.get(self.spread, f"vectors at spread {self.spread:g}")
            vectors = f"{kind}, strength {self.strength:g}"
        return vectors + (", patch" if self.patched else "") + (", base again" if self.again else "")


@dataclass(frozen=True)
class GroupSolution:
    """What is stored of a group.

    Attributes:
        text_scale: [in], text's vector, to be folded.
        smooth_scale: [modalities, in], divisors of the folded input, row 0 ones, exact in bfloat16; None if all ones.
        q: int8 [out, in].
        weight_scale: [out, groups], before `row_fold`.
        patches: per modality, or for "all" tokens, as they are stored.
        choice: what was chosen.
        errors: per modality, relative error ||y - y_ref||^2 / ||y_ref||^2 on the tokens held back, of the candidate as
            it was compared; on the first tokens where none was.
        candidates: per candidate tried, its name and errors.
        energies: per patch, squared error that each of the leading ranks removes, descending; the ranks that were not
            taken too.
        missing: per patch, squared error that there was to remove.
    """

    text_scale: Tensor
    smooth_scale: Tensor | None
    q: Tensor
    weight_scale: Tensor
    patches: Mapping[str, Patch]
    choice: Choice
    errors: Mapping[Modality, float]
    candidates: tuple[tuple[str, Mapping[Modality, float]], ...] = ()
    energies: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)

    @property
    def base(self) -> Tensor:
        """The base weight B, float32 [out, in]."""
        return dequantize_weight(self.q, self.weight_scale)


@dataclass(frozen=True)
class Fit:
    """A problem with the statistics that its candidates are solved on; what they share is computed once."""

    problem: GroupProblem
    statistics: Moments

    @property
    def moment(self) -> Tensor:
        """Second moments [modalities, in, in], which the recipe must have asked for."""
        assert self.statistics.moment is not None
        return self.statistics.moment

    @cached_property
    def gram(self) -> Tensor:
        """W^T W, float32 [in, in]."""
        return self.problem.weight.t() @ self.problem.weight

    def energy(self, m: int) -> Tensor:
        """(X_m^T X_m) * (W^T W) elementwise, [in, in], of modality number m; it sums to ||X_m W^T||^2."""
        return self.moment[m] * self.gram

    @cached_property
    def importance(self) -> list[float]:
        """Factor of each modality's second moment in the Hessian; the largest is 1."""
        recipe = self.problem.recipe
        factors = []
        for m, modality in enumerate(self.problem.modalities):
            factor = float(self.problem.modality_weights[modality]) if self.statistics.counts[m] else 0.0
            if recipe.rounding.balance == "modality":
                energy = float(self.energy(m).sum())
                factor = factor / energy if energy > 0 else 0.0
            factors.append(factor)
        largest = max(factors)
        return [factor / largest if largest > 0 else 0.0 for factor in factors]

    @cached_property
    def hessian(self) -> Tensor:
        """sum_m w_m X_m^T X_m, [in, in]: the Hessian where all modalities have the same vector."""
        return self.hessians(torch.ones_like(self.statistics.absmax))[0]

    @cached_property
    def factor(self) -> GptqFactor:
        """`hessian`, factorized."""
        return factorize(self.hessian, self.problem.recipe.rounding.damping)

    def hessians(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """H = sum_m w_m A_m^T A_m and G = sum_m w_m X_m^T A_m, both [in, in], for A_m = X_m / ratio_m."""
        h, g = torch.zeros_like(self.moment[0]), torch.zeros_like(self.moment[0])
        for m, factor in enumerate(self.importance):
            if factor:
                r = ratio[m].to(h.dtype)
                half = self.moment[m] * (factor / r)
                h += half / r[:, None]
                g += half
        return h, g


def solve_group(problem: GroupProblem) -> GroupSolution:
    """Solve one group; see the module's text."""
    solution = _solution(problem)
    if not solution.errors:
        solution = replace(solution, errors=measure_errors(problem, solution))
    if not solution.patches:
        return solution
    fit = Fit(problem, problem.statistics.merged())
    return replace(solution, missing={key: _missing_energy(fit, solution, key) for key in solution.patches})


def _missing_energy(fit: Fit, solution: GroupSolution, key: str) -> float:
    """Squared error that a patch could remove at most."""
    problem, compensation = fit.problem, fit.problem.recipe.compensation
    if compensation is not None and compensation.order == "before":
        return float((problem.weight * solution.text_scale).square().sum())
    m = 0 if key == ALL_TOKENS else [modality.value for modality in problem.modalities].index(key)
    difference, moment = _missing(fit, solution, m, fit.hessian if key == ALL_TOKENS else fit.moment[m])
    d = difference.double()
    return float(((d @ moment.double()) * d).sum())


def _solution(problem: GroupProblem) -> GroupSolution:
    recipe = problem.recipe
    smoothing = recipe.smoothing
    mode = smoothing.mode if problem.name in smoothing.groups else "none"
    if recipe.selection is not None:
        if bool(problem.statistics.deciding.counts.any()):
            return _select(problem, mode)
        return _solve(Fit(problem, problem.statistics.merged()), Choice(0.0, 0.0, False))  # nothing to judge by
    strength = 0.0 if mode == "none" else smoothing.strength
    choice = Choice(strength, 1.0 if mode == "modality" else 0.0, _may_patch(problem))
    return _solve(Fit(problem, problem.statistics.merged()), choice)


def _may_patch(problem: GroupProblem) -> bool:
    compensation = problem.recipe.compensation
    counts = problem.statistics.fitting.counts
    present = bool((counts[1:] > 0).any()) or (compensation is not None and compensation.tokens == "all")
    return compensation is not None and problem.name in compensation.groups and present


def _select(problem: GroupProblem, mode: str) -> GroupSolution:
    """Choose on the fitting samples by the error on the held ones, then solve the winner on all."""
    selection = problem.recipe.selection
    assert selection is not None
    fit = Fit(problem, problem.statistics.fitting)
    references = [x @ problem.weight.t() for x in problem.statistics.held]
    tried: list[tuple[Choice, dict[Modality, float]]] = []

    def attempt(choice: Choice, base: GroupSolution | None = None) -> tuple[GroupSolution, dict[Modality, float]]:
        solution = _with_patches(fit, base, choice) if base else _solve(fit, choice)
        tried.append((choice, measure_errors(problem, solution, references)))
        return solution, tried[-1][1]

    packed = problem.weight.numel() * problem.grid.num_bits / 8
    byte_price = selection.byte_price if problem.price is None else 0.0  # a budget has its own
    best, errors = attempt(Choice(0.0, 0.0, False))
    simplest = errors

    def consider(choice: Choice, base: GroupSolution | None = None) -> None:
        nonlocal best, errors
        solution, found = attempt(choice, base)
        worst = max(found[m] / max(simplest[m], 1e-30) for m in found)
        more_bytes = (added_bytes(solution) - added_bytes(best)) / packed
        wins = _gain(errors, found, problem.modality_weights) > max(selection.margin, byte_price * more_bytes)
        if wins and not (selection.protect and worst > 1 + selection.margin):
            best, errors = solution, found

    if max(activation_share(problem, best, references).values(), default=0.0) < selection.activation_share:
        mode = "none"
    for strength in selection.strengths if mode != "none" else ():
        if strength > 0:
            consider(Choice(strength, 0.0, False))
    strength = best.choice.strength or problem.recipe.smoothing.strength
    vectors = problem.statistics.fitting.absmax.numel() * SMOOTH_DTYPE.itemsize
    affordable = problem.price is None or vectors <= problem.patch_bytes
    for spread in selection.spreads if mode == "modality" and affordable else ():
        if spread > 0:
            consider(Choice(strength, spread, False))
    if _may_patch(problem) and (problem.price is None or problem.patch_bytes):
        consider(Choice(best.choice.strength, best.choice.spread, True), best)
    if best.patches and problem.recipe.rounding.method == "gptq":
        consider(replace(best.choice, again=True))
    final = _solve(Fit(problem, problem.statistics.merged()), best.choice)
    return replace(final, errors=errors, candidates=tuple((str(choice), e) for choice, e in tried))


def _gain(
    before: Mapping[Modality, float], after: Mapping[Modality, float], weights: Mapping[Modality, float]
) -> float:
    """Weighted mean over modalities of log(before / after): relative, so that no modality's magnitude dominates."""
    total = sum(weights[m] for m in before)
    logs = (weights[m] * math.log(max(before[m], 1e-30) / max(after[m], 1e-30)) for m in before)
    return sum(logs) / total


def _vectors(fit: Fit, choice: Choice) -> tuple[Tensor, Tensor]:
    """Text's realized vector [in] and the divisors of the folded input [modalities, in], exact in bfloat16.

    A modality without tokens keeps text's vector.
    """
    problem, statistics = fit.problem, fit.statistics
    modalities, features = statistics.absmax.shape
    device = problem.weight.device
    ones = torch.ones(modalities, features, device=device)
    if problem.learned is not None:
        wanted = problem.learned
    elif choice.strength == 0 and choice.spread == 0:
        return problem.realize_text(ones[0]), ones
    else:
        weight_absmax = problem.weight.abs().amax(0)
        if problem.recipe.smoothing.formula == "awq":
            awq = problem.realize_text(awq_scale(statistics.mean_magnitude, choice.strength))
            return awq, ones
        shared = smooth_scale(statistics.absmax.amax(0), weight_absmax, choice.strength)
        own = smooth_scale(statistics.absmax, weight_absmax, choice.strength)
        wanted = spread_scale(shared, own, choice.spread)
    text = problem.realize_text(wanted[0])
    ratio = wanted / text
    ratio[0] = 1.0
    for m in range(1, modalities):
        if statistics.counts[m] == 0 or (problem.learned is None and choice.spread == 0):
            ratio[m] = 1.0
        else:
            ratio[m] *= gauge(fit.energy(m), ratio[m])
    return text, ratio.to(SMOOTH_DTYPE).float()


def _round_base(
    fit: Fit, target: Tensor, text: Tensor, ratio: Tensor, patches: Mapping[str, Patch] | None = None
) -> tuple[Tensor, Tensor]:
    """Integers [out, in] and scales [out, groups] of the base weight for the target [out, in] of the unsmoothed input;
    it meets inputs divided by text * ratio, beside what `patches` give already."""
    problem = fit.problem
    bits, rounding = problem.grid.num_bits, problem.recipe.rounding
    full_range = problem.recipe.scheme.weights.full_range
    if rounding.method == "nearest" and not rounding.clip_search:
        scale = absmax_scale(target * text, bits, problem.group_size, problem.row_fold)
        return quantize_weight(target * text, scale, bits), scale
    hessian = fit.hessian
    if rounding.method == "gptq" and (patches or bool((ratio != 1).any())):
        # B* = W G H^-1; the damping of H pulls towards W rather than towards zero.
        hessian, cross = fit.hessians(ratio)
        h = damped(hessian, rounding.damping)
        right = target.double() @ (cross.double() + h - hessian.double())
        for m, modality in enumerate(problem.modalities) if patches else ():
            given = _patch_weight(problem, patches or {}, modality) / (text * ratio[m])
            right -= given.double() @ (fit.moment[m].double() * (fit.importance[m] / ratio[m].double()))
        target = torch.linalg.solve(h, right.t()).t().float()
    if rounding.clip_search:
        importance = hessian.diagonal() / text.to(hessian.dtype).square()
        scale = search_scale(target * text, bits, problem.group_size, importance, problem.row_fold, full_range)
    else:
        scale = absmax_scale(target * text, bits, problem.group_size, problem.row_fold)
    if rounding.method == "gptq":
        factor = fit.factor if hessian is fit.hessian else factorize(hessian, rounding.damping)
        return round_gptq(target, scale, factor, bits, text, full_range), scale
    return quantize_weight(target * text, scale, bits, full_range), scale


def _patch_weight(problem: GroupProblem, patches: Mapping[str, Patch], modality: Modality) -> Tensor:
    """What the patches do to smoothed inputs of a modality, as a weight [out, in] before `row_fold`."""
    parts = [p.weight(problem.row_fold) for k, p in patches.items() if k in (modality.value, ALL_TOKENS)]
    return sum(parts, torch.zeros_like(problem.weight))


def _patch_rank(compensation: CompensationArgs, problem: GroupProblem, patched: int) -> int:
    """Rank of each of `patched` modalities' patches."""
    out_features, in_features = problem.weight.shape
    scales = in_features // (problem.group_size or in_features)
    packed = out_features * (in_features * problem.grid.num_bits // 8 + 2 * scales)
    return patch_rank(compensation, in_features, out_features, packed, patched)


def patch_rank(
    compensation: CompensationArgs, in_features: int, out_features: int, packed_bytes: int, patched: int
) -> int:
    """Rank of the patches that a recipe without a byte budget for the whole model gives to one group.

    Args:
        compensation: of the recipe.
        in_features, out_features: of the group.
        packed_bytes: of its weights and scales.
        patched: number of its patches.
    """
    limit = min(out_features, in_features)
    if compensation.rank is not None:
        rank = compensation.rank
    elif compensation.rank_ratio is not None:
        rank = math.ceil(compensation.rank_ratio * limit)
    else:
        assert compensation.max_bytes is not None
        budget = compensation.max_bytes * packed_bytes / patched
        rank = rank_for_bytes(budget, in_features, out_features, _factors(compensation))
    return min(max(rank, compensation.min_rank), limit)


def _solve(fit: Fit, choice: Choice) -> GroupSolution:
    """Vectors, base and (if the choice has them) patches of one candidate."""
    problem = fit.problem
    text, ratio = _vectors(fit, choice)
    smooth = ratio if bool((ratio != 1).any()) else None
    compensation = problem.recipe.compensation
    if choice.patched and compensation is not None and compensation.order == "before":
        smoothed = problem.weight * text
        identity = torch.eye(smoothed.shape[1], dtype=torch.float64, device=smoothed.device)
        patch, energies = _patch(fit, smoothed, identity, _patch_rank(compensation, problem, 1))
        q, scale = _round_base(fit, problem.weight - patch.weight(problem.row_fold) / text, text, ratio)
        return GroupSolution(text, smooth, q, scale, {ALL_TOKENS: patch}, choice, {}, energies={ALL_TOKENS: energies})
    q, scale = _round_base(fit, problem.weight, text, ratio)
    solution = GroupSolution(text, smooth, q, scale, {}, choice, {})
    if choice.patched:
        solution = _with_patches(fit, solution, choice)
    if choice.again and solution.patches:
        q, scale = _round_base(fit, problem.weight, text, ratio, solution.patches)
        solution = _with_patches(fit, replace(solution, q=q, weight_scale=scale), choice)
    return solution


def _factors(compensation: CompensationArgs) -> str:
    """How patches are stored where no budget decides."""
    return "int8" if compensation.factors == "auto" else compensation.factors


def _patch(fit: Fit, difference: Tensor, moment: Tensor, rank: int) -> tuple[Patch, tuple[float, ...]]:
    """Patch of a difference [out, in], and the leading energies."""
    compensation = fit.problem.recipe.compensation
    assert compensation is not None
    spectrum = leading_spectrum(difference, moment, rank)
    a, b = low_rank_patch(difference, spectrum.vectors[:, :rank])
    return Patch.store(a, b * fit.problem.row_fold[:, None], _factors(compensation)), _listed(spectrum)


def _listed(spectrum: Spectrum) -> tuple[float, ...]:
    return tuple(spectrum.energies[:_LISTED_ENERGIES].tolist())


def _with_patches(fit: Fit, solution: GroupSolution, choice: Choice) -> GroupSolution:
    """The solution with a patch for every modality that has tokens, or one for all tokens."""
    problem, statistics = fit.problem, fit.statistics
    present = [m for m in range(1, len(problem.modalities)) if statistics.counts[m] > 0]
    patches: dict[str, Patch] = {}
    energies: dict[str, tuple[float, ...]] = {}
    compensation = problem.recipe.compensation
    assert compensation is not None
    if compensation.tokens == "all":
        patch, found = _patch(fit, *_missing(fit, solution, 0, fit.hessian), _patch_rank(compensation, problem, 1))
        return replace(solution, patches={ALL_TOKENS: patch}, choice=choice, energies={ALL_TOKENS: found})
    if problem.price is not None:
        patches, energies = _priced_patches(fit, solution, present)
        return replace(solution, patches=patches, choice=choice, energies=energies)
    rank = _patch_rank(compensation, problem, len(present)) if present else 0
    for m in present if rank else ():
        key = problem.modalities[m].value
        patches[key], energies[key] = _patch(fit, *_missing(fit, solution, m, fit.moment[m]), rank)
    return replace(solution, patches=patches, choice=choice, energies=energies)


def _missing(fit: Fit, solution: GroupSolution, m: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """What the base misses for modality number m, W diag(s_m) - B [out, in], and the second moment of its smoothed
    inputs, given that of its inputs."""
    ratio = 1.0 if solution.smooth_scale is None else solution.smooth_scale[m]
    s = solution.text_scale * ratio
    return fit.problem.weight * s - solution.base, moment / torch.outer(s, s)


def _priced_patches(
    fit: Fit, solution: GroupSolution, present: list[int]
) -> tuple[dict[str, Patch], dict[str, tuple[float, ...]]]:
    """Patches and their leading energies. Every rank removes more error per byte than the price, the best ranks first,
    within the bytes allowed; stored in the way that leaves least error plus price of its bytes."""
    compensation = fit.problem.recipe.compensation
    assert compensation is not None
    ways = ("int8", "bfloat16") if compensation.factors == "auto" else (compensation.factors,)
    found = [_patches_stored(fit, solution, present, way) for way in ways]
    _, patches, energies = min(found, key=lambda result: result[0])
    return patches, energies


def _patches_stored(
    fit: Fit, solution: GroupSolution, present: list[int], factors: str
) -> tuple[float, dict[str, Patch], dict[str, tuple[float, ...]]]:
    """What patches stored in one way change in error plus price of their bytes, the patches and their energies."""
    problem = fit.problem
    assert problem.price is not None
    out_features, in_features = problem.weight.shape
    cost = rank_bytes(in_features, out_features, factors)
    most = min(max(problem.patch_bytes - vector_bytes(solution), 0) // cost, out_features, in_features)
    found: dict[int, tuple[Tensor, Spectrum, Tensor]] = {}
    ranked: list[tuple[float, int]] = []
    for m in present if most else ():
        difference, moment = _missing(fit, solution, m, fit.moment[m])
        spectrum = leading_spectrum(difference, moment, min(most, MOST_RANKS))
        vectors = spectrum.vectors[:, : min(most, MOST_RANKS)]
        projected = vectors.t() @ difference.double()
        removed = ((projected @ moment.double()) * projected).sum(1) * fit.importance[m]
        found[m] = difference, spectrum, moment.double()
        ranked += [(float(energy) / cost, m) for energy in removed]
    worth = [m for gain, m in sorted(ranked, reverse=True) if gain > problem.price][:most]
    patches: dict[str, Patch] = {}
    energies: dict[str, tuple[float, ...]] = {}
    change = 0.0
    for m, (difference, spectrum, moment) in found.items():
        if rank := worth.count(m):
            a, b = low_rank_patch(difference, spectrum.vectors[:, :rank])
            patch = Patch.store(a, b * problem.row_fold[:, None], factors)
            patches[problem.modalities[m].value] = patch
            energies[problem.modalities[m].value] = _listed(spectrum)
            left = difference.double() - patch.weight(problem.row_fold).double()
            errors = [float(((d @ moment) * d).sum()) for d in (left, difference.double())]
            change += fit.importance[m] * (errors[0] - errors[1]) + problem.price * patch.bytes
    return change, patches, energies


def group_output(
    problem: GroupProblem, solution: GroupSolution, x: Tensor, m: int, activation_bits: int | None = None
) -> Tensor:
    """What the quantized group gives for float input x [tokens, in] of modality number m, without bias.

    `activation_bits` replaces the recipe's.
    """
    ratio = 1.0 if solution.smooth_scale is None else solution.smooth_scale[m]
    smoothed = x / (solution.text_scale * ratio)
    bits = activation_bits or problem.recipe.scheme.input_activations.num_bits
    y = fake_quantize_tokens(smoothed, bits) @ solution.base.t()
    return y + patch_output(solution, problem.modalities[m], smoothed, problem.row_fold)


def patch_output(solution: GroupSolution, modality: Modality, smoothed: Tensor, row_fold: Tensor) -> Tensor:
    """What the patches add for smoothed inputs [tokens, in] of a modality, [tokens, out], before `row_fold`."""
    y = smoothed.new_zeros(len(smoothed), len(solution.q))
    for key in (modality.value, ALL_TOKENS):
        if key in solution.patches:
            y = y + solution.patches[key].output(smoothed, row_fold)
    return y


def activation_share(
    problem: GroupProblem, solution: GroupSolution, references: list[Tensor]
) -> dict[Modality, float]:
    """Share of each modality's error on the tokens held back that rounding the activations is to blame for."""
    both = measure_errors(problem, solution, references)
    weights_only = measure_errors(problem, solution, references, activation_bits=16)
    return {m: 1 - weights_only[m] / error if error > 0 else 0.0 for m, error in both.items()}


def measure_errors(
    problem: GroupProblem,
    solution: GroupSolution,
    references: list[Tensor] | None = None,
    activation_bits: int | None = None,
) -> dict[Modality, float]:
    """Relative squared error per modality on the weighted tokens that are held; modalities without such are left out.

    `references` are the float outputs on those tokens, per modality, if they are known already; `activation_bits`
    replaces the recipe's.
    """
    errors = {}
    for m, x in enumerate(problem.statistics.held):
        if len(x):
            reference = references[m] if references else x @ problem.weight.t()
            weights = problem.statistics.held_weights[m]
            energy = float(reference.square().sum(-1) @ weights)
            error = float(
                (group_output(problem, solution, x, m, activation_bits) - reference).square().sum(-1) @ weights
            )
            errors[problem.modalities[m]] = error / energy if energy > 0 else error
    return errors


def vector_bytes(solution: GroupSolution) -> int:
    """Bytes of the vectors that are not folded."""
    return 0 if solution.smooth_scale is None else solution.smooth_scale.numel() * SMOOTH_DTYPE.itemsize


def added_bytes(solution: GroupSolution) -> int:
    """Bytes beyond the packed weights: vectors and patches."""
    return vector_bytes(solution) + solution_patch_bytes(solution)


def solution_patch_bytes(solution: GroupSolution) -> int:
    """Bytes of the patches."""
    return sum(patch.bytes for patch in solution.patches.values())
