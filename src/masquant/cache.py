# SPDX-License-Identifier: Apache-2.0
"""Keys and values of past tokens in 8 bits, as a cache that transformers takes wherever it takes its own.

Every token has one scale per head, so tokens are appended, taken off and reordered without being rounded again
(transformers' own quantized layers round everything anew with each flush). The latest tokens wait in the model's
precision until there are `residual_length` of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from .errors import ModelError
from .models import core_of
from .quantization import quantize_tokens

KvCache = Literal["float", "int8"]
RESIDUAL_LENGTH = 128

Rounded = tuple[Tensor, Tensor]  # int8 [batch, heads, tokens, features] and float32 scales [batch, heads, tokens, 1]


class Int8Layer(QuantizedLayer):
    """Keys and values [batch, heads, tokens, features] of one attention.

    Args:
        residual_length: tokens that wait in the model's precision until they are rounded together; 0 rounds every
            token before it is read at all.
    """

    is_croppable = True
    keys: Tensor
    values: Tensor
    cumulative_length: int
    _quantized_keys: Rounded | None
    _quantized_values: Rounded | None

    def __init__(self, residual_length: int = RESIDUAL_LENGTH) -> None:
        super().__init__(nbits=8, residual_length=residual_length)

    def _quantize(self, tensor: Tensor, axis: int = 0) -> Rounded:
        return quantize_tokens(tensor, 8)

    def _dequantize(self, q_tensor: Rounded) -> Tensor:
        q, scale = q_tensor
        return (q.float() * scale).to(self.keys.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; returns all keys and values that attention should see.

        The first call gets back what it brings, as with transformers' quantized layers: a prompt is read exactly and
        rounded afterwards.
        """
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        if self.residual_length == 0:
            self._flush()
        found = (key_states, value_states) if first and self.residual_length else self._read()
        if first or (self.keys.dim() == 4 and self.keys.shape[-2] >= self.residual_length):
            self._flush()
        return found

    def _read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        if self._quantized_keys is not None and self._quantized_values is not None:
            keys = torch.cat([self._dequantize(self._quantized_keys), keys], dim=-2)
            values = torch.cat([self._dequantize(self._quantized_values), values], dim=-2)
        return keys, values

    def _flush(self) -> None:
        """Round the tokens that wait."""
        if self.keys.dim() != 4:  # transformers' way to have none
            return
        self._quantized_keys = self._appended(self._quantized_keys, self._quantize(self.keys))
        self._quantized_values = self._appended(self._quantized_values, self._quantize(self.values))
        self.keys, self.values = self.keys.new_empty(0), self.values.new_empty(0)

    @staticmethod
    def _appended(before: Rounded | None, new: Rounded) -> Rounded:
        if before is None:
            return new
        return torch.cat([before[0], new[0]], dim=-2), torch.cat([before[1], new[1]], dim=-2)

    def _change(self, waiting: Callable[[Tensor], Tensor], rounded: Callable[[Tensor], Tensor] | None = None) -> None:
        """Replace all that is stored, the tokens that wait and the rounded ones."""
        rounded = rounded or waiting
        if self.keys.dim() == 4:
            self.keys, self.values = waiting(self.keys), waiting(self.values)
        if self._quantized_keys is not None and self._quantized_values is not None:
            (a, b), (c, d) = self._quantized_keys, self._quantized_values
            self._quantized_keys, self._quantized_values = (rounded(a), rounded(b)), (rounded(c), rounded(d))

    def crop(self, tokens_to_remove: int) -> None:
        """Take off the last tokens, as many as the negative number says."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        keep = max(self.cumulative_length + tokens_to_remove, 0)
        rounded = 0 if self._quantized_keys is None else self._quantized_keys[0].shape[-2]
        self._change(lambda t: t[..., : max(keep - rounded, 0), :], lambda t: t[..., :keep, :])
        self.cumulative_length = keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the samples of the batch in another order, at once."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample of the batch."""
        if self.is_initialized:
            self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples of the batch."""
        if self.is_initialized:
            self._change(lambda t: t.index_select(0, indices.to(t.device)))

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        if not self.is_initialized:
            return 0
        rounded = (*(self._quantized_keys or ()), *(self._quantized_values or ()))
        return sum(t.nbytes for t in (self.keys, self.values, *rounded))


class Int8Cache(QuantizedCache):
    """A model's cache with keys and values in 8 bits; pass it to `generate` or to a model's forward.

    Args:
        config: of the model.
        residual_length: see `Int8Layer`.

    Raises:
        ModelError: not every block attends to all tokens.
    """

    def __init__(self, config: PretrainedConfig, residual_length: int = RESIDUAL_LENGTH) -> None:
        plain = DynamicCache(config=config.get_text_config(decoder=True)).layers
        others = sorted({type(layer).__name__ for layer in plain if type(layer) is not DynamicLayer})
        if others:
            raise ModelError(
                "an int8 KV cache needs blocks that attend to all tokens; this model's cache also has "
                f"{', '.join(others)}; leave the cache in floating point"
            )
        Cache.__init__(self, layers=[Int8Layer(residual_length) for _ in plain])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that are stored."""
        return sum(layer.nbytes for layer in self.layers)


def cache_arguments(model: PreTrainedModel, kind: KvCache, residual_length: int = RESIDUAL_LENGTH) -> dict[str, Any]:
    """What to pass to a model's forward, or `generate`, for this kind of cache; nothing for its own.

    Raises:
        ModelError: the model cannot use it.
    """
    if kind == "float":
        return {}
    core = core_of(model)
    parameters = inspect.signature(core.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5
    return {name: Int8Cache(core.config, residual_length)}
