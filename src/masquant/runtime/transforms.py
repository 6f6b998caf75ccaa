# SPDX-License-Identifier: Apache-2.0
"""Rotations that run with the model, as hooks: the residual stream's, and those of linears still in floating point."""

from __future__ import annotations

from collections.abc import Sequence
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


def attach_residual_rotation(
    decoder: nn.Module, rotations: Rotations | None, stream_inputs: Sequence[str] = ()
) -> None:
    """Rotate the hidden states as they enter the first block of `decoder`, and back as they enter its last norm.

    Embeddings, encoders, lm_head and the hidden states that are given out stay as they are. A learned part is taken
    from the decoder's buffer. Nothing is done without a rotation.

    Args:
        decoder: the module with the blocks.
        rotations: of the model.
        stream_inputs: keyword arguments of its forward, tensors or lists of them [..., hidden], that it adds to the
            hidden states between blocks; they are rotated too.

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

    def join(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        turned = {
            name: [residual.apply(t) for t in value] if isinstance(value, list | tuple) else residual.apply(value)
            for name in stream_inputs
            if (value := kwargs.get(name)) is not None
        }
        return args, {**kwargs, **turned}

    def leave(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (residual.invert(args[0]), *args[1:])

    def restore(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if states:  # asked for with output_hidden_states; the last one comes from the last norm
            output.hidden_states = (*(None if s is None else residual.invert(s) for s in states[:-1]), states[-1])
        return output

    first = cast(nn.ModuleList, decoder.layers)[0]
    first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    norm.register_forward_pre_hook(leave)
    decoder.register_forward_hook(restore)
    if stream_inputs:
        decoder.register_forward_pre_hook(join, with_kwargs=True)


def attach_input_rotation(linear: nn.Linear, rotation: Rotation) -> None:
    """Rotate the input of a float linear whose weight was rotated."""
    linear.register_forward_pre_hook(lambda _, args: (rotation.apply(args[0]),), prepend=True)
