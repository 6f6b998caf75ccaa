# SPDX-License-Identifier: Apache-2.0
"""One decoder block: rotate, solve its groups, fold text's vectors, put the quantized linears in place.

Text's vector of a group is divided out where the group's input comes from: in the norm before it, or in the rows of
the linear before it. Rows are folded into the stored scales, bias and patch of that linear, which is exact because
every row has scales of its own; its rounding already counts with it (`row_fold`). Groups that fold into another
group's rows are therefore solved first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .calibration.statistics import GroupStatistics, InputRanges, describe_ranges
from .checkpoint.format import Site
from .errors import ModelError
from .modality import Modality, ModalityState
from .models import LinearGroup, ModelFamily, groups_of, linear_of
from .plan import GroupPlan, folds_text, group_rotation
from .quantization import pack
from .recipe import Recipe
from .rotation import Rotation, Rotations
from .runtime.build import fill_group, replace_group
from .runtime.transforms import attach_input_rotation
from .smoothing.scales import exact_norm_fold, share_across_query_heads
from .solver import GroupProblem, GroupSolution, added_bytes, solution_patch_bytes, solve_group, vector_bytes

_BAND = 1024  # rows that are in float64 at a time


def stacked_weight(block: nn.Module, group: GroupPlan) -> Tensor:
    """Float32 [out, in]: the group's weights, one below the other."""
    return torch.cat([linear_of(block, linear.name).weight.detach().float() for linear in group.linears])


def stacked_fold(group: GroupPlan, folds: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Factor [out] of the group's rows, in the order of `stacked_weight`; ones where nothing is folded in."""
    return torch.cat([folds.get(p.name, torch.ones(p.out_features, device=device)) for p in group.linears])


def source_rows(block: nn.Module, group: LinearGroup, config: Any, features: int) -> slice:
    """The rows of the linear `fold_into` that give a group's input of `features`.

    Raises:
        ModelError: it has another number of rows.
    """
    rows, count, heads = linear_of(block, group.fold_into).out_features, features, ""
    if group.fold_kind == "heads":
        number, kv_number = config.num_attention_heads, config.num_key_value_heads
        heads = f" ({number} heads, {kv_number} of keys and values)"
        count = 0 if number % kv_number or features % number else features // number * kv_number
    if not count or rows < count or (rows > count and not group.fused):
        raise ModelError(
            f"{group.fold_into} has {rows} rows, which do not give the {features} inputs of {group.name}{heads}; the "
            "family's description is wrong for this model"
        )
    return slice(rows - count, rows)


def _turn(rows: Tensor, rotation: Rotation, gain: Tensor | None = None) -> None:
    """Rotate rows [rows, n], times `gain` [n] if given, in place; in float64, a band at a time."""
    for band in rows.split(_BAND):
        wide = band.double() if gain is None else band.double() * gain
        band.copy_(rotation.apply(wide))


def rotate_block(
    block: nn.Module,
    family: ModelFamily,
    groups: tuple[GroupPlan, ...],
    rotations: Rotations,
    config: Any,
    learned: Tensor | None = None,
) -> None:
    """Fold the rotations into a float32 block, so that it does the same in the rotated stream.

    Readers of the residual stream take their norm's weight and R; writers give R^T; rotated group inputs are rotated
    by a hook as long as the linear is in floating point. `learned` is the learned part of the stream's rotation.

    Raises:
        ModelError: a norm with a bias, which no rotation can be folded behind.
    """
    residual = rotations.of_residual(config.hidden_size, learned)
    planned = {group.name: group for group in groups}
    if residual is not None:
        _rotate_readers(block, family, residual)
    for group in groups_of(block, family):
        linears = [linear_of(block, name) for name in group.linears]
        if residual is not None and group.writes_residual:
            for linear in linears:
                _turn(linear.weight.t(), residual)
                if linear.bias is not None:
                    linear.bias.copy_(residual.apply(linear.bias.double()))
        if group.fold_kind == "heads" and group.rotates_heads and rotations.heads:
            size = linears[0].in_features // config.num_attention_heads
            heads, values = cast(Rotation, rotations.of_heads(size)), linear_of(block, group.fold_into)
            rows = source_rows(block, group, config, linears[0].in_features)
            turned = heads.apply(values.weight[rows].double().t().unflatten(1, (-1, size))).flatten(1)
            values.weight[rows] = turned.t().to(values.weight.dtype)
            if values.bias is not None:
                turned = heads.apply(values.bias[rows].double().unflatten(0, (-1, size))).flatten()
                values.bias[rows] = turned.to(values.bias.dtype)
            for linear in linears:
                linear.weight.copy_(heads.apply(linear.weight.double().unflatten(1, (-1, size))).flatten(1))
        rotation = group_rotation(planned.get(group.name), rotations)
        for linear in linears if rotation is not None else ():
            assert rotation is not None
            _turn(linear.weight, rotation)
            attach_input_rotation(linear, rotation)


def _rotate_readers(block: nn.Module, family: ModelFamily, residual: Rotation) -> None:
    """Give what reads the residual stream behind a norm the norm's gain and the rotation."""
    readers: dict[str, set[str]] = {}
    for group in groups_of(block, family):
        if group.fold_kind == "norm":
            readers.setdefault(group.fold_into, set()).update((*group.linears, *group.readers))
    for name, modules in readers.items():
        norm = block.get_submodule(name)
        if getattr(norm, "bias", None) is not None:
            raise ModelError(f"{name} has a bias: the residual stream cannot be rotated")
        gain = cast(nn.Parameter, norm.weight)
        for weight in (cast(nn.Parameter, block.get_submodule(module).weight) for module in modules):
            _turn(weight, residual, gain.double() + family.norm_offset)
        gain.fill_(1.0 - family.norm_offset)


def stream_samples(
    block: nn.Module, family: ModelFamily, rotation: Rotation, group_size: int, rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows [rows, hidden] of a float block's linears that read the residual stream and columns [hidden, group_size] of
    those that write it, as the rotation's fixed part leaves them, float32."""
    readers, writers = [], []
    for group in groups_of(block, family):
        for linear in (linear_of(block, name) for name in group.linears):
            weight = linear.weight.detach().double()
            if group.fold_kind == "norm":
                gain = cast(Tensor, block.get_submodule(group.fold_into).weight).detach().double()
                gain = gain + family.norm_offset
                readers.append(rotation.apply(weight[:: max(len(weight) // rows, 1)] * gain).float())
            if group.writes_residual:
                starts = range(0, weight.shape[1], group_size)[:: max(weight.shape[1] // group_size // 4, 1)]
                writers += [rotation.apply(weight[:, s : s + group_size].t()).t().float() for s in starts]
    return readers, writers


def text_realizer(
    block: nn.Module, family: ModelFamily, group: GroupPlan, config: Any, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Function from the vector wanted for text to the nearest one that can be folded exactly in the model's dtype."""
    kind = group.group.fold_kind
    if kind == "norm":
        weight = cast(Tensor, block.get_submodule(group.group.fold_into).weight).detach().to(dtype)
        return lambda scale: exact_norm_fold(weight, scale, family.norm_offset)[1]
    source_rows(block, group.group, config, group.in_features)
    if kind == "heads":
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return lambda scale: share_across_query_heads(scale, heads, kv_heads)
    return lambda scale: scale


def fold_vector(block: nn.Module, group: GroupPlan, scale: Tensor, config: Any) -> Tensor:
    """Factor [rows] of the linear that takes in text's vector `scale` [in] of a group."""
    rows = source_rows(block, group.group, config, group.in_features)
    if group.group.fold_kind == "heads":
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        scale = scale.unflatten(0, (kv_heads, heads // kv_heads, -1))[:, 0].flatten()
    return torch.cat((scale.new_ones(rows.start), 1.0 / scale))


def solve_block(
    block: nn.Module,
    family: ModelFamily,
    groups: tuple[GroupPlan, ...],
    statistics: Callable[[GroupPlan], GroupStatistics],
    state: ModalityState,
    recipe: Recipe,
    config: Any,
    learned: Mapping[str, Tensor],
    modality_weights: Callable[[str], Mapping[Modality, float]],
    terms: Callable[[GroupPlan, int], tuple[float | None, int]],
    dtype: torch.dtype,
) -> tuple[dict[str, GroupSolution], dict[str, Tensor]]:
    """Solutions per group, and the factor of each linear's rows.

    Args:
        block: unquantized.
        family: of the model.
        groups: of the block.
        statistics: by group, asked for once each, the last group first.
        state: the model's modalities.
        recipe: what to do.
        config: the decoder's config (numbers of heads).
        learned: per group, vectors that replace the closed form.
        modality_weights: importance of each modality's error, by group.
        terms: price and most bytes of what is added to a group's weights, by group and the bytes that this block
            has added so far (see `GroupProblem`).
        dtype: of the model.
    """
    solutions: dict[str, GroupSolution] = {}
    folds: dict[str, Tensor] = {}
    for group in reversed(groups):
        weight = stacked_weight(block, group)
        row_fold = stacked_fold(group, folds, weight.device)
        folded = folds_text(group, recipe.rotations)
        problem = GroupProblem(
            group.role,
            weight,
            statistics(group),
            state.tokens.modalities,
            recipe,
            group.linears[0].grid,
            modality_weights(group.name),
            text_realizer(block, family, group, config, dtype) if folded else torch.ones_like,
            row_fold,
            learned.get(group.name),
            *terms(group, sum(added_bytes(s) for s in solutions.values())),
        )
        solution = solutions[group.name] = solve_group(problem)
        del problem  # and its statistics, before the next group's come
        if group.group.fold_kind != "norm" and folded:
            folds[group.group.fold_into] = fold_vector(block, group, solution.text_scale, config)
    return solutions, folds


@torch.no_grad()
def apply_solutions(
    block: nn.Module,
    family: ModelFamily,
    groups: tuple[GroupPlan, ...],
    solutions: Mapping[str, GroupSolution],
    folds: Mapping[str, Tensor],
    state: ModalityState,
    recipe: Recipe,
    dtype: torch.dtype,
) -> dict[str, Site]:
    """Fold and replace in place; returns what each group has beyond its packed weights."""
    sites: dict[str, Site] = {}
    for group in groups:
        solution = solutions[group.name]
        if group.group.fold_kind == "norm" and folds_text(group, recipe.rotations):
            norm = cast(Tensor, block.get_submodule(group.group.fold_into).weight)
            norm.copy_(exact_norm_fold(norm.to(dtype), solution.text_scale, family.norm_offset)[0])
        for name in (*group.kept, *group.group.readers):  # in floating point: their input is divided all the same
            cast(Tensor, block.get_submodule(name).weight).mul_(solution.text_scale)
    quantized = {linear.name for group in groups for linear in group.linears}
    for name, factor in folds.items():
        if name not in quantized:
            linear = linear_of(block, name)
            linear.weight.mul_(factor[:, None])
            if linear.bias is not None:
                linear.bias.mul_(factor)
    for group in groups:
        solution = solutions[group.name]
        linears = [linear_of(block, p.name) for p in group.linears]
        fold = stacked_fold(group, folds, solution.q.device)
        bias = torch.cat([
            torch.zeros(m.out_features, device=fold.device) if m.bias is None else m.bias.float() for m in linears
        ])  # fmt: skip
        ranks = {key: patch.rank for key, patch in solution.patches.items()}
        factors = next((patch.factors for patch in solution.patches.values()), "bfloat16")
        sites[group.name] = Site(solution.smooth_scale is not None, ranks, factors)
        modules = replace_group(
            block,
            group,
            activation_bits=recipe.scheme.input_activations.num_bits,
            has_smooth_scale=solution.smooth_scale is not None,
            ranks=ranks,
            factors=factors,
            rotation=group_rotation(group, recipe.rotations),
            state=state,
            dtype=dtype,
            device=fold.device,
        )
        fill_group(
            modules,
            packed=pack(solution.q, group.linears[0].num_bits),
            weight_scale=solution.weight_scale * fold[:, None],
            bias=bias * fold,
            smooth_scale=solution.smooth_scale,
            patches=solution.patches,
        )
    return sites


def group_record(
    group: GroupPlan,
    solution: GroupSolution,
    ranges: InputRanges,
    modalities: Sequence[Modality],
    plain: Mapping[Modality, float],
) -> dict[str, Any]:
    """What report.json says of one group.

    Args:
        group: what was planned.
        solution: what is stored.
        ranges: of the group's input.
        modalities: of the model.
        plain: per modality, the relative error of rounding the float model's group to nearest.
    """
    names = [m.value for m in modalities]
    smoothed = ranges.absmax / solution.text_scale
    if solution.smooth_scale is not None:
        smoothed = smoothed / solution.smooth_scale
    return {
        "group": group.name,
        "ranges": {
            "before": describe_ranges(ranges.original, ranges.present, names),
            "after": describe_ranges(smoothed, ranges.present, names),
        },
        "plain_errors": {m.value: e for m, e in plain.items()},
        "choice": str(solution.choice),
        "num_bits": group.linears[0].num_bits,
        "group_size": group.linears[0].group_size or "channel",
        "errors": {m.value: e for m, e in solution.errors.items()},
        "candidates": [{"choice": n, "errors": {m.value: e for m, e in es.items()}} for n, es in solution.candidates],
        "rank": {key: patch.rank for key, patch in solution.patches.items()},
        "patch_bytes": {key: patch.bytes for key, patch in solution.patches.items()},
        "spectrum": {
            key: [float(f"{energy / max(solution.missing[key], 1e-30):.4g}") for energy in energies]
            for key, energies in solution.energies.items()
        },
        "factors": next((patch.factors for patch in solution.patches.values()), None),
        "bytes": {
            "packed": group.packed_bytes,
            "smooth_scale": vector_bytes(solution),
            "compensation": solution_patch_bytes(solution),
        },
    }
