# SPDX-License-Identifier: Apache-2.0
"""What a recipe would do to a model and what a checkpoint holds, in words and numbers. No weights are read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .checking import check_index, owners, read_format, resident_bytes
from .checkpoint.format import CheckpointFormat, Site
from .compensation import ALL_TOKENS
from .contents import (
    PARTS,
    Skipped,
    eight_bit_bytes,
    of_experts,
    packed_bytes,
    part_sizes,
    sizes_by_part,
    skipped_parts,
    stored_bytes,
    weight_bytes,
)
from .integrations.loading import load_on_disk, meta_model
from .integrations.transformers import quantized_linears
from .models import ModelFamily, decoder_blocks, decoder_of, family_of
from .pipeline import without_inexact
from .plan import GroupPlan, group_rotation, make_plan, plan_block, plan_encoders, site_key
from .recipe import Recipe
from .rotation import Rotations
from .solver import MOST_RANKS, patch_rank


@dataclass(frozen=True)
class GroupRow:
    """Linear groups of one kind that are treated alike, in all blocks that have them.

    Attributes:
        group: name; `experts.*.down` for those of all experts.
        blocks: numbers of the blocks.
        groups: how many groups that are.
        linears: names inside the block.
        in_features, out_features: of one group: of its input, and of each linear.
        weight_bits, activation_bits: 16 bits are none.
        group_size: inputs per weight scale, or "channel".
        text_vector: where text's smoothing vector goes, or why there is none.
        own_vectors: of the other modalities.
        rotated: what is rotated of it, and whether that is folded into weights.
        patches: rank by modality, or "all" for all tokens; in a plan the largest rank.
        before, after: bytes of the weights, with scales, vectors and patches after; in a plan without these two.
    """

    group: str
    blocks: tuple[int, ...]
    groups: int
    linears: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    weight_bits: int
    activation_bits: int
    group_size: int | str
    text_vector: str
    own_vectors: str
    rotated: tuple[str, ...]
    patches: Mapping[str, int]
    before: int
    after: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What rows have in common that become one."""
        same = (self.group, self.linears, self.in_features, self.out_features, self.weight_bits, self.activation_bits)
        return (*same, self.group_size, self.text_vector, self.own_vectors, self.rotated, tuple(self.patches.items()))


@dataclass(frozen=True)
class Description:
    """What a recipe would do to a model, or what a checkpoint holds.

    Attributes:
        model: folder or hub id.
        family: title of the model's family.
        modalities: of the model.
        scheme: like "W4A8".
        method: of the recipe; None of a checkpoint that does not say.
        blocks: their number.
        groups: what is quantized.
        skipped: what is not.
        bytes: by part of the model, before and after.
        patches: how patches come about, in words.
        encoders: scheme of the encoders' linears by the modality whose tokens they make; empty if they stay.
        notes: what a user should know.
        memory: of a checkpoint, bytes in memory once it is loaded, by kind; empty of a plan.
    """

    model: str
    family: str
    modalities: tuple[str, ...]
    scheme: str
    method: str | None
    blocks: int
    groups: tuple[GroupRow, ...]
    skipped: tuple[Skipped, ...]
    bytes: Mapping[str, Mapping[str, int]]
    patches: str
    encoders: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def merged(rows: Iterable[GroupRow]) -> tuple[GroupRow, ...]:
    """Rows that say the same of several blocks (or experts) as one."""
    by_key: dict[tuple[Any, ...], GroupRow] = {}
    for row in rows:
        found = by_key.get(row.key)
        by_key[row.key] = row if found is None else replace(
            found,
            blocks=tuple(sorted({*found.blocks, *row.blocks})),
            groups=found.groups + row.groups,
            before=found.before + row.before,
            after=found.after + row.after,
        )  # fmt: skip
    return tuple(by_key.values())


def rotated_parts(group: GroupPlan, groups: Sequence[GroupPlan], rotations: Rotations | None) -> tuple[str, ...]:
    """What is rotated of a group, in words."""
    if rotations is None:
        return ()
    found = []
    if rotations.residual and group.group.fold_kind == "norm":
        found.append("input, with the residual stream (folded)")
    if rotations.residual and group.group.writes_residual:
        found.append("output, with the residual stream (folded)")
    turned = [g.group for g in groups if g.group.fold_kind == "heads" and g.group.rotates_heads and rotations.heads]
    if any(g.fold_into in group.group.linears for g in turned):
        found.append("values, within heads (folded)")
    if group.group in turned:
        found.append("input, within heads (folded)")
    if group_rotation(group, rotations) is not None:
        found.append("input, when the model runs")
    return tuple(found)


def describe_plan(model: str | Path, recipe: Recipe) -> Description:
    """What a recipe would do to a model; nothing is changed or loaded.

    Raises:
        ModelError: unsupported model, or a linear in a block that no group covers.
        RecipeError: as `make_plan`.
    """
    shell = meta_model(model)
    plan = make_plan(shell, recipe)
    exact, left_out = without_inexact(recipe, plan.family)
    rows = [
        _planned(group, index, groups, exact, plan.family, shell.dtype.itemsize)
        for index, groups in enumerate(plan.blocks)
        for group in groups
    ]
    before = part_sizes(shell, plan.family)
    before["decoder linears"] = plan.float_bytes
    before["rest of the decoder"] -= plan.float_bytes
    after = {**before, "decoder linears": plan.packed_bytes}
    if recipe.quantize_lm_head:
        after |= eight_bit_bytes(shell)
    for outer in plan.encoders:
        after["encoders"] += outer.linear.packed_bytes - weight_bytes(shell, outer)
    return Description(
        str(model),
        plan.family.title,
        tuple(m.value for m in plan.family.modalities),
        recipe.scheme.name,
        recipe.method,
        len(plan.blocks),
        merged(rows),
        skipped_parts(shell, plan.family, recipe.ignore, before, plan.encoders, head=not recipe.quantize_lm_head),
        {part: {"before": before[part], "after": after[part]} for part in PARTS},
        _patches_in_words(recipe),
        {modality.value: scheme for modality, scheme in recipe.encoders.items()},
        (*plan.notes, *left_out),
    )


def _planned(
    group: GroupPlan, index: int, groups: Sequence[GroupPlan], recipe: Recipe, family: ModelFamily, itemsize: int
) -> GroupRow:
    """Row of one group of one block."""
    fold_into = of_experts(group.group.fold_into)
    smoothed = recipe.smoothing.mode != "none" and group.role in recipe.smoothing.groups
    if not smoothed:
        text = "none: the recipe does not smooth it"
    elif group_rotation(group, recipe.rotations) is not None:
        text = "none: the input is rotated when the model runs"
    elif not group.group.folds_text:
        text = f"none: {fold_into} cannot take it"
    else:
        text = f"folded into {fold_into}"
    own = "one per modality" if smoothed and recipe.smoothing.mode == "modality" else "none"
    return _row(
        group,
        index,
        recipe.scheme.input_activations.num_bits,
        itemsize,
        text_vector=text,
        own_vectors=own if recipe.selection is None or own == "none" else f"{own}, where it pays",
        rotated=rotated_parts(group, groups, recipe.rotations),
        patches=_largest_ranks(group, recipe, family),
        after=group.packed_bytes,
    )


def _row(group: GroupPlan, index: int, activation_bits: int, itemsize: int, **treatment: Any) -> GroupRow:
    """Row of one group of one block; `treatment`: what its plan does not say."""
    first = group.linears[0]
    return GroupRow(
        of_experts(group.name),
        (index,),
        1,
        tuple(of_experts(linear.name) for linear in group.linears),
        group.in_features,
        tuple(linear.out_features for linear in group.linears),
        first.num_bits,
        activation_bits,
        first.group_size or "channel",
        before=sum(linear.in_features * linear.out_features for linear in group.linears) * itemsize,
        **treatment,
    )


def _largest_ranks(group: GroupPlan, recipe: Recipe, family: ModelFamily) -> dict[str, int]:
    """The largest rank of each patch that a recipe may give a group."""
    args = recipe.compensation
    if args is None or group.role not in args.groups:
        return {}
    keys = [ALL_TOKENS] if args.tokens == "all" else [m.value for m in family.modalities[1:]]
    shape = group.in_features, group.out_features
    rank = min(MOST_RANKS, *shape) if recipe.budget else patch_rank(args, *shape, group.packed_bytes, len(keys))
    return dict.fromkeys(keys, rank) if rank else {}


def _patches_in_words(recipe: Recipe) -> str:
    if recipe.compensation is None:
        return "none"
    if recipe.budget is not None:
        return "bought with the byte budget during calibration; these are the largest ranks"
    if recipe.selection is not None:
        return "chosen during calibration, where they pay; these are the largest ranks"
    return "for the modalities that the calibration data has"


def describe_checkpoint(path: str | Path) -> Description:
    """What a checkpoint holds, from its configuration and headers; no weights are read.

    Raises:
        CheckpointError: it is no masquant checkpoint, or incomplete.
        ModelError: its config.json describes no model that is supported.
    """
    folder = Path(path)
    checkpoint = read_format(folder)
    check_index(folder)
    shell = meta_model(folder)
    family = family_of(shell.config)
    with tempfile.TemporaryDirectory() as converted:
        model, places = load_on_disk(folder, Path(converted))
        stored = stored_bytes(model, places)
    path = next(name for name, module in model.named_modules() if module is decoder_of(model))
    record, notes = _record(folder)
    itemsize = model.dtype.itemsize
    rows = []
    for index, block in enumerate(decoder_blocks(shell)):
        groups = plan_block(block, index, family, checkpoint.ignore, checkpoint.weights_of)
        for group in groups:
            size = sum(packed_bytes(stored, f"{path}.layers.{index}.{linear.name}.") for linear in group.linears)
            choice = record.get((index, group.name))
            rows.append(_found(group, index, groups, checkpoint, choice, size, itemsize))
    before, after = sizes_by_part(model, family, stored, itemsize)
    head = checkpoint.lm_head is None
    encoders = plan_encoders(shell, family, checkpoint.encoders, checkpoint.ignore)
    return Description(
        str(folder),
        family.title,
        tuple(m.value for m in checkpoint.modalities),
        checkpoint.scheme,
        record.get("method"),
        len(decoder_blocks(shell)),
        merged(rows),
        skipped_parts(shell, family, checkpoint.ignore, after, encoders, head=head),
        {part: {"before": before[part], "after": after[part]} for part in PARTS},
        "those that were kept" if any(row.patches for row in rows) else "none",
        {family.encoders[name].value: scheme for name, scheme in checkpoint.encoders.items()},
        notes,
        _memory(model, stored),
    )


def _record(folder: Path) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """From report.json: the method, and per block and group what was chosen; with a note if there is none to read."""
    file = folder / "report.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        choices = {(b["block"], g["group"]): str(g["choice"]) for b in found["blocks"] for g in b["groups"]}
        return {**choices, "method": str(found["method"])}, ()
    except FileNotFoundError:
        return {}, ("there is no report.json, which would say where text is smoothed",)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return {}, (f"{file} cannot be read ({error!r}); it would say where text is smoothed",)


def _found(
    group: GroupPlan,
    index: int,
    groups: Sequence[GroupPlan],
    checkpoint: CheckpointFormat,
    choice: str | None,
    size: int,
    itemsize: int,
) -> GroupRow:
    """Row of one group of one block of a checkpoint."""
    site = checkpoint.sites.get(site_key(index, group.name), Site())
    folds = group.group.folds_text and group_rotation(group, checkpoint.rotations) is None
    if not folds or (choice or "").startswith("no smoothing"):
        text = "none"
    else:
        text = f"folded into {of_experts(group.group.fold_into)}" if choice else "not known"
    return _row(
        group,
        index,
        checkpoint.activations.num_bits,
        itemsize,
        text_vector=text,
        own_vectors="one per modality" if site.has_smooth_scale else "none",
        rotated=rotated_parts(group, groups, checkpoint.rotations),
        patches=dict(site.ranks),
        after=size,
    )


def _memory(model: PreTrainedModel, stored: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a loaded checkpoint by kind, from its tensors' storages; of its quantized linears also on disk."""
    sizes, linears = resident_bytes(model), quantized_linears(model)
    own = sum(size for name, size in stored.items() if any(owner in linears for owner in owners(name)))
    return {
        "quantized_linears": len(linears),
        "packed_on_disk": own,
        "packed_in_memory": sizes["packed"] + sizes["smooth_scale"] + sizes["compensation"],
        **sizes,
    }
