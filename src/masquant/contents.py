# SPDX-License-Identifier: Apache-2.0
"""What a model's bytes are in: its parts before and after, and what stays in floating point and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from .checking import owners
from .checkpoint.shards import read_header
from .models import ModelFamily, core_of, decoder_blocks, decoder_of, groups_of, linear_of
from .plan import LinearPlan, OuterPlan, is_ignored, linear_names, tensor_bytes
from .runtime import MasquantLinear
from .runtime.head import is_tied
from .runtime.outer import OUTER_BITS

PARTS = ("decoder linears", "rest of the decoder", "embeddings", "lm_head", "encoders", "other")


@dataclass(frozen=True)
class Skipped:
    """What stays in floating point and why; `count` modules or linears."""

    name: str
    reason: str
    count: int
    bytes: int


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


def eight_bit_bytes(shell: PreTrainedModel) -> dict[str, int]:
    """Bytes of embeddings and head with 8-bit rows; a tied head has none."""
    core = core_of(shell)
    embeddings, head = core.get_input_embeddings(), core.get_output_embeddings()
    sizes = {"embeddings": 0, "lm_head": 0}
    for part, module in (("embeddings", embeddings), ("lm_head", None if is_tied(shell) else head)):
        if module is not None:
            rows, columns = module.weight.shape
            sizes[part] = LinearPlan(part, columns, rows, False, OUTER_BITS, None).packed_bytes
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


def stored_bytes(model: PreTrainedModel, places: Mapping[str, tuple[Path, str]]) -> dict[str, int]:
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


def packed_bytes(stored: Mapping[str, int], prefix: str) -> int:
    """Bytes of a quantized linear's tensors but its bias, by what their names begin with."""
    return sum(size for name, size in stored.items() if name.startswith(prefix) and name != f"{prefix}bias")


def sizes_by_part(
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
