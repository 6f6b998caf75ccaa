# SPDX-License-Identifier: Apache-2.0
"""Looking without touching: what a recipe would do to a model, what a checkpoint holds, and how the modalities'
activations differ. No weights are held in memory for the first two."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .api import load_processor
from .calibration.dataset import load_samples
from .calibration.statistics import describe_ranges
from .checking import check_index, owners, read_format, resident_bytes
from .checkpoint.format import CheckpointFormat, Site
from .checkpoint.shards import read_header
from .compensation import ALL_TOKENS
from .integrations.loading import load_on_disk, load_streamed, meta_model
from .integrations.transformers import quantized_linears
from .modality import ModalityState
from .models import (
    ModelFamily,
    core_of,
    decoder_blocks,
    decoder_of,
    family_of,
    groups_of,
    linear_of,
    modality_tokens_of,
)
from .pipeline import Calibration, without_inexact
from .plan import (
    GroupPlan,
    LinearPlan,
    OuterPlan,
    group_rotation,
    is_ignored,
    linear_names,
    make_plan,
    plan_block,
    plan_encoders,
    site_key,
    tensor_bytes,
)
from .progress import AbstractProgress
from .recipe import Recipe
from .rotation import Rotations
from .run import Run
from .runtime import MasquantLinear
from .runtime.head import is_tied
from .runtime.outer import OUTER_BITS
from .solver import MOST_RANKS, patch_rank

PARTS = ("decoder linears", "rest of the decoder", "embeddings", "lm_head", "encoders", "other")


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
class Skipped:
    """What stays in floating point and why; `count` modules or linears."""

    name: str
    reason: str
    count: int
    bytes: int


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


def ranges_of(numbers: Sequence[int]) -> str:
    """Like "0-2, 5" of sorted numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def of_experts(name: str) -> str:
    """A name with the numbers of experts left out."""
    return re.sub(r"experts\.\d+\.", "experts.*.", name)


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
        after |= _eight_bit_bytes(shell)
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
    first, fold_into = group.linears[0], of_experts(group.group.fold_into)
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
    return GroupRow(
        of_experts(group.name),
        (index,),
        1,
        tuple(of_experts(linear.name) for linear in group.linears),
        group.in_features,
        tuple(linear.out_features for linear in group.linears),
        first.num_bits,
        recipe.scheme.input_activations.num_bits,
        first.group_size or "channel",
        text,
        own if recipe.selection is None or own == "none" else f"{own}, where it pays",
        rotated_parts(group, groups, recipe.rotations),
        _largest_ranks(group, recipe, family),
        sum(linear.in_features * linear.out_features for linear in group.linears) * itemsize,
        group.packed_bytes,
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


def _eight_bit_bytes(shell: PreTrainedModel) -> dict[str, int]:
    """Bytes of embeddings and head with 8-bit rows; a tied head has none."""
    core = core_of(shell)
    embeddings, head = core.get_input_embeddings(), core.get_output_embeddings()
    sizes = {"embeddings": 0, "lm_head": 0}
    for part, module in (("embeddings", embeddings), ("lm_head", None if is_tied(shell) else head)):
        if module is not None:
            rows, columns = module.weight.shape
            sizes[part] = LinearPlan(part, columns, rows, False, OUTER_BITS, None).packed_bytes
    return sizes


def part_namer(model: PreTrainedModel, family: ModelFamily) -> Callable[[str], str]:
    """A function from a tensor's name in a model to its part, one of `PARTS` but the first."""
    core = core_of(model)
    wanted = {"embeddings": core.get_input_embeddings(), "lm_head": core.get_output_embeddings()}
    wanted["rest of the decoder"] = decoder_of(model)
    paths = {part: name for name, module in model.named_modules() for part, own in wanted.items() if module is own}

    def part_of(name: str) -> str:
        for part in ("embeddings", "lm_head", "rest of the decoder"):
            if part in paths and name.startswith(f"{paths[part]}."):
                return part
        return "other" if family.encoder_of(name) is None else "encoders"

    return part_of


def part_sizes(model: PreTrainedModel, family: ModelFamily) -> dict[str, int]:
    """Bytes of a float model's tensors by part, tied ones once; the blocks' linears are in the decoder's rest."""
    part_of, seen, sizes = part_namer(model, family), set(), dict.fromkeys(PARTS, 0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            sizes[part_of(name)] += tensor.nbytes
    return sizes


def skipped_parts(
    shell: PreTrainedModel,
    family: ModelFamily,
    ignore: Sequence[str],
    sizes: Mapping[str, int],
    encoders: Sequence[OuterPlan],
    *,
    head: bool,
) -> tuple[Skipped, ...]:
    """What stays in floating point and why.

    Args:
        shell: the float model on the meta device.
        family: of the model.
        ignore: patterns of linears.
        sizes: bytes by part, of what is in floating point there.
        encoders: linears of encoders that get 8-bit rows.
        head: whether embeddings and head stay.
    """
    blocks, found = decoder_blocks(shell), []
    names = list(linear_names(family, blocks))
    for number, pattern in enumerate(ignore):
        own = [n for n in names if is_ignored(n, [pattern]) and not is_ignored(n, ignore[:number])]
        size = sum(_linear_bytes(blocks, name) for name in own)
        if own:
            found.append(Skipped(_shortened(own), f"ignored by the pattern {pattern}", len(own), size))
    kept: dict[str, list[int]] = {}
    for block in blocks:
        readers = {name for group in groups_of(block, family) for name in group.readers}
        for name, module in block.named_modules():
            if name in readers | set(family.kept):
                kept.setdefault(name, []).append(tensor_bytes(module))
    for name, own_sizes in kept.items():
        found.append(Skipped(name, "kept by the family", len(own_sizes), sum(own_sizes)))
    rest = sizes["rest of the decoder"] - sum(s.bytes for s in found)
    found.append(Skipped("norms, biases and the like", "no linear's weight", len(blocks), rest))
    if head:
        for part in ("embeddings", "lm_head"):
            if sizes[part]:
                found.append(Skipped(part, "outside of the blocks; --quantize-lm-head gives 8 bits", 1, sizes[part]))
    for encoder, size in _encoder_sizes(shell, family).items():
        own_linears = [e for e in encoders if (family.encoder_of(e.linear.name) or ("",))[0] == encoder]
        rest = size - sum(weight_bytes(shell, e) for e in own_linears)
        if own_linears:
            found.append(Skipped(encoder, "convolutions, norms, biases and linears that are left", 1, rest))
        else:
            found.append(Skipped(encoder, "an encoder with its projector; --quantize-encoders gives 8 bits", 1, rest))
    if sizes["other"]:
        found.append(Skipped("other modules", "outside of the decoder", 1, sizes["other"]))
    return tuple(found)


def weight_bytes(shell: PreTrainedModel, outer: OuterPlan) -> int:
    """Of the weight of a linear of an encoder, as it is in a model."""
    return shell.get_submodule(outer.path).get_parameter("weight").nbytes


def _encoder_sizes(shell: PreTrainedModel, family: ModelFamily) -> dict[str, int]:
    """Bytes of each encoder's tensors, each tensor once."""
    part_of, seen, sizes = part_namer(shell, family), set(), dict[str, int]()
    for name, tensor in shell.state_dict(keep_vars=True).items():
        encoder = family.encoder_of(name)
        if encoder is not None and part_of(name) == "encoders" and id(tensor) not in seen:
            seen.add(id(tensor))
            sizes[encoder[0]] = sizes.get(encoder[0], 0) + tensor.nbytes
    return sizes


def _linear_bytes(blocks: Sequence[nn.Module], name: str) -> int:
    _, index, local = name.split(".", 2)
    weight = linear_of(blocks[int(index)], local).weight
    return weight.numel() * weight.element_size()


def _shortened(names: Sequence[str]) -> str:
    """Names of linears below the decoder with the numbers of their blocks together."""
    by_local: dict[str, set[int]] = {}
    for name in names:
        _, index, local = name.split(".", 2)
        by_local.setdefault(of_experts(local), set()).add(int(index))
    return "; ".join(f"{local} of blocks {ranges_of(sorted(indices))}" for local, indices in by_local.items())


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
        stored = _stored_bytes(model, places)
    path = next(name for name, module in model.named_modules() if module is decoder_of(model))
    record, notes = _record(folder)
    itemsize = model.dtype.itemsize
    rows = []
    for index, block in enumerate(decoder_blocks(shell)):
        groups = plan_block(block, index, family, checkpoint.ignore, checkpoint.weights_of)
        for group in groups:
            size = sum(_packed(stored, f"{path}.layers.{index}.{linear.name}.") for linear in group.linears)
            choice = record.get((index, group.name))
            rows.append(_found(group, index, groups, checkpoint, choice, size, itemsize))
    before, after = _sizes(model, family, stored, itemsize)
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


def _stored_bytes(model: PreTrainedModel, places: Mapping[str, tuple[Path, str]]) -> dict[str, int]:
    """Bytes on disk of every tensor of a model, tied ones once."""
    entries = {file: read_header(file)[0] for file in {file for file, _ in places.values()}}
    sizes, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = places.get(name)
        if place is None:
            sizes[name] = 0 if place in seen else tensor.nbytes
        elif place not in seen:
            start, stop = entries[place[0]][place[1]]["data_offsets"]
            sizes[name] = stop - start
        seen.add(place)
    return sizes


def _packed(stored: Mapping[str, int], prefix: str) -> int:
    """Bytes of a quantized linear's tensors but its bias, by what their names begin with."""
    return sum(size for name, size in stored.items() if name.startswith(prefix) and name != f"{prefix}bias")


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
    first = group.linears[0]
    return GroupRow(
        of_experts(group.name),
        (index,),
        1,
        tuple(of_experts(linear.name) for linear in group.linears),
        group.in_features,
        tuple(linear.out_features for linear in group.linears),
        first.num_bits,
        checkpoint.activations.num_bits,
        first.group_size or "channel",
        text,
        "one per modality" if site.has_smooth_scale else "none",
        rotated_parts(group, groups, checkpoint.rotations),
        dict(site.ranks),
        sum(linear.in_features * linear.out_features for linear in group.linears) * itemsize,
        size,
    )


def _sizes(
    model: PreTrainedModel, family: ModelFamily, stored: Mapping[str, int], itemsize: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part, of the float model and of the checkpoint."""
    part_of = part_namer(model, family)
    low_bit = {name: module for name, module in model.named_modules() if isinstance(module, MasquantLinear)}
    before, after = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, size in stored.items():
        owner = next((o for o in owners(name) if o in low_bit), None)
        part = part_of(name)
        if owner is not None and part == "rest of the decoder" and not name.endswith(".bias"):
            part = "decoder linears"
        after[part] += size
        if owner is None or name.endswith(".bias"):
            before[part] += size
        elif name == f"{owner}.weight_packed":
            before[part] += low_bit[owner].in_features * low_bit[owner].out_features * itemsize
    return before, after


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


def scheme_of(model: nn.Module) -> str:
    """Scheme of a loaded model, by the lowest bits where they differ; "float" if it is not quantized."""
    specs = [module.spec for module in quantized_linears(model).values()]
    return f"W{min(s.num_bits for s in specs)}A{specs[0].activation_bits}" if specs else "float"


@torch.no_grad()
def activation_ranges(
    model: str | Path, calibration: Path, *, limit: int | None, batch_size: int, progress: AbstractProgress
) -> list[dict[str, Any]]:
    """Per block and group of the float model: each modality's largest magnitude (None without tokens), the `Range` of
    its channels, and its misalignment with text."""
    device = torch.device("cpu")
    blocks = load_streamed(model, dtype="auto", device=device)
    recipe = Recipe.preset("rtn")
    plan = make_plan(blocks.model, recipe)
    state = ModalityState(modality_tokens_of(blocks.model.config))
    samples = load_samples(calibration, limit=limit)
    calibrated = Calibration(samples, batch_size, shared=False)
    inputs = calibrated.block_inputs(blocks, load_processor(model), recipe, progress)
    run = Run(blocks, recipe, plan, state, inputs, device, [], progress)
    rows = []
    for index in progress.track(range(len(plan.blocks)), "measuring", len(plan.blocks), "block"):
        targets = inputs.hidden.empty()
        statistics = run.observe(run.prepare(index), index, plan.blocks[index], targets)
        for group in plan.blocks[index]:
            found = statistics[group.name].fitting
            names = [m.value for m in state.tokens.modalities]
            described = describe_ranges(found.absmax, found.counts > 0, names)
            absmax = {n: described["channels"][n]["max"] if n in described["channels"] else None for n in names}
            rows.append({"block": index, "group": group.name, "absmax": absmax, **described})
        for i in range(len(targets)):
            inputs.hidden[i] = targets[i]
    return rows
