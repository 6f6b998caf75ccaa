# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels' shared library: found, loaded, and spoken to through its C interface (native/masquant.h)."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from torch import Tensor

from ..errors import KernelError
from ..rotation import Rotation

LIBRARY = {"darwin": "libmasquant_kernels.dylib", "win32": "masquant_kernels.dll"}.get(
    sys.platform, "libmasquant_kernels.so"
)
VARIABLE = "MASQUANT_KERNELS"  # "off", or the name of an instruction set

_logger = logging.getLogger("masquant")


class PatchStruct(Structure):
    """mq_patch."""

    _fields_ = [("rank", c_int32), ("is_int8", c_int32), ("a", c_void_p), ("b", c_void_p), ("a_scale", c_void_p)]


class RotationStruct(Structure):
    """mq_rotation."""

    _fields_ = [("size", c_int32), ("odd", c_int32), ("signs", c_void_p), ("matrix", c_void_p)]


class GroupStruct(Structure):
    """mq_group."""

    _fields_ = [
        ("in_features", c_int32),
        ("padded_in", c_int32),
        ("bits", c_int32),
        ("group_size", c_int32),
        ("activation_bits", c_int32),
        ("members", c_int32),
        ("modalities", c_int32),
        ("max_rank", c_int32),
        ("member_rows", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("smooth", c_void_p),
        ("patches", c_void_p),
        ("rotation", RotationStruct),
    ]


class LayerStruct(Structure):
    """mq_layer."""

    _fields_ = [
        ("qkv", GroupStruct),
        ("o", GroupStruct),
        ("gate_up", GroupStruct),
        ("down", GroupStruct),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
    ]


class DecoderStruct(Structure):
    """mq_decoder."""

    _fields_ = [
        ("layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("intermediate", c_int32),
        ("capacity", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("layer", c_void_p),
        ("final_norm", c_void_p),
        ("residual", RotationStruct),
    ]


_STRUCTS = (PatchStruct, RotationStruct, GroupStruct, LayerStruct, DecoderStruct)

_SIGNATURES = {
    "mq_struct_size": (c_int64, [c_int32]),
    "mq_instruction_sets": (c_char_p, [c_int32]),
    "mq_select": (c_int32, [c_char_p]),
    "mq_selected": (c_char_p, []),
    "mq_threads": (c_int32, []),
    "mq_pack": (None, [c_int32, c_int32, c_int32, c_void_p, c_int64, c_void_p]),
    "mq_unpack": (None, [c_int32, c_int32, c_int32, c_void_p, c_void_p, c_int64]),
    "mq_group_forward": (
        c_int32,
        [POINTER(GroupStruct), c_void_p, c_int32, c_int64, c_void_p, POINTER(c_void_p), c_int32],
    ),
    "mq_quantize": (c_int32, [POINTER(GroupStruct), c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p]),
    "mq_decoder_forward": (
        c_int32,
        [POINTER(DecoderStruct), c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64],
    ),
    "mq_patched_tokens": (c_int64, []),
    "mq_read": (c_int64, [c_void_p, c_int64]),
    "mq_peak": (c_int64, [c_int64]),
}


def _library_file() -> Path | None:
    """The library beside the package, or, of an editable installation, among the files it installed."""
    beside = Path(__file__).parent.parent / "native" / LIBRARY
    if beside.exists():
        return beside
    try:
        files = metadata.files("masquant") or []
    except metadata.PackageNotFoundError:
        return None
    return next((path for f in files if f.name == LIBRARY and (path := Path(str(f.locate()))).exists()), None)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None, f"{VARIABLE}=off"
    if sys.byteorder != "little":
        return None, "the kernels need a little-endian CPU"
    file = _library_file()
    if file is None:
        return None, f"masquant was installed without {LIBRARY} (no C++ compiler or OpenMP was found then)"
    try:
        library = ctypes.CDLL(str(file))  # after torch, so that both share one OpenMP pool
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be loaded: {error}"
    for which, struct in enumerate(_STRUCTS):
        if library.mq_struct_size(which) != ctypes.sizeof(struct):
            return None, f"{file} belongs to another version of masquant; install masquant again"
    if wanted and not library.mq_select(wanted.encode()):
        usable = library.mq_instruction_sets(1).decode()
        raise KernelError(f"{VARIABLE}={wanted}: this CPU has {usable.replace(',', ', ')}; or 'off' for PyTorch")
    return library, ""


def library() -> ctypes.CDLL | None:
    """The kernels, or None where there are none; says so once.

    Raises:
        KernelError: the environment asks for an instruction set that this CPU lacks.
    """
    loaded, problem = _load()
    if loaded is None:
        _warn_once(problem)
    return loaded


@lru_cache(maxsize=1)
def _warn_once(problem: str) -> None:
    _logger.warning(
        "masquant runs its low-bit linears in PyTorch, which is many times slower than its kernels: %s", problem
    )


def instruction_set() -> str | None:
    """Instruction set of the kernels in use, None without kernels."""
    loaded, _ = _load()
    return loaded.mq_selected().decode() if loaded is not None else None


def instruction_sets(*, usable: bool = True) -> tuple[str, ...]:
    """Instruction sets that the library has, best first; those of this CPU if `usable`."""
    loaded, _ = _load()
    return tuple(loaded.mq_instruction_sets(int(usable)).decode().split(",")) if loaded is not None else ()


def select(name: str) -> None:
    """Use another instruction set.

    Raises:
        KernelError: there are no kernels, or this CPU lacks it.
    """
    loaded, problem = _load()
    if loaded is None or not loaded.mq_select(name.encode()):
        raise KernelError(f"cannot select the kernels {name!r}: {problem or ', '.join(instruction_sets())}")


def patched_tokens() -> int:
    """Tokens that went through a patch so far, over all groups; 0 without kernels."""
    loaded, _ = _load()
    return int(loaded.mq_patched_tokens()) if loaded is not None else 0


def check(code: int) -> None:
    """Turn a kernel's return code into an error."""
    if code != 0:
        raise KernelError("out of memory in a kernel")


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data, None of none."""
    return None if tensor is None else tensor.data_ptr()


def rotation_struct(rotation: Rotation | None, keep: list[Tensor]) -> RotationStruct:
    """mq_rotation; the tensors that it points to are added to `keep`."""
    if rotation is None:
        return RotationStruct()
    sign, odd = rotation.signs_and_odd_part()
    keep += [sign, odd]
    return RotationStruct(rotation.size, len(odd), pointer(sign), pointer(odd))
