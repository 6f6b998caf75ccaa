# SPDX-License-Identifier: Apache-2.0
"""The model families that masquant knows, and how to find a family's parts in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import reduce
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..modality import Modality, ModalityTokens
from . import (
    gemma3,
    gemma4,
    internvl,
    llava,
    llava_onevision,
    minicpmv,
    mistral3,
    phi4_multimodal,
    qwen2_5_omni,
    qwen2_5_omni_full,
    qwen2_5_vl,
    qwen2_audio,
    qwen2_vl,
    qwen3_5,
    qwen3_omni_moe,
    qwen3_omni_moe_full,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)
from .experts import (
    EXPERT_LINEARS,
    LinearExperts,
    experts_in,
    fused_linear,
    linearize_experts,
    number_of_experts,
    token_rows,
)
from .family import LinearGroup, ModelFamily

__all__ = [
    "FAMILIES",
    "LinearExperts",
    "LinearGroup",
    "ModelFamily",
    "core_of",
    "decoder_blocks",
    "decoder_of",
    "encoder_linears",
    "experts_in",
    "family_of",
    "groups_of",
    "linear_of",
    "linearize",
    "modality_tokens_of",
    "token_rows",
]

FAMILIES: tuple[ModelFamily, ...] = tuple(
    module.FAMILY
    for module in (
        qwen2_5_omni_full,
        qwen2_5_omni,
        qwen3_omni_moe_full,
        qwen3_omni_moe,
        qwen3_5,
        qwen3_vl,
        qwen3_vl_moe,
        qwen2_5_vl,
        qwen2_vl,
        llava,
        llava_onevision,
        gemma3,
        gemma4,
        smolvlm,
        internvl,
        mistral3,
        phi4_multimodal,
        minicpmv,
        qwen2_audio,
    )
)


def family_of(config: PretrainedConfig) -> ModelFamily:
    """The family of a model's config.

    Raises:
        ModelError: no family covers its `model_type`; the message names the file to add.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise ModelError(
        f"model type {config.model_type!r} is not supported (supported: {known}); to add it, describe it in "
        f"src/masquant/models/{config.model_type}.py (a few lines, see models/family.py) and list it in "
        "src/masquant/models/__init__.py"
    )


def modality_tokens_of(config: PretrainedConfig, modalities: Iterable[Modality] | None = None) -> ModalityTokens:
    """Placeholder token ids of a model, read from its config.

    Args:
        config: the model's config.
        modalities: what the checkpoint was quantized for; default all that the family has.

    Raises:
        ModelError: a config field is missing or empty.
    """
    family = family_of(config)
    own = _field(config, f"{family.core}_config") if family.core else config
    chosen = family.modalities if modalities is None else tuple(modalities)
    token_ids: dict[Modality, tuple[int, ...]] = {}
    for modality in chosen[1:]:
        fields = family.modality_tokens[modality]
        found = tuple(int(v) for v in (_field(own, name) for name in fields) if v is not None)
        if not found:
            raise ModelError(f"the config of {config.model_type} sets none of {', '.join(fields)}")
        token_ids[modality] = found
    return ModalityTokens(chosen, token_ids, family.last_tokens)


def _field(config: Any, path: str) -> Any:
    """A config's field, of a part of it where the path has dots; None if it is missing."""
    return reduce(lambda part, name: getattr(part, name, None), path.split("."), config)


def core_of(model: PreTrainedModel) -> PreTrainedModel:
    """The multimodal language model inside `model`, which is calibrated and quantized; mostly `model` itself."""
    core = next((f.core for f in FAMILIES if model.config.model_type in f.model_types), "")
    return cast(PreTrainedModel, model.get_submodule(core))


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The language model inside `model`: the module that holds the decoder blocks.

    Raises:
        ModelError: none was found.
    """
    decoder = core_of(model).get_decoder()
    for candidate in (decoder, getattr(decoder, "language_model", None), getattr(decoder, "model", None)):
        if isinstance(candidate, nn.Module) and isinstance(getattr(candidate, "layers", None), nn.ModuleList):
            return candidate
    raise ModelError(f"{type(model).__name__} has no decoder with a list of layers")


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order."""
    return list(cast(nn.ModuleList, decoder_of(model).layers))


def encoder_linears(model: PreTrainedModel, family: ModelFamily) -> Iterator[tuple[str, str, nn.Linear]]:
    """The linears of the encoders: name from the encoder on, path in the whole model, and the linear.

    Convolutions, and linears that another module reads the weights of (its class is then not `nn.Linear` itself), are
    none of them.
    """
    inside = {id(module) for block in decoder_blocks(model) for module in block.modules()}
    prefix = f"{family.core}." if family.core else ""
    for path, module in core_of(model).named_modules():
        found = family.encoder_of(path)
        if type(module) is nn.Linear and found is not None and id(module) not in inside:
            yield found[1], prefix + path, module


def groups_of(block: nn.Module, family: ModelFamily) -> tuple[LinearGroup, ...]:
    """The linear groups of one block: the family's, with those of each expert where the block has experts."""
    count = number_of_experts(block, family.experts) if family.experts else 0
    shared = []
    for group in family.groups:
        present = tuple(n for n in group.linears if not (count or n in group.optional) or _has(block, n))
        if present:
            shared.append(replace(group, linears=present))

    def of_expert(group: LinearGroup, number: int) -> LinearGroup:
        linears = tuple(name.format(number) for name in group.linears)
        return replace(
            group, name=group.name.format(number), linears=linears, fold_into=group.fold_into.format(number)
        )

    return (*shared, *(of_expert(g, number) for number in range(count) for g in family.expert_groups))


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def linearize(block: nn.Module, family: ModelFamily) -> nn.Module:
    """The block itself, its fused experts (if it has any) replaced by linear ones; it computes the same."""
    if family.experts:
        linearize_experts(block, family.experts)
    return block


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear `name` of a block; of fused experts a view on their weight.

    Raises:
        ModelError: it does not exist or is no `nn.Linear`.
    """
    try:
        module = block.get_submodule(name)
    except AttributeError as error:
        container, _, local = name.rpartition(".")
        container, _, number = container.rpartition(".")
        if number.isdecimal() and local in EXPERT_LINEARS and number_of_experts(block, container) > int(number):
            return fused_linear(block, container, int(number), local)
        raise ModelError(f"{type(block).__name__} has no module {name}") from error
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"{type(block).__name__}.{name} is {type(module).__name__}, not nn.Linear; is the model already quantized?"
        )
    return module
