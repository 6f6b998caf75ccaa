# SPDX-License-Identifier: Apache-2.0
"""Rotations that run with the model, as hooks: the residual stream's, and those of linears still in floating point."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..rotation import Rotation, Rotations

LEARNED_ROTATION = "residual_rotation"  # the decoder's buffer with the learned part, float32 [hidden, hidden]


_ATTACHED = "_masquant_residual_rotation"


def residual_rotation_of(decoder: nn.Module) -> Rotation | None:
    """The rotation that `attach_residual_rotation` attached."""
    return getattr(decoder, _ATTACHED, None)


def reserve_learned_rotation(decoder: nn.Module, rotations: Rotations | None) -> None:
    """Give the decoder its buffer for the learned part, on the meta device, to be loaded into."""
    if rotations is not None and rotations.learned:
        size = cast(Any, decoder).config.hidden_size
        decoder.register_buffer(LEARNED_ROTATION, torch.empty(size, size, device="meta"))


def attach_residual_rotation(decoder: nn.Module, rotations: Rotations | None) -> None:
    """Rotate the hidden states as they enter the first block of `decoder`, and back as they enter its last norm.

    Embeddings, encoders and lm_head stay as they are. A learned part is taken from the decoder's buffer. Nothing is
    done without a rotation.

    Raises:
        ModelError: the decoder has no last norm.
    """
    norm = getattr(decoder, "norm", None)
    size = cast(Any, decoder).config.hidden_size
    learned = getattr(decoder, LEARNED_ROTATION) if rotations and rotations.learned else None
    rotation = rotations.of_residual(size, learned) if rotations else None
    if rotation is None:
        return
    if not isinstance(norm, nn.Module):
        raise ModelError(f"{type(decoder).__name__} has no last norm `norm`; its residual stream cannot be rotated")
    residual = rotation
    setattr(decoder, _ATTACHED, residual)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (residual.apply(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": residual.apply(kwargs["hidden_states"])}

    def leave(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (residual.invert(args[0]), *args[1:])

    first = cast(nn.ModuleList, decoder.layers)[0]
    first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    norm.register_forward_pre_hook(leave)


def attach_input_rotation(linear: nn.Linear, rotation: Rotation) -> None:
    """Rotate the input of a float linear whose weight was rotated."""
    linear.register_forward_pre_hook(lambda _, args: (rotation.apply(args[0]),), prepend=True)
