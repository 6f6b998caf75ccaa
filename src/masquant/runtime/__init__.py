# SPDX-License-Identifier: Apache-2.0
"""Running a quantized model: the linear module and its ops."""

from .linear import GroupInput, LinearSpec, MasquantLinear

__all__ = ["GroupInput", "LinearSpec", "MasquantLinear"]
