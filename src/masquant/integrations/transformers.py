# SPDX-License-Identifier: Apache-2.0
"""transformers: `quant_method: masquant` for from_pretrained and save_pretrained.

Importing this module registers the method (transformers has no entry points for it). Modules have the checkpoint's own
tensor names, so the loader needs no conversion. The safetensors headers are compared with what the configuration
promises before anything is loaded: from_pretrained itself would fill a missing tensor with random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.format import QUANT_METHOD, CheckpointFormat, Site, TensorSpec, expected_tensors, parse_format
from ..checkpoint.shards import DTYPES, read_header
from ..errors import CheckpointError, ModelError
from ..modality import ModalityState, attach_routing
from ..models import (
    ModelFamily,
    decoder_blocks,
    decoder_of,
    experts_in,
    family_of,
    linearize,
    modality_tokens_of,
)
from ..plan import GroupPlan, OuterPlan, group_rotation, plan_block, plan_encoders, site_key
from ..runtime import MasquantLinear
from ..runtime.build import replace_group
from ..runtime.head import replace_head
from ..runtime.outer import OuterLinear, replace_encoders
from ..runtime.transforms import LEARNED_ROTATION, attach_residual_rotation, reserve_learned_rotation

_OWN_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "smooth_scale")


class MasquantConfig(QuantizationConfigMixin):
    """`quantization_config` of a masquant checkpoint, kept exactly as it was read."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.config = {**config, "quant_method": QUANT_METHOD}
        self.format = parse_format(self.config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Config of a dict; keyword arguments are no overrides and are handed back."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The dict written to config.json."""
        return json.loads(json.dumps(self.config))

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: there are no defaults to leave out."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"MasquantConfig({self.format.scheme})"


class MasquantQuantizer(HfQuantizer):
    """Builds the quantized modules on the meta device before loading, and routes modalities after it."""

    requires_calibration = True

    def __init__(self, quantization_config: MasquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.format: CheckpointFormat = quantization_config.format

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        blocks = build_quantized_shell(model, self.format, model.dtype)  # the shell already has the dtype asked for
        files = kwargs.get("checkpoint_files")
        if files:
            verify_checkpoint(read_headers(files), model, expected_tensors(blocks, self.format))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_loaded(model)
        check_learned_rotation(decoder_of(model))
        attach_routing(model, decoder_of(model), state_of(model))
        stream_inputs = family_of(model.config).stream_inputs
        attach_residual_rotation(decoder_of(model), self.format.rotations, stream_inputs)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the method; again is no error."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MasquantConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MasquantQuantizer)


def build_quantized_shell(
    model: PreTrainedModel, checkpoint: CheckpointFormat, dtype: torch.dtype
) -> list[tuple[GroupPlan, ...]]:
    """Replace the decoder's linears by empty quantized ones on the meta device; returns the blocks' groups.

    Raises:
        CheckpointError: the configuration does not fit the model.
    """
    family = family_of(model.config)
    if set(checkpoint.modalities) != set(family.modalities):
        raise CheckpointError(
            f"the checkpoint has modalities {[m.value for m in checkpoint.modalities]}, {family.title} has "
            f"{[m.value for m in family.modalities]}"
        )
    state = ModalityState(modality_tokens_of(model.config, checkpoint.modalities))
    plans: list[tuple[GroupPlan, ...]] = []
    used: set[str] = set()
    for index, block in enumerate(decoder_blocks(model)):
        experts = experts_in(linearize(block, family))
        if experts is not None:
            experts.state = state
        groups = plan_block(block, index, family, checkpoint.ignore, checkpoint.weights_of)
        for group in groups:
            site = checkpoint.sites.get(site_key(index, group.name), Site())
            used.add(site_key(index, group.name))
            replace_group(
                block,
                group,
                activation_bits=checkpoint.activations.num_bits,
                has_smooth_scale=site.has_smooth_scale,
                ranks=site.ranks,
                factors=site.factors,
                rotation=group_rotation(group, checkpoint.rotations),
                state=state,
                dtype=dtype,
                device="meta",
            )
        plans.append(groups)
    reserve_learned_rotation(decoder_of(model), checkpoint.rotations)
    unknown = sorted(set(checkpoint.encoders) - set(family.encoders))
    if unknown:
        raise CheckpointError(f"quantization_config: {family.title} has no encoder {unknown[0]!r}")
    encoders = plan_encoders(model, family, checkpoint.encoders, checkpoint.ignore)
    replace_encoders(model, encoders, dtype=dtype, device="meta")
    _mark_initialized(model, encoders)
    if checkpoint.lm_head is not None:
        replace_head(model, tied=checkpoint.lm_head.tied, dtype=dtype, device="meta")
    stray = sorted(set(checkpoint.sites) - used)
    if stray:
        raise CheckpointError(f"quantization_config: site {stray[0]!r} names no quantized group of the model")
    return plans


def _mark_initialized(model: nn.Module, encoders: Sequence[OuterPlan]) -> None:
    """Keep transformers from giving random weights, which packed linears lack, to the linears of MLPs and attentions:
    some encoders' classes do so after loading wherever a module is not said to be initialized."""
    for parent in {plan.path.rpartition(".")[0] for plan in encoders}:
        module: Any = model.get_submodule(parent)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own:  # nothing else in it waits for a value
            module._is_hf_initialized = True


def read_headers(files: Sequence[str | Path]) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor in safetensors files, without reading the tensors.

    Raises:
        CheckpointError: a file is no safetensors file, or two files have a tensor of one name.
    """
    found: dict[str, TensorSpec] = {}
    for file in files:
        for name, entry in read_header(file)[0].items():
            if name in found:
                raise CheckpointError(
                    f"{Path(file).name} holds {name}, which another file of the checkpoint holds too"
                )
            found[name] = (tuple(entry["shape"]), DTYPES.get(entry["dtype"]))
    return found


def verify_checkpoint(found: dict[str, TensorSpec], shell: PreTrainedModel, expected: dict[str, TensorSpec]) -> None:
    """Compare a checkpoint's tensors with what its configuration promises of decoder and encoders.

    Args:
        found: by full name on disk.
        shell: the model with its quantized modules, on the meta device.
        expected: of the decoder, see `verify_tensors`.

    Raises:
        CheckpointError: naming the tensor that is missing, extra, or of another shape or dtype.
    """
    family = family_of(shell.config)
    outside = {name: spec for name, spec in found.items() if family.encoder_of(name) is not None}
    verify_tensors({name: spec for name, spec in found.items() if name not in outside}, expected)
    _verify_encoders(outside, shell, family)


def _verify_encoders(found: dict[str, TensorSpec], shell: PreTrainedModel, family: ModelFamily) -> None:
    """Compare the tensors of the encoders, whose names end on disk as in the model, from the encoder on."""
    known: set[str] = set()
    for path, module in encoder_modules(shell).items():
        for local, buffer in module.named_buffers():
            encoder, name = family.encoder_of(f"{path}.{local}") or ("", "")
            tail = "." + name.removeprefix(f"{encoder}.")
            on_disk = next((n for n in found if n.endswith(tail) and (family.encoder_of(n) or "")[0] == encoder), None)
            if on_disk is None:
                raise CheckpointError(f"the checkpoint lacks the tensor {name}; quantize again or copy it whole")
            known.add(on_disk)
            _compare(on_disk, found[on_disk], (tuple(buffer.shape), None if local == "bias" else buffer.dtype))
            if local == "weight_packed":
                _refuse_float(on_disk, found)
    stray = sorted(name for name in found if name.endswith(_OWN_SUFFIXES) and name not in known)
    if stray:
        raise CheckpointError(f"the checkpoint has the tensor {stray[0]}, which its configuration does not know")


def _compare(name: str, found: TensorSpec, wanted: TensorSpec) -> None:
    """One tensor's shape and dtype with what they should be."""
    (shape, dtype), (actual_shape, actual_dtype) = wanted, found
    if actual_shape != shape:
        raise CheckpointError(f"{name} has shape {list(actual_shape)}, its configuration says {list(shape)}")
    if dtype is not None and actual_dtype is not dtype:
        raise CheckpointError(f"{name} has dtype {actual_dtype}, expected {dtype}")


def _refuse_float(packed: str, found: dict[str, TensorSpec]) -> None:
    """A packed weight must not be there as a float one too."""
    plain = packed.removesuffix("_packed")
    if plain in found:
        raise CheckpointError(f"the checkpoint has both {packed} and a float {plain}")


def verify_tensors(found: dict[str, TensorSpec], expected: dict[str, TensorSpec]) -> None:
    """Compare a checkpoint's tensors with what its configuration promises.

    Args:
        found: by full name on disk.
        expected: by name below the decoder, "layers.0.mlp.down_proj.weight_packed".

    Raises:
        CheckpointError: naming the tensor that is missing, extra, or of another shape or dtype.
    """
    by_suffix: dict[str, str] = {}
    for name in found:
        position = name.rfind("layers.")
        if position >= 0 and (position == 0 or name[position - 1] == "."):
            suffix = name[position:]
            own = suffix.endswith(_OWN_SUFFIXES) or ".compensation." in suffix
            if own and suffix not in expected:
                raise CheckpointError(f"the checkpoint has the tensor {name}, which its configuration does not know")
            if suffix in expected and (own or suffix not in by_suffix):
                by_suffix[suffix] = name
    prefix = next((n[: -len(s)] for s, n in by_suffix.items() if s.endswith("weight_packed")), "")
    for suffix, spec in expected.items():
        name = prefix + suffix
        if name not in found:
            raise CheckpointError(f"the checkpoint lacks the tensor {name}; quantize again or copy it whole")
        _compare(name, found[name], spec)
        if suffix.endswith(".weight_packed"):
            _refuse_float(name, found)


def _in_block(module: nn.Module) -> TypeGuard[MasquantLinear]:
    return isinstance(module, MasquantLinear) and not isinstance(module, OuterLinear)


def quantized_linears(model: nn.Module) -> dict[str, MasquantLinear]:
    """All quantized linears of the blocks by name."""
    return {name: module for name, module in model.named_modules() if _in_block(module)}


def encoder_modules(model: PreTrainedModel) -> dict[str, OuterLinear]:
    """All linears of the encoders that have 8-bit rows, by path."""
    family = family_of(model.config)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, OuterLinear) and family.encoder_of(path) is not None
    }


def state_of(model: nn.Module) -> ModalityState:
    """The modality state that the model's quantized linears share.

    Raises:
        ModelError: the model is not quantized.
    """
    for module in model.modules():
        if _in_block(module):
            return module.state
    raise ModelError(
        "the model has no masquant linears; if it comes from a masquant checkpoint, `import masquant` before loading "
        "it (transformers skips unknown quantization methods with no more than a warning), or use masquant.load"
    )


def check_loaded(model: nn.Module) -> None:
    """Check the values that a run relies on.

    Raises:
        CheckpointError: as `check_tensor`.
    """
    for name, module in model.named_modules():
        if isinstance(module, MasquantLinear) and not module.weight_packed.is_meta:  # offloaded
            for local, tensor in module.named_buffers():
                check_tensor(f"{name}.{local}", local, tensor, module)


def check_tensor(name: str, local: str, tensor: torch.Tensor, linear: MasquantLinear) -> None:
    """Check the values of one tensor of a quantized linear.

    Args:
        name: in full, for the error.
        local: inside the linear, such as "weight_scale" or "compensation.audio.a".
        tensor: as stored.
        linear: what it belongs to.

    Raises:
        CheckpointError: a scale that is zero or not finite, a stored shape that differs, bits where a row of packed
            integers has none, a patch or bias that is not finite, or a vector for text that is not folded.
    """
    if local == "weight_shape":
        wanted = [linear.out_features, linear.in_features]
        if tensor.tolist() != wanted:
            raise CheckpointError(f"{name} says {tensor.tolist()}, the model needs {wanted}")
    elif local == "weight_packed":
        unused = tensor.shape[1] * (32 // linear.spec.num_bits) - linear.in_features
        used_bits = 32 - unused * linear.spec.num_bits
        if unused and bool((tensor[:, -1].long() & 0xFFFFFFFF & (-1 << used_bits)).any()):
            raise CheckpointError(f"{name} holds bits beyond the {linear.in_features} integers of a row")
    elif local == "weight_scale":
        if not bool(((tensor != 0) & tensor.isfinite()).all()):
            raise CheckpointError(f"{name} holds values that are zero or not finite")
    elif local == "smooth_scale":
        if not bool(((tensor > 0) & tensor.isfinite()).all()):
            raise CheckpointError(f"{name} holds values that are not positive and finite")
        if not bool((tensor[0] == 1).all()):
            raise CheckpointError(f"{name}: row 0 (text) must be ones, it is folded into the model")
    else:
        check_finite(name, tensor)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor with NaN or infinity.

    Raises:
        CheckpointError: naming it.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name} holds values that are not finite")


def check_learned_rotation(decoder: nn.Module) -> None:
    """Check that the learned part of a residual rotation, if the decoder has one that is loaded, is orthogonal.

    Raises:
        CheckpointError: it is not, or was not loaded.
    """
    matrix = getattr(decoder, LEARNED_ROTATION, None)
    if matrix is not None and not matrix.is_meta:
        check_orthogonal(matrix)


def check_orthogonal(matrix: torch.Tensor) -> None:
    """Check the learned part of a residual rotation [hidden, hidden].

    Raises:
        CheckpointError: it is not orthogonal.
    """
    q = matrix.float()
    error = float((q @ q.t() - torch.eye(len(q), device=q.device)).abs().max())
    if not error < 0.05:  # also NaN
        raise CheckpointError(
            f"{LEARNED_ROTATION} is not orthogonal (off by {error:.2g}); the checkpoint lacks it or is damaged"
        )


def adopt(model: PreTrainedModel, checkpoint: CheckpointFormat) -> None:
    """Make a model that was quantized in place save and report itself like one loaded from a checkpoint."""
    config = MasquantConfig(**checkpoint.to_dict())
    model.config.quantization_config = config
    model.hf_quantizer = MasquantQuantizer(config)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
