# SPDX-License-Identifier: Apache-2.0
"""A linear group in the kernels' layout: packed once from the checkpoint's tensors, which it replaces."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..quantization import SCALE_DTYPE
from ..rotation import Rotation
from . import native

BLOCK = 16  # output rows that are interleaved


def _whole(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


_handles = itertools.count()
_groups: WeakValueDictionary[int, PackedGroup] = WeakValueDictionary()  # by handle, for compiled graphs


def _stored(factor: Tensor) -> Tensor:
    """A patch's factor in the dtype of checkpoints, which a model that was cast may have left."""
    return (factor if factor.dtype == torch.int8 else factor.to(torch.bfloat16)).contiguous()


@dataclass(frozen=True)
class PackedPatch:
    """A patch of all the group's rows: a [rank, padded_in], b [rank, padded_out] (both as stored), a_scale [rank]."""

    a: Tensor
    b: Tensor
    a_scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.a.nbytes + self.b.nbytes


class PackedGroup:
    """Linears with one input as the kernels want them, and their product.

    Args:
        weights: per member, `weight_packed` int32 [out, words].
        scales: per member, `weight_scale` bfloat16 [out, groups].
        biases: per member, [out] or None.
        in_features: of the common input.
        num_bits: of the weights, 4 or 8.
        activation_bits: 6 or 8; 16 takes the sum of two integers of 8 bits, which keeps 15 bits of the largest value.
        smooth: bfloat16 [modalities, in], or None.
        patches: by name, the ids of its modalities, a [rank, in], b per member [out, rank], and the scale [rank] of
            integer factors.
        modalities: of the model.
        rotation: of the input.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        in_features: int,
        num_bits: int,
        activation_bits: int,
        smooth: Tensor | None = None,
        patches: Mapping[str, tuple[Sequence[int], Tensor, Sequence[Tensor], Tensor | None]] | None = None,
        modalities: int = 1,
        rotation: Rotation | None = None,
    ) -> None:
        library = native.library()
        assert library is not None
        self.library = library
        self.in_features, self.num_bits = in_features, num_bits
        self.rows = tuple(len(w) for w in weights)
        self.padded_in = _whole(in_features, 16)
        self.words = weights[0].shape[1]
        blocks = [-(-n // BLOCK) for n in self.rows]
        self.starts = [BLOCK * sum(blocks[:i]) for i in range(len(blocks))]
        self.padded_out = BLOCK * sum(blocks)
        groups = scales[0].shape[1]
        row_bytes = self.padded_in * num_bits // 8
        self.weight = torch.empty(self.padded_out * row_bytes, dtype=torch.uint8)
        self.scale = torch.zeros(sum(blocks), groups, BLOCK, dtype=SCALE_DTYPE)
        for start, weight, scale in zip(self.starts, weights, scales, strict=True):
            source = weight.contiguous()
            to = self.weight[start * row_bytes :]
            library.mq_pack(num_bits, len(source), in_features, source.data_ptr(), 4 * source.shape[1], to.data_ptr())
            filled = torch.nn.functional.pad(scale, (0, 0, 0, _whole(len(scale), BLOCK) - len(scale)))
            part = filled.unflatten(0, (-1, BLOCK)).transpose(1, 2)
            self.scale[start // BLOCK : start // BLOCK + len(part)] = part
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = self._padded_rows(
                [torch.zeros(n) if b is None else b.float() for n, b in zip(self.rows, biases, strict=True)]
            )
        self.smooth = smooth.to(torch.bfloat16).contiguous() if smooth is not None else None
        self.patches = {
            name: PackedPatch(
                _stored(torch.nn.functional.pad(a, (0, self.padded_in - in_features))),
                _stored(self._padded_rows(b).t()),
                scale.float() if scale is not None else None,
            )
            for name, (_, a, b, scale) in (patches or {}).items()
        }
        self._keep: list[Tensor] = []
        rows_of = {name: rows for name, (rows, *_) in (patches or {}).items()}
        self.struct = self._struct(activation_bits, groups, modalities, rotation, rows_of)
        self._reference = ctypes.byref(self.struct)
        self.handle = next(_handles)
        _groups[self.handle] = self

    def _padded_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all members, each member padded to whole blocks."""
        out = parts[0].new_zeros(self.padded_out, *parts[0].shape[1:])
        for start, part in zip(self.starts, parts, strict=True):
            out[start : start + len(part)] = part
        return out

    def _struct(
        self,
        activation_bits: int,
        groups: int,
        modalities: int,
        rotation: Rotation | None,
        rows_of: Mapping[str, Sequence[int]],
    ) -> native.GroupStruct:
        self._member_rows = torch.tensor(self.rows, dtype=torch.int32)
        self._patch_structs = None
        if self.patches:
            self._patch_structs = (native.PatchStruct * modalities)()
            for name, patch in self.patches.items():
                for row in rows_of[name]:
                    self._patch_structs[row] = native.PatchStruct(
                        len(patch.a),
                        int(patch.a.dtype == torch.int8),
                        native.pointer(patch.a),
                        native.pointer(patch.b),
                        native.pointer(patch.a_scale),
                    )
        return native.GroupStruct(
            self.in_features,
            self.padded_in,
            self.num_bits,
            self.in_features // groups if groups > 1 else self.padded_in,
            activation_bits,
            len(self.rows),
            modalities,
            max((len(p.a) for p in self.patches.values()), default=0),
            native.pointer(self._member_rows),
            native.pointer(self.weight),
            native.pointer(self.scale),
            native.pointer(self.bias),
            native.pointer(self.smooth),
            ctypes.cast(self._patch_structs, ctypes.c_void_p) if self._patch_structs is not None else None,
            native.rotation_struct(rotation, self._keep),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales."""
        return self.weight.numel() + 2 * self.scale.numel()

    def forward(self, x: Tensor, rows: Tensor | None) -> list[Tensor]:
        """Outputs of all members, [tokens, out] each in x's dtype.

        Args:
            x: [tokens, in], of any floating dtype.
            rows: uint8 [tokens], modality ids; None if all are text.

        Raises:
            KernelError: out of memory.
        """
        x = self._readable(x)
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        tokens = len(x)
        out = [torch.empty(tokens, n, dtype=dtype) for n in self.rows]
        pointers = (ctypes.c_void_p * len(out))(*[y.data_ptr() for y in out])
        half = int(dtype == torch.bfloat16)
        native.check(
            self.library.mq_group_forward(
                self._reference, x.data_ptr(), half, tokens, native.pointer(rows), pointers, half
            )
        )
        return out

    def quantize(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Integers [tokens, in] and scales [tokens, 1] of an input, as `ops.quantize_input` (after the rotation); with
        16 bits [tokens, 2, in] and [tokens, 2, 1]."""
        x = self._readable(x)
        terms = (2,) if self.struct.activation_bits == 16 else ()
        q = torch.empty(len(x), *terms, x.shape[1], dtype=torch.int8)
        scale = torch.empty(len(x), *terms, 1)
        half = int(x.dtype == torch.bfloat16)
        native.check(
            self.library.mq_quantize(
                self._reference, x.data_ptr(), half, len(x), native.pointer(rows), q.data_ptr(), scale.data_ptr()
            )
        )
        return q, scale

    @staticmethod
    def _readable(x: Tensor) -> Tensor:
        return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()

    def take_rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Integers, int8 [n, in], and scales [n, groups] of some rows of the first member, of 8 bits."""
        assert self.num_bits == 8
        block, row = index // BLOCK, index % BLOCK
        taken = self.weight.view(-1, self.padded_in // 4, BLOCK, 4)[block, :, row].flatten(1)[:, : self.in_features]
        return taken.bitwise_xor(0x80).view(torch.int8), self.scale[block, :, row]

    def unpack(self, member: int) -> tuple[Tensor, Tensor]:
        """`weight_packed` int32 [out, words] and `weight_scale` bfloat16 [out, groups], as they were packed from."""
        start, rows = self.starts[member], self.rows[member]
        words = torch.empty(rows, self.words, dtype=torch.int32)
        source = self.weight[start * self.padded_in * self.num_bits // 8 :]
        self.library.mq_unpack(
            self.num_bits, rows, self.in_features, source.data_ptr(), words.data_ptr(), 4 * self.words
        )
        blocks = self.scale[start // BLOCK : start // BLOCK + -(-rows // BLOCK)]
        return words, blocks.transpose(1, 2).flatten(0, 1)[:rows].contiguous()

    def factors(self, name: str, member: int) -> tuple[Tensor, Tensor]:
        """Of a patch, `a` [rank, in] and the member's `b` [out, rank], as they were packed from."""
        patch, start = self.patches[name], self.starts[member]
        b = patch.b[:, start : start + self.rows[member]].t().contiguous()
        return patch.a[:, : self.in_features].contiguous(), b


@torch.library.custom_op("masquant::group_forward", mutates_args=())
def group_forward(x: Tensor, rows: Tensor | None, handle: int, sizes: Sequence[int]) -> list[Tensor]:
    """`PackedGroup.forward` for compiled graphs, which know the group by its handle and its outputs' sizes."""
    return _groups[handle].forward(x, rows)


@group_forward.register_fake
def _(x: Tensor, rows: Tensor | None, handle: int, sizes: Sequence[int]) -> list[Tensor]:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return [x.new_empty((x.shape[0], n), dtype=dtype) for n in sizes]
