# SPDX-License-Identifier: Apache-2.0
"""`quantization_config` of a checkpoint: written, read back strictly, and what tensors it promises.

The grammar of `config_groups` and `ignore` is compressed-tensors'. Names in `ignore` and `sites` are relative to the
decoder ("layers.3.mlp.down_proj", "3.down"), because module paths above it differ between library versions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compensation import ALL_TOKENS, FACTOR_DTYPES
from ..errors import CheckpointError, RecipeError
from ..modality import Modality
from ..models import ModelFamily
from ..plan import GroupPlan, LinearPlan, module_pattern, site_key
from ..quantization import PACKED_BITS, SCALE_DTYPE, packed_columns
from ..recipe import ENCODER_SCHEMES, GROUP_NAMES, ActivationArgs, EncoderScheme, WeightArgs
from ..rotation import Rotations
from ..runtime.linear import SMOOTH_DTYPE
from ..runtime.outer import OUTER_BITS
from ..strict import from_plain, to_plain

QUANT_METHOD = "masquant"
FORMAT_VERSION = 2  # 2: rotations, patches of all tokens, weight scales of either sign
READABLE_VERSIONS = (1, 2)

_KEYS = {"quant_method", "format_version", "config_groups", "ignore", "modalities", "modality_tokens", "sites"}
_LATER_KEYS = {"lm_head", "encoders"}  # of version 2, where there is something to say


@dataclass(frozen=True)
class Site:
    """What a group has besides packed weights: own vectors per modality, and ranks of patches by modality or "all"."""

    has_smooth_scale: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    factors: str = "bfloat16"

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `parse_site` reads it back."""
        factors = {} if self.factors == "bfloat16" else {"factors": self.factors}
        return {"smooth_scale": self.has_smooth_scale, "rank": dict(self.ranks), **factors}


@dataclass(frozen=True)
class HeadFormat:
    """Embeddings and head with 8-bit rows; `tied` if they are one tensor, the embeddings'."""

    tied: bool
    num_bits: int = OUTER_BITS


@dataclass(frozen=True)
class CheckpointFormat:
    """A parsed `quantization_config`.

    Attributes:
        weights: grid of each linear, by target pattern, first match wins.
        activations: grid of the input.
        ignore: patterns of linears in floating point.
        modalities: text first.
        modality_tokens: per modality, the config fields with its placeholder token ids.
        sites: per "<block>.<group>", what it has beyond the base.
        rotations: of the model, None if it has none.
        lm_head: embeddings and head, None if they are in floating point.
        encoders: scheme of the encoders with 8-bit rows, by their modules' names.
    """

    weights: tuple[tuple[str, WeightArgs], ...]
    activations: ActivationArgs
    ignore: tuple[str, ...]
    modalities: tuple[Modality, ...]
    modality_tokens: Mapping[Modality, tuple[str, ...]]
    sites: Mapping[str, Site]
    rotations: Rotations | None = None
    lm_head: HeadFormat | None = None
    encoders: Mapping[str, EncoderScheme] = field(default_factory=dict)

    def weights_of(self, linear: str) -> WeightArgs:
        """Grid of a linear, by its name below the decoder ("layers.3.mlp.down_proj").

        Raises:
            CheckpointError: no config group targets it.
        """
        for target, weights in self.weights:
            if target == "Linear" or (target.startswith("re:") and re.match(target[3:], linear)):
                return weights
        raise CheckpointError(f"no config group of the checkpoint targets {linear}")

    @property
    def scheme(self) -> str:
        """Like "W4A8", by the lowest bits where they differ."""
        return f"W{min(grid.num_bits for _, grid in self.weights)}A{self.activations.num_bits}"

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` as JSON."""
        activations = {
            "num_bits": self.activations.num_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        by_grid: dict[tuple[bool, WeightArgs], list[str]] = {}
        for target, weights in self.weights:
            by_grid.setdefault((_names_a_block(target), weights), []).append(target)
        groups = {}
        for i, ((_, weights), targets) in enumerate(by_grid.items()):
            entry: dict[str, Any] = {"num_bits": weights.num_bits, "type": "int", "symmetric": True}
            entry["strategy"] = weights.strategy
            if weights.group_size is not None:
                entry["group_size"] = weights.group_size
            groups[f"group_{i}"] = {
                "targets": targets,
                "weights": entry,
                "input_activations": activations if self.activations.num_bits < 16 else None,
            }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "config_groups": groups,
            "ignore": list(self.ignore),
            "modalities": [m.value for m in self.modalities],
            "modality_tokens": {m.value: list(fields) for m, fields in self.modality_tokens.items()},
            "sites": {key: site.to_dict() for key, site in self.sites.items()},
            "rotation": None if self.rotations is None else to_plain(self.rotations),
            **({} if self.lm_head is None else {"lm_head": to_plain(self.lm_head)}),
            **({"encoders": dict(self.encoders)} if self.encoders else {}),
        }


def _names_a_block(target: str) -> bool:
    return "layers\\." in target


def _targets(blocks: Sequence[Sequence[GroupPlan]]) -> tuple[tuple[str, WeightArgs], ...]:
    """Targets with their grids: the linears of single blocks that differ first, then what is usual for each name."""
    by_name: dict[str, list[tuple[int, WeightArgs]]] = {}
    for index, groups in enumerate(blocks):
        for linear in (linear for group in groups for linear in group.linears):
            by_name.setdefault(linear.name, []).append((index, linear.grid))
    usual = {name: Counter(grid for _, grid in found).most_common(1)[0][0] for name, found in by_name.items()}
    special = tuple(
        (f"re:.*layers\\.{index}\\.{re.escape(name)}$", grid)
        for name, found in by_name.items()
        for index, grid in found
        if grid != usual[name]
    )
    if len(set(usual.values())) == 1:
        return (*special, ("Linear", next(iter(usual.values()))))
    return (*special, *((f"re:.*{re.escape(name)}$", grid) for name, grid in usual.items()))


def make_format(
    family: ModelFamily,
    blocks: Sequence[Sequence[GroupPlan]],
    activations: ActivationArgs,
    ignore: Sequence[str],
    sites: Mapping[str, Site],
    rotations: Rotations | None,
    lm_head: HeadFormat | None = None,
    encoders: Mapping[str, EncoderScheme] | None = None,
) -> CheckpointFormat:
    """Format of a quantized model; one config group per grid that occurs."""
    grids, encoders = _targets(blocks), dict(encoders or {})
    head = () if lm_head is not None else ("lm_head",)
    outside = (*(name for name in family.encoders if name not in encoders), *family.others)
    kept = (*head, *map(module_pattern, outside), *ignore)
    tokens = dict(family.modality_tokens)
    return CheckpointFormat(
        grids, activations, kept, family.modalities, tokens, dict(sites), rotations, lm_head, encoders
    )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(f"quantization_config: {message}")


def _parse_group(name: str, entry: Any) -> tuple[list[tuple[str, WeightArgs]], ActivationArgs]:
    _need(isinstance(entry, Mapping), f"config group {name} must be a mapping")
    _need(set(entry) == {"targets", "weights", "input_activations"}, f"config group {name} has keys {sorted(entry)}")
    weights, activations, targets = entry["weights"], entry["input_activations"], entry["targets"]
    _need(isinstance(weights, Mapping), f"{name}.weights must be a mapping")
    extra = set(weights) - {"num_bits", "type", "symmetric", "strategy", "group_size"}
    _need(not extra, f"{name}.weights has unknown keys {sorted(extra)}")
    _need(weights.get("type") == "int" and weights.get("symmetric") is True, f"{name}.weights must be symmetric int")
    _need(weights.get("num_bits") in PACKED_BITS, f"{name}.weights.num_bits is {weights.get('num_bits')!r}")
    _need(weights.get("strategy") in ("channel", "group"), f"{name}.weights.strategy is {weights.get('strategy')!r}")
    if weights["strategy"] == "group":
        _need(isinstance(weights.get("group_size"), int), f"{name}.weights.group_size is missing")
    _need(isinstance(targets, list) and all(isinstance(t, str) for t in targets), f"{name}.targets must be names")
    for target in targets:
        _need(target == "Linear" or target.startswith("re:"), f"{name} has the unknown target {target!r}")
        _regex(target)
    if activations is not None:
        wanted = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        _need(isinstance(activations, Mapping), f"{name}.input_activations must be a mapping or null")
        _need(
            {k: v for k, v in activations.items() if k != "num_bits"} == wanted,
            f"{name}.input_activations must be dynamic symmetric int per token",
        )
    try:
        grid = WeightArgs(weights["num_bits"], weights["strategy"], weights.get("group_size"))
        act = ActivationArgs(16 if activations is None else activations.get("num_bits"))
    except (RecipeError, TypeError) as error:
        raise CheckpointError(f"quantization_config: {name}: {error}") from error
    return [(target, grid) for target in targets], act


def _regex(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise CheckpointError(f"quantization_config: {pattern!r} is no regular expression: {error}") from error


def _modality(name: Any) -> Modality:
    try:
        return Modality(name)
    except ValueError as error:
        raise CheckpointError(f"quantization_config: unknown modality {name!r}") from error


def parse_site(key: str, entry: Any, modalities: tuple[Modality, ...]) -> Site:
    """Site of its JSON.

    Raises:
        CheckpointError: it is malformed, or has a patch for a modality that the model lacks.
    """
    _need(isinstance(entry, Mapping), f"site {key} is malformed")
    _need(set(entry) - {"factors"} == {"smooth_scale", "rank"}, f"site {key} is malformed")
    factors = entry.get("factors", "bfloat16")
    _need(isinstance(factors, str) and factors in FACTOR_DTYPES, f"site {key}: factors {factors!r}")
    _need(isinstance(entry["smooth_scale"], bool), f"site {key}: smooth_scale must be true or false")
    _need(isinstance(entry["rank"], Mapping), f"site {key}: rank must be a mapping")
    for name, rank in entry["rank"].items():
        known = name == ALL_TOKENS or _modality(name) in modalities[1:]
        _need(known, f"site {key}: a patch for {name}, which is no other modality of this model")
        _need(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0, f"site {key}: rank {rank!r}")
    return Site(entry["smooth_scale"], dict(entry["rank"]), factors)


def _parse_rotations(entry: Any) -> Rotations:
    try:
        rotations = from_plain(Rotations, entry, "rotation")
    except RecipeError as error:
        raise CheckpointError(f"quantization_config: {error}") from error
    _need(rotations.seed >= 0 and set(rotations.groups) <= set(GROUP_NAMES), f"rotation {entry!r} is malformed")
    return rotations


def _parse_head(entry: Any) -> HeadFormat:
    try:
        head = from_plain(HeadFormat, entry, "lm_head")
    except RecipeError as error:
        raise CheckpointError(f"quantization_config: {error}") from error
    _need(head.num_bits == OUTER_BITS, f"lm_head of {head.num_bits} bits is unknown")
    return head


def _parse_encoders(entry: Any) -> dict[str, EncoderScheme]:
    _need(isinstance(entry, Mapping), "encoders must be a mapping of modules to schemes")
    for name, scheme in entry.items():
        _need(isinstance(name, str) and bool(name), f"encoders: {name!r} is no module's name")
        _need(isinstance(scheme, str) and scheme in ENCODER_SCHEMES, f"encoders.{name}: unknown scheme {scheme!r}")
    return dict(entry)


def parse_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Read a `quantization_config`.

    Raises:
        CheckpointError: another version, a missing or unknown key, or a value out of range.
    """
    _need(config.get("quant_method") == QUANT_METHOD, f"quant_method is {config.get('quant_method')!r}")
    version = config.get("format_version")
    _need(
        version in READABLE_VERSIONS and not isinstance(version, bool),
        f"format_version {version!r} is unknown, this masquant reads {' and '.join(map(str, READABLE_VERSIONS))}; "
        "install a masquant that reads it, or quantize again",
    )
    known = _KEYS | ({"rotation"} if version != 1 else set())
    missing, extra = known - set(config), set(config) - known - (_LATER_KEYS if version != 1 else set())
    _need(not missing, f"lacks {', '.join(sorted(missing))}")
    _need(not extra, f"has unknown keys {', '.join(sorted(map(str, extra)))}")
    _need(isinstance(config["config_groups"], Mapping) and bool(config["config_groups"]), "config_groups is empty")
    weights: list[tuple[str, WeightArgs]] = []
    activations: set[ActivationArgs] = set()
    for name, entry in config["config_groups"].items():
        targets, act = _parse_group(name, entry)
        weights += targets
        activations.add(act)
    _need(bool(weights), "config_groups target nothing")
    _need(len(activations) == 1, "config groups differ in input_activations")
    _need(isinstance(config["ignore"], list) and all(isinstance(i, str) for i in config["ignore"]), "ignore: no list")
    for pattern in config["ignore"]:
        _regex(pattern)
    _need(isinstance(config["modalities"], list), "modalities must be a list")
    modalities = tuple(_modality(m) for m in config["modalities"])
    _need(bool(modalities) and modalities[0] is Modality.TEXT, "the first modality must be text")
    _need(len(set(modalities)) == len(modalities), "a modality is listed twice")
    _need(isinstance(config["modality_tokens"], Mapping), "modality_tokens must be a mapping")
    for name, fields in config["modality_tokens"].items():
        named = isinstance(fields, list) and all(isinstance(f, str) for f in fields)
        _need(named, f"modality_tokens.{name} must be a list of config fields, got {fields!r}")
    tokens = {_modality(m): tuple(fields) for m, fields in config["modality_tokens"].items()}
    _need(set(tokens) == set(modalities[1:]), "modality_tokens must cover the modalities other than text")
    _need(isinstance(config["sites"], Mapping), "sites must be a mapping")
    sites = {key: parse_site(key, entry, modalities) for key, entry in config["sites"].items()}
    return CheckpointFormat(
        tuple(weights),
        activations.pop(),
        tuple(config["ignore"]),
        modalities,
        tokens,
        sites,
        _parse_rotations(config["rotation"]) if config.get("rotation") is not None else None,
        _parse_head(config["lm_head"]) if config.get("lm_head") is not None else None,
        _parse_encoders(config.get("encoders", {})),
    )


TensorSpec = tuple[tuple[int, ...], torch.dtype | None]


def linear_tensors(linear: LinearPlan, is_leader: bool, site: Site, modalities: int) -> dict[str, TensorSpec]:
    """Tensors of one quantized linear: local name -> shape and dtype (None: any floating dtype)."""
    groups = linear.in_features // (linear.group_size or linear.in_features)
    tensors: dict[str, TensorSpec] = {
        "weight_packed": ((linear.out_features, packed_columns(linear.in_features, linear.num_bits)), torch.int32),
        "weight_scale": ((linear.out_features, groups), SCALE_DTYPE),
        "weight_shape": ((2,), torch.int64),
    }
    if linear.has_bias:
        tensors["bias"] = ((linear.out_features,), None)
    if is_leader and site.has_smooth_scale:
        tensors["smooth_scale"] = ((modalities, linear.in_features), SMOOTH_DTYPE)
    for key, rank in site.ranks.items():
        dtype = FACTOR_DTYPES[site.factors]
        if is_leader:
            tensors[f"compensation.{key}.a"] = ((rank, linear.in_features), dtype)
        if is_leader and site.factors == "int8":
            tensors[f"compensation.{key}.scale"] = ((rank,), SCALE_DTYPE)
        tensors[f"compensation.{key}.b"] = ((linear.out_features, rank), dtype)
    return tensors


def expected_tensors(blocks: Sequence[Sequence[GroupPlan]], checkpoint: CheckpointFormat) -> dict[str, TensorSpec]:
    """All tensors of the quantized linears, by name below the decoder ("layers.0.mlp.down_proj.weight_packed")."""
    tensors: dict[str, TensorSpec] = {}
    for index, groups in enumerate(blocks):
        for group in groups:
            site = checkpoint.sites.get(site_key(index, group.name), Site())
            for position, linear in enumerate(group.linears):
                local = linear_tensors(linear, position == 0, site, len(checkpoint.modalities))
                tensors.update({f"layers.{index}.{linear.name}.{name}": spec for name, spec in local.items()})
    return tensors
