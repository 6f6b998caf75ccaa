# SPDX-License-Identifier: Apache-2.0
"""Embeddings and head with 8-bit rows, which dominate a small model's memory and decoding.

The head reads 16-bit activations: its input has outliers that 8 bits per token do not hold, and at one token the
product costs no more than reading the rows. Tied embeddings and head stay one tensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models import core_of
from ..quantization import dequantize_weight, unpack
from .outer import OUTER_BITS, OuterLinear, packed_bytes


class MasquantHead(OuterLinear):
    """Logits from 8-bit rows."""


class MasquantEmbedding(MasquantHead):
    """Embeddings looked up in 8-bit rows, which a tied head reads as well."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__(embedding_dim, num_embeddings, False, dtype, device)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [..., embedding_dim] of token ids."""
        ids = input_ids.reshape(-1)
        packed = self.group.packed
        if packed is None:
            rows, scale = unpack(self.weight_packed[ids], OUTER_BITS, self.in_features), self.weight_scale[ids]
        else:
            rows, scale = packed.take_rows(ids)
        return dequantize_weight(rows, scale).to(self.dtype).reshape(*input_ids.shape, self.embedding_dim)

    def project(self, x: Tensor) -> Tensor:
        """Logits of the tied head."""
        return super().forward(x)


class TiedHead(nn.Module):
    """A head that reads the embeddings' rows."""

    def __init__(self, embedding: MasquantEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: the tensors are the embedding's

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states."""
        return self._embedding[0].project(x)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head are one tensor."""
    embeddings, head = _modules(model)
    return embeddings.weight.data_ptr() == head.weight.data_ptr() and embeddings.weight is head.weight


def _modules(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    core = core_of(model)
    embeddings, head = core.get_input_embeddings(), core.get_output_embeddings()
    if type(embeddings) is not nn.Embedding or type(head) is not nn.Linear:
        found = f"{type(embeddings).__name__} and {type(head).__name__}"
        raise ModelError(f"quantize_lm_head knows plain embeddings and a linear head; this model has {found}")
    return embeddings, head


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def replace_head(
    model: PreTrainedModel, *, tied: bool, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[MasquantEmbedding, MasquantHead | None]:
    """Replace embeddings and head by empty 8-bit ones; returns them, without the head if it is tied.

    Raises:
        ModelError: they are no plain embedding and linear.
    """
    embeddings, head = _modules(model)
    embedding = MasquantEmbedding(embeddings.num_embeddings, embeddings.embedding_dim, dtype, device)
    own = None if tied else MasquantHead(head.in_features, head.out_features, head.bias is not None, dtype, device)
    names = _name(model, embeddings), _name(model, head)
    core = core_of(model)
    core._tied_weights_keys = {}  # type: ignore[assignment]
    for owner in (model, core):  # the parts around a core keep theirs
        own_key, tied_keys = f"{_name(owner, head)}.weight", cast(Any, owner).all_tied_weights_keys
        cast(Any, owner).all_tied_weights_keys = {key: of for key, of in tied_keys.items() if key != own_key}
    model.set_submodule(names[0], embedding)
    model.set_submodule(names[1], TiedHead(embedding) if own is None else own)
    return embedding, own


@torch.no_grad()
def quantize_head(model: PreTrainedModel) -> bool:
    """Quantize a float model's embeddings and head in place; whether they are tied.

    Raises:
        ModelError: they are no plain embedding and linear.
    """
    tied = is_tied(model)
    embeddings, head = _modules(model)
    dtype, device = embeddings.weight.dtype, embeddings.weight.device
    embedding, own = replace_head(model, tied=tied, dtype=dtype, device=device)
    embedding.fill(embeddings.weight, None)
    if own is not None:
        own.fill(head.weight, head.bias)
    return tied


def packed_head_bytes(model: nn.Module) -> int:
    """Of the 8-bit embeddings and head as a checkpoint has them; 0 if they are in floating point."""
    return packed_bytes([module for module in model.modules() if isinstance(module, MasquantHead)])


__all__ = [
    "MasquantEmbedding",
    "MasquantHead",
    "TiedHead",
    "is_tied",
    "packed_head_bytes",
    "quantize_head",
    "replace_head",
]
