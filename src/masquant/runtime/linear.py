# SPDX-License-Identifier: Apache-2.0
"""The one linear module of a quantized model. Its buffers carry the names of the checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..compensation import ALL_TOKENS, FACTOR_DTYPES
from ..errors import ModelError
from ..modality import Modality, ModalityState
from ..quantization import SCALE_DTYPE, dequantize_weight, packed_columns, unpack
from ..rotation import Rotation
from . import native, ops
from .packed import PackedGroup

SMOOTH_DTYPE = torch.bfloat16
PACKED_NAMES = ("weight_packed", "weight_scale")


@dataclass(frozen=True)
class LinearSpec:
    """What a quantized linear is made of.

    Attributes:
        in_features, out_features, has_bias: as in `nn.Linear`.
        num_bits: of the weight.
        group_size: inputs per weight scale, None for one scale per row.
        activation_bits: 6, 8 or 16.
        has_smooth_scale: whether the group has vectors that differ between modalities.
        ranks: rank of each patch, by modality, or "all" for one patch of all tokens.
        factors: how patches are stored, "bfloat16" or "int8".
        rotation: of the group's input.
        dtype: of the bias (and of the model).
    """

    in_features: int
    out_features: int
    has_bias: bool
    num_bits: int
    group_size: int | None
    activation_bits: int
    has_smooth_scale: bool
    ranks: Mapping[str, int]
    factors: str
    rotation: Rotation | None
    dtype: torch.dtype

    @property
    def num_groups(self) -> int:
        """Scales per row."""
        return self.in_features // (self.group_size or self.in_features)


@dataclass(frozen=True)
class PreparedInput:
    """A group's input, quantized once for all its linears."""

    q: Tensor
    scale: Tensor
    projected: tuple[Tensor, ...]
    patched: tuple[str, ...]


class GroupInput:
    """What the linears of one group share: the leader's `smooth_scale` and `a`, the kernels' packed tensors, and what
    was last computed for all of them.

    The first linear that a block calls is the leader: it owns the shared tensors, prepares its input (with kernels:
    computes all outputs) and leaves that for the others, which are called with the same tensor right after it.
    """

    def __init__(self, members: int) -> None:
        self.followers = members - 1
        self.linears: list[MasquantLinear] = []  # no module itself, so that none owns another twice
        self.packed: PackedGroup | None = None
        self.lock = threading.Lock()
        self.source: Tensor | None = None
        self.work: PreparedInput | list[Tensor] | None = None
        self.remaining = 0

    @property
    def leader(self) -> MasquantLinear:
        """The linear that owns the shared tensors."""
        return self.linears[0]

    def take(self, x: Tensor) -> PreparedInput | list[Tensor] | None:
        """The work on `x`, if `x` is the tensor that the leader has just seen."""
        work = self.work
        if work is None or self.source is not x:
            return None
        self.remaining -= 1
        if self.remaining == 0:
            self.source = self.work = None
        return work

    def leave(self, x: Tensor, work: PreparedInput | list[Tensor]) -> None:
        """Keep the leader's work until every follower has taken it."""
        if self.followers:
            self.source, self.work, self.remaining = x, work, self.followers

    def pack(self) -> PackedGroup:
        """The group in the kernels' layout, which replaces the packed weights, scales and patches of its linears."""
        with self.lock:
            if self.packed is None:
                leader, modalities = self.leader, self.leader.state.tokens.modalities
                patches: dict[str, tuple[Sequence[int], Tensor, list[Tensor], Tensor | None]] = {}
                for key, factors in leader.compensation.items():
                    rows = range(len(modalities)) if key == ALL_TOKENS else [modalities.index(Modality(key))]
                    b = [cast(Compensation, linear.compensation[key]).b for linear in self.linears]
                    patches[key] = (rows, cast(Tensor, factors.a), b, cast("Tensor | None", factors.scale))
                spec = leader.spec
                self.packed = PackedGroup(
                    [linear.weight_packed for linear in self.linears],
                    [linear.weight_scale for linear in self.linears],
                    [linear.bias for linear in self.linears],
                    in_features=spec.in_features,
                    num_bits=spec.num_bits,
                    activation_bits=spec.activation_bits,
                    smooth=leader.smooth_scale,
                    patches=patches,
                    modalities=len(modalities),
                    rotation=spec.rotation,
                )
                for linear in self.linears:
                    del linear.weight_packed, linear.weight_scale
                    for key, own in linear.compensation.items():
                        cast(Compensation, own).leave(self.packed, key, linear.member)
            return self.packed

    def unpack(self) -> None:
        """Back to the checkpoint's tensors."""
        with self.lock:
            packed, self.packed = self.packed, None
            if packed is not None:
                for member, linear in enumerate(self.linears):
                    for name, tensor in zip(PACKED_NAMES, packed.unpack(member), strict=True):
                        linear.register_buffer(name, tensor)
                    for own in linear.compensation.values():
                        cast(Compensation, own).take_back()


class Compensation(nn.Module):
    """Factors of one linear's patch: `b`, and on the group's leader `a` and, of integers, `scale`."""

    a: Tensor | None
    b: Tensor
    scale: Tensor | None

    def __init__(
        self, rank: int, in_features: int | None, out_features: int, factors: str, device: torch.device | None
    ) -> None:
        super().__init__()
        dtype = FACTOR_DTYPES[factors]
        a = None if in_features is None else torch.zeros(rank, in_features, dtype=dtype, device=device)
        has_scale = in_features is not None and factors == "int8"
        self.names = ("b",) if a is None else ("a", "b")
        self._place: tuple[PackedGroup, str, int] | None = None  # where the factors are, if not here
        self.register_buffer("a", a)
        self.register_buffer("b", torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.register_buffer("scale", torch.ones(rank, dtype=SCALE_DTYPE, device=device) if has_scale else None)

    def leave(self, packed: PackedGroup, key: str, member: int) -> None:
        """The factors are in the kernels' layout now."""
        self._place = packed, key, member
        for name in self.names:
            delattr(self, name)

    def take_back(self) -> None:
        """The factors are here again."""
        found, self._place = self._elsewhere(), None
        for name, tensor in found.items():
            self.register_buffer(name, tensor)

    def _elsewhere(self) -> dict[str, Tensor]:
        if self._place is None:
            return {}
        packed, key, member = self._place
        found = dict(zip(("a", "b"), packed.factors(key, member), strict=True))
        return {name: found[name] for name in self.names}

    def __getattr__(self, name: str) -> Any:
        if name in ("a", "b"):
            found = self._elsewhere().get(name)
            if found is not None:
                return found
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._elsewhere().items()})


class MasquantLinear(nn.Module):
    """Packed low-bit weight, per-modality smoothing and per-modality low-rank patch.

    Buffers: `weight_packed` int32 [out, words], `weight_scale` bfloat16 [out, groups], `weight_shape` int64 [2],
    `bias` [out]; on the group's leader also `smooth_scale` bfloat16 [modalities, in] and `compensation.<modality>.a`
    bfloat16 or int8 [rank, in] (with bfloat16 `scale` [rank]); `compensation.<modality>.b` [out, rank]. See `ops` for
    the formula.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    bias: Tensor | None
    smooth_scale: Tensor | None

    def __init__(
        self, spec: LinearSpec, state: ModalityState, group: GroupInput, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        device = torch.device(device) if device is not None else None
        self.spec, self.state, self.group = spec, state, group
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.member = len(group.linears)
        self.is_leader = self.member == 0
        group.linears.append(self)
        words = packed_columns(spec.in_features, spec.num_bits)
        self.register_buffer("weight_packed", torch.zeros(spec.out_features, words, dtype=torch.int32, device=device))
        self.register_buffer(
            "weight_scale", torch.ones(spec.out_features, spec.num_groups, dtype=SCALE_DTYPE, device=device)
        )
        self.register_buffer(
            "weight_shape", torch.tensor([spec.out_features, spec.in_features], dtype=torch.int64, device=device)
        )
        bias = torch.zeros(spec.out_features, dtype=spec.dtype, device=device) if spec.has_bias else None
        self.register_buffer("bias", bias)
        smooth = None
        if self.is_leader and spec.has_smooth_scale:
            smooth = torch.ones(len(state.tokens.modalities), spec.in_features, dtype=SMOOTH_DTYPE, device=device)
        self.register_buffer("smooth_scale", smooth)
        self.compensation = nn.ModuleDict(
            {
                key: Compensation(
                    rank, spec.in_features if self.is_leader else None, spec.out_features, spec.factors, device
                )
                for key, rank in spec.ranks.items()
            }
        )

    def extra_repr(self) -> str:
        s = self.spec
        grid = f"W{s.num_bits}A{s.activation_bits}, group_size={s.group_size or 'channel'}"
        rotated = ", rotated input" if s.rotation else ""
        return f"in_features={s.in_features}, out_features={s.out_features}, {grid}{rotated}"

    def __getattr__(self, name: str) -> Any:
        if name in PACKED_NAMES and self.group.packed is not None:  # read from the kernels' layout
            return self.group.packed.unpack(self.member)[PACKED_NAMES.index(name)]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.group.packed is not None:
            for name in PACKED_NAMES:
                destination[prefix + name] = getattr(self, name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.group.unpack()  # moved or cast as the checkpoint's tensors; packed again when next called on a CPU
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.group.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def dequantize(self) -> Tensor:
        """The smoothed weight as stored, float32 [out, in]."""
        return dequantize_weight(unpack(self.weight_packed, self.spec.num_bits, self.in_features), self.weight_scale)

    def packed(self, device: torch.device) -> PackedGroup | None:
        """The group in the kernels' layout; None where PyTorch computes it: on other devices than CPUs, and
        without kernels."""
        if self.group.packed is not None:
            return self.group.packed
        if device.type != "cpu" or len(self.group.linears) <= self.group.followers:
            return None
        return self.group.pack() if native.library() is not None else None

    def _prepare(self, x: Tensor, rows: Tensor | None) -> PreparedInput:
        """Smooth and quantize x [..., in], and project it for the patches of the modalities that it holds."""
        leader = self.group.leader
        flat = x.reshape(-1, self.in_features)
        if self.spec.rotation is not None:
            flat = self.spec.rotation.apply(flat.float())
        smooth = leader.smooth_scale if rows is not None else None  # text's vector is folded: row 0 is ones
        q, scale = torch.ops.masquant.quantize_input(flat, rows, smooth, self.spec.activation_bits)
        patched: list[str] = []
        projected: list[Tensor] = []
        for name, factors in leader.compensation.items():
            if name != ALL_TOKENS and rows is None:
                continue
            row = -1 if name == ALL_TOKENS else self.state.tokens.index(Modality(name))
            patched.append(name)
            part = torch.ops.masquant.project_input(flat, rows, smooth, factors.a, row)
            projected.append(part if factors.scale is None else part * factors.scale.float())
        return PreparedInput(q, scale, tuple(projected), tuple(patched))

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]; the tokens' modalities come from the forward pass in progress.

        Raises:
            ModelError: the tokens cannot be routed, or gradients are wanted.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ModelError("a masquant model cannot be trained or differentiated; wrap the call in torch.no_grad()")
        compiling = torch.compiler.is_compiling()
        work = None if compiling or self.is_leader else self.group.take(x)
        if work is None:
            rows = self.state.rows_for(x)
            packed = self.packed(x.device)
            if packed is None:
                work = self._prepare(x, rows)
            elif compiling:
                work = torch.ops.masquant.group_forward(
                    x.reshape(-1, self.in_features), rows, packed.handle, list(packed.rows)
                )
            else:
                work = packed.forward(x.reshape(-1, self.in_features), rows)
            if self.is_leader and not compiling:  # the compiler shares equal work by itself
                self.group.leave(x, work)
        if isinstance(work, list):
            return work[self.member].view(*x.shape[:-1], self.out_features).to(x.dtype)
        y = torch.ops.masquant.linear(
            work.q,
            work.scale,
            self.weight_packed,
            self.weight_scale,
            self.bias,
            list(work.projected),
            [self.compensation[key].b for key in work.patched],
            self.spec.num_bits,
            x.dtype,
        )
        return y.reshape(*x.shape[:-1], self.out_features)


__all__ = ["Compensation", "GroupInput", "LinearSpec", "MasquantLinear", "ops"]
