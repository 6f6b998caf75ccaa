# SPDX-License-Identifier: Apache-2.0
"""Orthogonal transforms that spread outliers over all channels (QuaRot, arXiv 2404.00456), for sizes of any kind.

    x -> x R,    R = diag(signs) (C_k (x) H_2^a (x) H_2^b ...)

with H Sylvester's Hadamard matrices, normalised, and C_k the orthogonal DCT-II of the size's odd part. Applied factor
by factor, in O(n (k + 2^a + 2^b)) instead of O(n^2). The signs come from a hash of seed and position, so that a seed
in a checkpoint means the same transform on every machine and in every version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

_LARGEST_FACTOR = 64


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix, symmetric and orthogonal, float64 [n, n]; n is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h / math.sqrt(n)


def cosine_transform(n: int) -> Tensor:
    """Orthogonal DCT-II, float64 [n, n]."""
    i = torch.arange(n, dtype=torch.float64)
    c = torch.cos(math.pi / n * (i[None] + 0.5) * i[:, None]) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c


def signs(n: int, seed: int) -> Tensor:
    """Random signs, float64 [n]: the top bit of SplitMix64 of seed and position."""
    mask, values = 2**64 - 1, []
    for i in range(n):
        z = (seed * 0xD1342543DE82EF95 + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return torch.tensor(values, dtype=torch.float64)


def factor_sizes(n: int) -> tuple[int, ...]:
    """The odd part of n (if any), then powers of two of at most 64 whose product is the rest."""
    odd, exponent = n, 0
    while odd % 2 == 0:
        odd, exponent = odd // 2, exponent + 1
    parts = -(-exponent // int(math.log2(_LARGEST_FACTOR)))
    powers = [2 ** (exponent * (i + 1) // parts - exponent * i // parts) for i in range(parts)]
    return (*((odd,) if odd > 1 else ()), *powers)


@lru_cache(maxsize=64)
def _factors(n: int, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    matrices = tuple(hadamard(s) if s & (s - 1) == 0 else cosine_transform(s) for s in factor_sizes(n))
    return signs(n, seed).to(device, dtype), tuple(m.to(device, dtype) for m in matrices)


@dataclass(frozen=True)
class Rotation:
    """One orthogonal transform of `size` channels, then the orthogonal matrix `learned` [size, size] if given."""

    size: int
    seed: int
    learned: Tensor | None = field(default=None, compare=False)

    def apply(self, x: Tensor) -> Tensor:
        """x R of x [..., size], in float32 (float64 if x is), returned in x's dtype."""
        return self._transform(x, inverse=False)

    def invert(self, x: Tensor) -> Tensor:
        """x R^T."""
        return self._transform(x, inverse=True)

    def _transform(self, x: Tensor, *, inverse: bool) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        sign, factors = _factors(self.size, self.seed, x.device, dtype)
        shape = tuple(len(f) for f in factors)
        y = x.to(dtype)
        learned = None if self.learned is None else self.learned.to(x.device, dtype)
        if learned is not None and inverse:
            y = y @ learned.t()
        if not inverse:
            y = y * sign
        y = y.reshape(-1, *shape)
        for axis, factor in enumerate(factors, start=1):
            y = (y.movedim(axis, -1) @ (factor.t() if inverse else factor)).movedim(-1, axis)
        y = y.reshape(x.shape)
        if inverse:
            y = y * sign
        elif learned is not None:
            y = y @ learned
        return y.to(x.dtype)

    def signs_and_odd_part(self) -> tuple[Tensor, Tensor]:
        """What a kernel needs: signs [size] and the odd factor [odd, odd], float32; the rest are Hadamard matrices."""
        odd = self.size
        while odd % 2 == 0:
            odd //= 2
        return signs(self.size, self.seed).float(), cosine_transform(odd).float()

    def matrix(self) -> Tensor:
        """R, float64 [size, size]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


@dataclass(frozen=True)
class Rotations:
    """Which transforms a model has.

    Attributes:
        seed: of the signs.
        residual: the residual stream is rotated: at the entrance of the decoder and back before its last norm. What
            reads and writes the stream has it folded in.
        heads: values are rotated within each head; folded into the value rows and the output columns.
        groups: linear groups whose input is rotated when the model runs.
        learned: the residual stream's rotation has a learned part, a tensor of the checkpoint.
    """

    seed: int = 0
    residual: bool = True
    heads: bool = True
    groups: tuple[str, ...] = ("down",)
    learned: bool = False

    def of_residual(self, size: int, learned: Tensor | None = None) -> Rotation | None:
        """The residual stream's, with its learned part [size, size] if it has one."""
        return Rotation(size, 4 * self.seed, learned) if self.residual else None

    def of_heads(self, size: int) -> Rotation | None:
        """Of one head's values."""
        return Rotation(size, 4 * self.seed + 1) if self.heads else None

    def of_group(self, name: str, size: int) -> Rotation | None:
        """Of a group's input."""
        return Rotation(size, 4 * self.seed + 2) if name in self.groups else None

    @property
    def online(self) -> bool:
        """Whether anything is rotated when the model runs."""
        return self.residual or bool(self.groups)
