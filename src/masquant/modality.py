# SPDX-License-Identifier: Apache-2.0
"""Which token is text, vision or audio, and how the linears of an unmodified model get to know.

Each token of the decoder's input has exactly one modality. A pre-forward hook on the model reads `input_ids`,
looks up the placeholder tokens and publishes `modality_ids`; the quantized linears read them. The ids are held by a
plain Python object per model (a `contextvars.ContextVar` would break `torch.compile`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ModelError


class Modality(str, Enum):
    """Kind of a token. Video tokens are VISION."""

    TEXT = "text"
    VISION = "vision"
    AUDIO = "audio"


@dataclass(frozen=True)
class ModalityTokens:
    """The modalities of one model, text first, with the placeholder token ids of the others.

    A *modality id* is a position in `modalities`: it is the row of `smooth_scale` that the token uses. `last_tokens`:
    some blocks get only the last tokens of each sample when text is generated.
    """

    modalities: tuple[Modality, ...]
    token_ids: Mapping[Modality, tuple[int, ...]]
    last_tokens: bool = False

    def __post_init__(self) -> None:
        if not self.modalities or self.modalities[0] is not Modality.TEXT:
            raise ModelError(f"text must be the first modality, got {[m.value for m in self.modalities]}")
        seen: dict[int, Modality] = {}
        for modality in self.modalities[1:]:
            for token in self.token_ids[modality]:
                if token in seen and seen[token] is not modality:
                    raise ModelError(f"token id {token} is declared for both {seen[token].value} and {modality.value}")
                seen[token] = modality

    def index(self, modality: Modality) -> int:
        """Row of `modality`."""
        return self.modalities.index(modality)


def modality_ids(input_ids: Tensor, tokens: ModalityTokens) -> Tensor:
    """Modality id of every token.

    Args:
        input_ids: integer [batch, tokens].
        tokens: the model's placeholder tokens.

    Returns:
        uint8 [batch, tokens]; 0 is text.

    Raises:
        ModelError: `input_ids` are not integers.
    """
    if input_ids.is_floating_point():
        raise ModelError(f"input_ids must be integers, got {input_ids.dtype}")
    ids = torch.zeros(input_ids.shape, dtype=torch.uint8, device=input_ids.device)
    for row, modality in enumerate(tokens.modalities):
        for token in tokens.token_ids.get(modality, ()):
            ids = ids.masked_fill(input_ids == token, row)
    return ids


class ModalityState:
    """The modality ids of the forward pass in progress; one per model, shared by all its quantized linears.

    `ids` is None outside of a forward pass. `has_media` says whether any token is not text, so that text-only passes
    and decoding skip routing altogether.
    """

    def __init__(self, tokens: ModalityTokens) -> None:
        self.tokens = tokens
        self.ids: Tensor | None = None
        self.has_media = False
        self.depth = 0
        self.override: Tensor | None = None

    def set(self, ids: Tensor | None) -> None:
        """Publish uint8 ids [batch, tokens], or None after the pass."""
        self.ids = ids
        self.has_media = ids is not None and (torch.compiler.is_compiling() or bool(ids.any()))

    @contextmanager
    def selected(self, rows: Tensor, tokens: int) -> Iterator[None]:
        """Meanwhile the ids are those of the tokens `rows` [n] of `tokens` in all, as an expert sees them."""
        whole = self.ids
        if whole is not None and self.has_media:
            ids = self._fitting(whole, tokens)
            self.ids = ids[rows.to(ids.device)] if len(ids) == tokens else ids
        try:
            yield
        finally:
            self.ids = whole

    def _fitting(self, ids: Tensor, tokens: int) -> Tensor:
        """The ids, flattened; of the last tokens of each sample, where the model may drop the others."""
        samples = len(ids)
        if self.tokens.last_tokens and ids.dim() == 2 and tokens < ids.numel() and tokens % samples == 0:
            ids = ids[:, ids.shape[1] - tokens // samples :]
        return ids.reshape(-1)

    def rows_for(self, x: Tensor) -> Tensor | None:
        """Modality ids, flattened [tokens], of the rows of `x` [..., features]; None if all are text.

        Raises:
            ModelError: no ids are known, or `x` has another number of rows. Nothing falls back to text.
        """
        if self.ids is None:
            raise ModelError(
                "a quantized linear was called outside of the model's forward pass, so the modality of its tokens is "
                "unknown; call the model with input_ids, or wrap the call in masquant.routed(model, modality_ids)"
            )
        if not self.has_media:
            return None
        rows = x.numel() // x.shape[-1]
        ids = self._fitting(self.ids, rows)
        if rows != len(ids):
            raise ModelError(
                f"cannot route: the linear got an input of shape {tuple(x.shape)} ({rows} rows) while the forward "
                f"pass has modality ids of shape {tuple(self.ids.shape)} ({self.ids.numel()} tokens)"
            )
        return ids.to(x.device)


# mm_token_type_ids of transformers' processors
_TOKEN_TYPES = {1: Modality.VISION, 2: Modality.VISION, 3: Modality.AUDIO}


def _ids_of_call(state: ModalityState, arguments: Mapping[str, Any]) -> Tensor:
    """Modality ids for one forward call, from input_ids or, without them, from what the caller said explicitly."""
    input_ids = arguments.get("input_ids")
    if input_ids is not None:
        return modality_ids(input_ids, state.tokens)
    if state.override is not None:
        return state.override
    token_types = arguments.get("mm_token_type_ids")
    if token_types is not None:
        ids = torch.zeros(token_types.shape, dtype=torch.uint8, device=token_types.device)
        for code, modality in _TOKEN_TYPES.items():
            if modality in state.tokens.modalities:
                ids = ids.masked_fill(token_types == code, state.tokens.index(modality))
            elif bool((token_types == code).any()):
                raise ModelError(f"mm_token_type_ids holds {code} ({modality.value}), which this checkpoint lacks")
        return ids
    raise ModelError(
        "the model was called with inputs_embeds and no input_ids, so the modality of its tokens is unknown; pass "
        "input_ids, or wrap the call in masquant.routed(model, modality_ids)"
    )


def _enter(state: ModalityState, parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if state.depth == 0:
        state.set(_ids_of_call(state, {**dict(zip(parameters, args, strict=False)), **kwargs}))
    state.depth += 1


def attach_routing(model: nn.Module, decoder: nn.Module, state: ModalityState) -> None:
    """Make every module from `model` down to `decoder` that takes `input_ids` publish modality ids when called.

    The outermost of them decides; the inner ones, which are often called with embeddings only, keep its ids. Routing
    needs the ids of the pass in progress, which gradient checkpointing recomputes after it: it is switched off.
    """
    for module in model.modules():
        parameters = list(inspect.signature(module.forward).parameters)
        if "input_ids" not in parameters or all(child is not decoder for child in module.modules()):
            continue

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[str] = parameters
        ) -> None:
            _enter(state, parameters, args, kwargs)

        def leave(*_: Any) -> None:
            state.depth -= 1
            if state.depth <= 0:
                state.depth = 0
                state.set(None)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True, always_call=True)
        if isinstance(module, PreTrainedModel):
            module.supports_gradient_checkpointing = False  # transformers then refuses to enable it


@contextmanager
def override_ids(state: ModalityState, ids: Tensor) -> Iterator[None]:
    """Use `ids`, uint8 [batch, tokens], for calls that bring no input_ids."""
    if ids.dtype != torch.uint8 or ids.dim() != 2:
        raise ModelError(f"modality ids must be uint8 [batch, tokens], got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() and int(ids.max()) >= len(state.tokens.modalities):
        raise ModelError(f"modality id {int(ids.max())} is unknown; this model has {len(state.tokens.modalities)}")
    previous, state.override = state.override, ids
    try:
        yield
    finally:
        state.override = previous
