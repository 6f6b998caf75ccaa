# SPDX-License-Identifier: Apache-2.0
"""The whole text decoder in the kernels: one call a pass instead of some twenty a block, for one sequence at a time.

It drives the same packed groups as the modules do; norms, rotary embedding, attention with its cache and the gated MLP
are the kernels' own, in float32. Positions, routing, encoders and the head stay transformers'.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import KernelError
from ..modality import ModalityState
from . import native
from .linear import MasquantLinear
from .packed import PackedGroup
from .transforms import residual_rotation_of

CHUNK = 512  # tokens of one pass, which bounds scratch memory
_BLOCK_KEYS = 16  # keys that are interleaved in the cache

_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def unsupported(decoder: nn.Module) -> str | None:
    """Why the kernels cannot run this decoder as a whole; None if they can.

    What its structure cannot show, such as a factor in a forward method, is for the caller to try.
    """
    if native.library() is None:
        return "there are no kernels"
    config = cast(Any, decoder).config
    for index, block in enumerate(cast(nn.ModuleList, decoder.layers)):
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        if attention is None or mlp is None or _children(block) != _BLOCK:
            return f"block {index} is no pre-norm block of attention and gated MLP"
        if not _children(attention) <= _ATTENTION or not _children(mlp) <= _MLP:
            return f"block {index} has unknown modules"
        for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj):
            if not isinstance(linear, MasquantLinear) or linear.packed(linear.weight_shape.device) is None:
                return f"block {index} has linears that the kernels do not run"
        groups = (attention.q_proj.group, attention.o_proj.group, mlp.gate_proj.group, mlp.down_proj.group)
        if [len(g.linears) for g in groups] != [3, 1, 2, 1]:
            return f"block {index} has linears in floating point"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"the kernels know no {config.hidden_act}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "the kernels know no sliding window"
    rotation = residual_rotation_of(decoder)
    if rotation is not None and rotation.learned is not None:
        return "the kernels know no learned rotation"
    return None


class NativeDecoder:
    """A decoder's blocks and last norm, with a cache of one sequence.

    Args:
        decoder: a model's decoder, for which `unsupported` is None.
        state: of its routing.
    """

    def __init__(self, decoder: nn.Module, state: ModalityState) -> None:
        library = native.library()
        assert library is not None
        self.library, self.module, self.state = library, decoder, state
        config = cast(Any, decoder).config
        blocks = list(cast(nn.ModuleList, decoder.layers))
        attention = cast(Any, blocks[0].self_attn)
        self.head_dim = int(attention.head_dim)
        self.hidden = int(config.hidden_size)
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.length = 0
        self.next_position = 0
        self._sections = _rotary_sections(config)
        tokens = state.tokens
        self._rows = {t: tokens.index(modality) for modality, ids in tokens.token_ids.items() for t in ids}
        self._keep: list[Tensor] = []
        self._groups: list[PackedGroup] = []
        self._layers = (native.LayerStruct * len(blocks))(*[self._layer(block) for block in blocks])
        self.struct = native.DecoderStruct(
            len(blocks),
            self.hidden,
            attention.q_proj.out_features // self.head_dim,
            self.kv_heads,
            self.head_dim,
            self.head_dim,
            blocks[0].mlp.gate_proj.out_features,  # type: ignore[union-attr]
            0,
            float(config.rms_norm_eps),
            float(getattr(attention, "scaling", self.head_dim**-0.5)),
            ctypes.cast(self._layers, ctypes.c_void_p),
            self._pointer(cast(Any, decoder).norm.weight),
            native.rotation_struct(residual_rotation_of(decoder), self._keep),
        )
        self.cache = torch.empty(0)

    def _pointer(self, weight: Tensor) -> int:
        kept = weight.detach().float().contiguous()
        self._keep.append(kept)
        return kept.data_ptr()

    def _layer(self, block: Any) -> native.LayerStruct:
        groups = []
        for linear in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj):
            packed = linear.packed(torch.device("cpu"))
            self._groups.append(packed)
            groups.append(packed.struct)
        norms = [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
        return native.LayerStruct(
            *groups,
            self._pointer(block.input_layernorm.weight),
            self._pointer(block.post_attention_layernorm.weight),
            *[None if norm is None else self._pointer(norm.weight) for norm in norms],
            None,
            None,
        )

    def row_of(self, token: int) -> Tensor | None:
        """Modality id, uint8 [1], of a token that is no text: a model may well write a placeholder."""
        row = self._rows.get(token)
        return None if row is None else torch.tensor([row], dtype=torch.uint8)

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = self.next_position = 0

    def reserve(self, tokens: int) -> None:
        """Make room for a sequence of `tokens`."""
        capacity = self.struct.capacity
        if tokens <= capacity:
            return
        grown = -(-max(tokens, 2 * capacity, 256) // _BLOCK_KEYS) * _BLOCK_KEYS
        cache = torch.zeros(len(self._layers), 2, self.kv_heads, grown * self.head_dim)
        # Blocks of keys lie one behind the other, as values do: the old ones are the start of the new.
        cache[..., : capacity * self.head_dim] = self.cache.view(*cache.shape[:3], -1) if capacity else 0
        self.cache, self.struct.capacity = cache, grown
        for layer, part in zip(self._layers, cache, strict=True):
            layer.key_cache, layer.value_cache = part[0].data_ptr(), part[1].data_ptr()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.numel() * 4

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [tokens, head_dim], of position ids as decoders take them [..., 1, tokens]."""
        rotary = cast(Any, self.module).rotary_emb
        if self._sections is not None and position_ids.dim() == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        cosine, sine = rotary(torch.zeros(1, 1, self.hidden), position_ids)
        if cosine.dim() == 4:  # temporal, height, width: each has its own sections of the channels
            assert self._sections is not None
            cosine, sine = (
                torch.cat([part[i % 3] for i, part in enumerate(t.split(self._sections * 2, dim=-1))], dim=-1)
                for t in (cosine, sine)
            )
        return cosine[0].float().contiguous(), sine[0].float().contiguous()

    def forward(self, hidden: Tensor, rows: Tensor | None, cosine: Tensor, sine: Tensor) -> Tensor:
        """Last token's hidden state after the last norm, float32 [1, hidden].

        Args:
            hidden: [tokens, hidden], which follow the tokens so far.
            rows: uint8 [tokens], modality ids; None if all are text.
            cosine, sine: float32 [tokens, head_dim].

        Raises:
            KernelError: out of memory, or another head size.
        """
        if cosine.shape[-1] > self.head_dim:
            raise KernelError(f"rotary embedding of {cosine.shape[-1]} channels for heads of {self.head_dim}")
        self.struct.rotary_dim = cosine.shape[-1]
        self.reserve(self.length + len(hidden))
        hidden = hidden.float().contiguous() if hidden.dtype != torch.float32 else hidden.contiguous().clone()
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, min(start + CHUNK, len(hidden)))
            native.check(
                self.library.mq_decoder_forward(
                    ctypes.byref(self.struct),
                    part.stop - start,
                    self.length,
                    hidden[start].data_ptr(),
                    native.pointer(None if rows is None else rows[part]),
                    cosine[start].data_ptr(),
                    sine[start].data_ptr(),
                    int(part.stop == len(hidden)),
                )
            )
            self.length += part.stop - start
        return hidden[-1:]

    def run_block(self, index: int, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Text's hidden states, float32 [tokens, hidden], after one block alone, as the start of a sequence."""
        return self._alone(hidden, cosine, sine, layers=1, layer=ctypes.addressof(self._layers[index]))

    def run_norm(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Hidden states, float32 [tokens, hidden], as the last block leaves them, after the last norm."""
        rotation = residual_rotation_of(self.module)
        return self._alone(rotation.invert(hidden) if rotation else hidden, cosine, sine, normed=len(hidden), layers=0)

    def _alone(self, hidden: Tensor, cosine: Tensor, sine: Tensor, *, normed: int = 0, **fields: int) -> Tensor:
        self.reset()
        self.reserve(len(hidden))
        out = hidden.float().contiguous().clone()
        part = native.DecoderStruct.from_buffer_copy(self.struct)
        part.rotary_dim, part.residual = cosine.shape[-1], native.RotationStruct()
        for name, value in fields.items():
            setattr(part, name, value)
        arguments = (len(out), 0, out.data_ptr(), None, cosine.data_ptr(), sine.data_ptr(), normed)
        native.check(self.library.mq_decoder_forward(ctypes.byref(part), *arguments))
        return out

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model's own forward runs its decoder here; it sees the last token's hidden state only."""

        def forward(
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            position_ids: Tensor | None = None,
            attention_mask: Any = None,
            **_: Any,
        ) -> BaseModelOutputWithPast:
            if inputs_embeds is None:
                inputs_embeds = cast(Any, self.module).embed_tokens(input_ids)
            batch, tokens, _size = inputs_embeds.shape
            if batch != 1:
                raise KernelError(f"the native decoder runs one sequence at a time, got {batch}")
            if isinstance(attention_mask, Tensor) and not bool((attention_mask != 0).all()):
                raise KernelError("the native decoder takes no padding")
            if position_ids is None:
                position_ids = (torch.arange(tokens) + self.length)[None]
            if position_ids.dim() == 3 and position_ids.shape[0] == 4:  # plain positions first, for masks
                position_ids = position_ids[1:]
            self.next_position = int(position_ids.max()) + 1
            last = self.forward(inputs_embeds[0], self.state.rows_for(inputs_embeds), *self.rotary(position_ids))
            return BaseModelOutputWithPast(last_hidden_state=last[None].to(inputs_embeds.dtype))

        self.module.forward = forward
        try:
            yield
        finally:
            del self.module.forward


def _rotary_sections(config: Any) -> list[int] | None:
    """Channels of temporal, height and width positions, where a decoder has these."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict) and found.get("mrope_section"):
            return list(found["mrope_section"])
    return None
