# SPDX-License-Identifier: Apache-2.0
"""What a recipe will do to a model: which linears are quantized how, which stay, bytes before and after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from .errors import ModelError, RecipeError
from .modality import Modality
from .models import LinearGroup, ModelFamily, core_of, decoder_blocks, encoder_linears, family_of, groups_of, linear_of
from .recipe import ENCODER_SCHEMES, EncoderScheme, Recipe, WeightArgs
from .rotation import Rotation, Rotations


@dataclass(frozen=True)
class LinearPlan:
    """One linear: name inside the block, shape, the weight's bits, and inputs per weight scale (None: one a row)."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    num_bits: int
    group_size: int | None

    @property
    def grid(self) -> WeightArgs:
        """Of the weight, without automatic group size."""
        return WeightArgs(self.num_bits, "group" if self.group_size else "channel", self.group_size)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight, its scales and its shape."""
        words = -(-self.in_features // (32 // self.num_bits))
        scales = self.in_features // (self.group_size or self.in_features)
        return self.out_features * (4 * words + 2 * scales) + 16


@dataclass(frozen=True)
class GroupPlan:
    """One linear group of one block: what is quantized, and members left in floating point."""

    group: LinearGroup
    linears: tuple[LinearPlan, ...]
    kept: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the group."""
        return self.group.name

    @property
    def role(self) -> str:
        """What the group is: `qkv`, `o`, `gate_up` or `down`."""
        return self.group.role

    @property
    def in_features(self) -> int:
        """Features of the shared input."""
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        """Rows of all its quantized linears."""
        return sum(linear.out_features for linear in self.linears)

    @property
    def packed_bytes(self) -> int:
        """Bytes of its packed weights."""
        return sum(linear.packed_bytes for linear in self.linears)

    def with_grid(self, grid: WeightArgs) -> GroupPlan:
        """The same with another grid for all its linears."""
        size = grid.group_size_for(self.in_features)
        linears = tuple(replace(p, num_bits=grid.num_bits, group_size=size) for p in self.linears)
        return replace(self, linears=linears)


@dataclass(frozen=True)
class OuterPlan:
    """A linear outside of the blocks: its shape with its name from the encoder on, its path in the whole model, and
    the bits of its input."""

    linear: LinearPlan
    path: str
    activation_bits: int


def default_encoders(family: ModelFamily) -> dict[Modality, EncoderScheme]:
    """What `--quantize-encoders` asks for: 8-bit weights, and 8-bit inputs where they come from pictures."""
    wanted: dict[Modality, EncoderScheme] = {Modality.VISION: "W8A8", Modality.AUDIO: "W8A16"}
    return {modality: scheme for modality, scheme in wanted.items() if modality in family.encoders.values()}


def encoder_schemes(family: ModelFamily, recipe: Recipe) -> dict[str, EncoderScheme]:
    """Scheme of every encoder module that the recipe quantizes, by its name.

    Raises:
        RecipeError: the recipe names a modality that the family has no encoder for.
    """
    for modality in recipe.encoders:
        if modality not in family.encoders.values():
            raise RecipeError(f"{family.title} has no {modality.value} encoder; take it out of the recipe's encoders")
    return {name: recipe.encoders[m] for name, m in family.encoders.items() if m in recipe.encoders}


def plan_encoders(
    model: PreTrainedModel, family: ModelFamily, schemes: Mapping[str, EncoderScheme], ignore: Iterable[str]
) -> tuple[OuterPlan, ...]:
    """The encoders' linears that get 8-bit rows.

    Args:
        model: with plain `nn.Linear` modules, possibly on the meta device.
        family: of the model.
        schemes: by the encoder's name.
        ignore: patterns of linears that stay.
    """
    ignore = tuple(ignore)
    return tuple(
        OuterPlan(
            LinearPlan(name, module.in_features, module.out_features, module.bias is not None, 8, None),
            path,
            ENCODER_SCHEMES[schemes[encoder]],
        )
        for name, path, module in encoder_linears(model, family)
        for encoder in schemes
        if name == encoder or name.startswith(f"{encoder}.")
        if not is_ignored(name, ignore)
    )


def left_outside(model: PreTrainedModel, family: ModelFamily, encoders: Iterable[OuterPlan]) -> list[str]:
    """What stays in floating point outside of the blocks: modules, and single linears of quantized encoders."""
    planned = {plan.linear.name for plan in encoders}
    touched = {found[0] for found in map(family.encoder_of, planned) if found}
    others = tuple(map(module_pattern, family.others))
    single = []
    for path, module in core_of(model).named_modules():
        found = family.encoder_of(path)
        if isinstance(module, nn.Linear) and found is not None and found[0] in touched:
            single += [found[1]] if found[1] not in planned and not is_ignored(found[1], others) else []
    whole = [name for name in family.encoders if name not in touched]
    return [*whole, *family.others, *single, *(["convolutions"] if touched else []), "embeddings", "lm_head", "norms"]


def module_pattern(name: str) -> str:
    """The pattern, as in `ignore`, of all that a module holds."""
    return f"re:.*{re.escape(name)}.*"


def group_rotation(group: GroupPlan | None, rotations: Rotations | None) -> Rotation | None:
    """Rotation of a group's input when the model runs; none where a member stays in floating point."""
    if group is None or rotations is None or group.kept:
        return None
    return rotations.of_group(group.role, group.in_features)


def folds_text(group: GroupPlan, rotations: Rotations | None) -> bool:
    """Whether text's vector can be folded into what feeds a group: not where the input is rotated on its way."""
    return group.group.folds_text and group_rotation(group, rotations) is None


def site_key(block: int, group: str) -> str:
    """Key of one group of one block in the checkpoint's `sites` and in reports."""
    return f"{block}.{group}"


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a linear's name below the decoder, such as "layers.3.mlp.down_proj", matches a pattern."""
    return any(re.match(p[3:], name) if p.startswith("re:") else name == p for p in patterns)


def linear_names(family: ModelFamily, blocks: Iterable[nn.Module]) -> Iterator[str]:
    """Names below the decoder of all linears that could be quantized."""
    for index, block in enumerate(blocks):
        for group in groups_of(block, family):
            for linear in group.linears:
                yield f"layers.{index}.{linear}"


def plan_block(
    block: nn.Module,
    index: int,
    family: ModelFamily,
    ignore: Iterable[str],
    weights: Callable[[str], WeightArgs],
) -> tuple[GroupPlan, ...]:
    """Groups of one block, without those that are ignored as a whole.

    Args:
        block: with plain `nn.Linear` modules, possibly on the meta device.
        index: its number.
        family: of the model.
        ignore: patterns of linears that stay.
        weights: the weight's grid of a linear, by its name below the decoder.
    """
    ignore = tuple(ignore)
    plans = []
    for group in groups_of(block, family):
        linears, kept = [], []
        for name in group.linears:
            if is_ignored(f"layers.{index}.{name}", ignore):
                kept.append(name)
                continue
            linear = linear_of(block, name)
            grid = weights(f"layers.{index}.{name}")
            try:
                size = grid.group_size_for(linear.in_features)
            except RecipeError as error:
                raise RecipeError(f"layers.{index}.{name}: {error}") from error
            shape = linear.in_features, linear.out_features
            linears.append(LinearPlan(name, *shape, linear.bias is not None, grid.num_bits, size))
        if linears:
            plans.append(GroupPlan(group, tuple(linears), tuple(kept)))
    return tuple(plans)


@dataclass(frozen=True)
class Plan:
    """A whole model's plan.

    Attributes:
        family: of the model.
        blocks: per block, its groups.
        kept: linears of the decoder that stay in floating point because the recipe ignores them.
        float_bytes: of the linears to be quantized, as they are now.
        packed_bytes: of the same, quantized, without vectors and patches.
        encoders: linears of encoders that get 8-bit rows.
        encoder_bytes: of these, with biases, as they are now.
        not_quantized: what stays in floating point whatever happens in the blocks, embeddings and head included:
            modules, single linears of encoders that get 8-bit rows, and `kept`.
        other_bytes: of everything outside of the linears to be quantized in the blocks.
        notes: what a user should know.
    """

    family: ModelFamily
    blocks: tuple[tuple[GroupPlan, ...], ...]
    kept: tuple[str, ...]
    float_bytes: int
    packed_bytes: int
    encoders: tuple[OuterPlan, ...]
    encoder_bytes: int
    not_quantized: tuple[str, ...]
    other_bytes: int
    notes: tuple[str, ...]


def tensor_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def make_plan(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """What `recipe` would do to `model`; nothing is changed.

    Raises:
        ModelError: unsupported model, or a linear in a block that no group covers.
        RecipeError: a modality that the recipe forbids, an ignore pattern without a match, a group size that does not
            divide.
    """
    family = family_of(model.config)
    forbidden = [m.value for m in family.modalities if m not in recipe.modalities]
    if forbidden:
        raise RecipeError(
            f"{family.title} has {', '.join(forbidden)} tokens, which the recipe's modalities "
            f"({', '.join(m.value for m in recipe.modalities)}) forbid; add them to the recipe"
        )
    blocks = decoder_blocks(model)
    schemes = encoder_schemes(family, recipe)
    names = [
        *linear_names(family, blocks),
        *(linear.linear.name for linear in plan_encoders(model, family, schemes, ())),
    ]
    for pattern in recipe.ignore:
        if not any(is_ignored(name, [pattern]) for name in names):
            raise RecipeError(f"ignore pattern {pattern!r} matches none of the linears, such as {names[0]!r}")
    for index, block in enumerate(blocks):
        known = {name for group in groups_of(block, family) for name in (*group.linears, *group.readers)}
        known.update(family.kept)
        stray = [n for n, m in block.named_modules() if isinstance(m, nn.Linear) and n not in known]
        if stray:
            raise ModelError(f"layers.{index}.{stray[0]} belongs to no linear group of {family.title}")
    plans = tuple(
        plan_block(b, i, family, recipe.ignore, lambda _: recipe.scheme.weights) for i, b in enumerate(blocks)
    )
    quantized = [
        (linear_of(blocks[i], linear.name), linear)
        for i, groups in enumerate(plans)
        for g in groups
        for linear in g.linears
    ]
    if not quantized:
        raise RecipeError("the recipe ignores every linear of the decoder: nothing to quantize")
    others = map(module_pattern, family.others)
    encoders = plan_encoders(model, family, schemes, (*recipe.ignore, *others))
    kept = tuple(name for name in linear_names(family, blocks) if is_ignored(name, recipe.ignore))
    float_bytes = sum(m.weight.numel() * m.weight.element_size() for m, _ in quantized)
    return Plan(
        family,
        plans,
        kept,
        float_bytes,
        sum(linear.packed_bytes for _, linear in quantized),
        encoders,
        sum(tensor_bytes(model.get_submodule(linear.path)) for linear in encoders),
        (*left_outside(model, family, encoders), *kept),
        tensor_bytes(model) - float_bytes,
        _group_size_notes(plans, recipe.scheme.weights),
    )


def _group_size_notes(plans: Iterable[tuple[GroupPlan, ...]], weights: WeightArgs) -> tuple[str, ...]:
    """Where the automatic group size is not the default."""
    if weights.strategy == "channel" or weights.group_size is not None:
        return ()
    smaller = {
        (linear.group_size, linear.in_features): linear.name
        for groups in plans
        for g in groups
        for linear in g.linears
        if linear.group_size != 128
    }
    return tuple(
        f"group size {size} where 128 does not divide {features} input features (such as {name})"
        for (size, features), name in sorted(smaller.items(), key=str)
    )
