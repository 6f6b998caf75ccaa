# SPDX-License-Identifier: Apache-2.0
"""Speed of one low-bit linear on this CPU, against other libraries and against what the machine can do.

    python benchmarks/linear.py --json linear.json
    python benchmarks/linear.py --shapes 2048x2048 --tokens 1

All paths run in turn in one process, so that ratios hold when the machine's speed drifts. With one token every call
reads other copies of the weights, together more than the caches hold, as decoding does; the limit is then the time to
read the packed integers. With many tokens the limit is the CPU's integer products in registers. Libraries that are not
installed are left out (pip install onnxruntime onnx openvino).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import masquant
from masquant.quantization import absmax_scale, dequantize_weight, pack, quantize_weight
from masquant.runtime import native
from masquant.runtime.packed import PackedGroup

SHAPES = ("576x1536", "1536x576", "2048x2048", "2048x11008", "11008x2048")
COLD_BYTES = 160e6  # of weights, walked through with one token
GROUP = 64


@dataclass
class Path_:
    """One way to compute the linear: `calls` are equal but for the copy of the weights."""

    name: str
    calls: list[Callable[[], Any]]
    error: float | None = None


def masquant_path(name: str, w: torch.Tensor, x: torch.Tensor, copies: int, bits: int, size: int | None) -> Path_:
    """Our kernel."""
    scale = absmax_scale(w, bits, size)
    q = quantize_weight(w, scale, bits)
    packed = pack(q, bits)
    groups = [
        PackedGroup([packed], [scale.bfloat16()], [None], in_features=w.shape[1], num_bits=bits, activation_bits=8)
        for _ in range(copies)
    ]
    wanted = x @ dequantize_weight(q, scale).t()
    error = float((groups[0].forward(x, None)[0] - wanted).norm() / wanted.norm())
    return Path_(name, [lambda g=g: g.forward(x, None) for g in groups], error)  # type: ignore[misc]


def torch_paths(w: torch.Tensor, x: torch.Tensor, copies: int) -> list[Path_]:
    """bfloat16, and torch's own 4-bit weights with bfloat16 activations."""
    half, xh = w.bfloat16(), x.bfloat16()
    weights = [half.clone() for _ in range(max(copies // 4, 1))]
    paths = [Path_("torch bfloat16", [lambda v=v: torch.nn.functional.linear(xh, v) for v in weights])]  # type: ignore[misc]
    scale = absmax_scale(w, 4, GROUP)
    unsigned = (quantize_weight(w, scale, 4).int() + 8).contiguous()
    zeros = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous().bfloat16()
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    packs = [int4.clone() for _ in range(copies)]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    paths.append(Path_("torch int4pack g64 (W4A16)", [lambda p=p: product(xh, p, GROUP, zeros) for p in packs]))  # type: ignore[misc]
    return paths


def onnxruntime_path(w: torch.Tensor, x: torch.Tensor, copies: int) -> Path_ | None:
    """MatMulNBits with integer products (accuracy level 4), groups of 128 where they divide, else 64."""
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError:
        return None
    out, features = w.shape
    size = 128 if features % 128 == 0 else 64
    scale = absmax_scale(w, 4, size)
    q = (quantize_weight(w, scale, 4).to(torch.int16) + 8).to(torch.uint8).numpy().reshape(out, features // size, size)
    blob = (q[..., ::2] | (q[..., 1::2] << 4)).astype(np.uint8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = []
    for i in range(copies):
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=features, N=out, bits=4,
            block_size=size, accuracy_level=4,
        )  # fmt: skip
        constants = [  # different ones: equal constants are merged
            onnx.numpy_helper.from_array(np.roll(blob, i, 0), "w"),
            onnx.numpy_helper.from_array(np.roll(scale.float().numpy(), i, 0).reshape(-1), "s"),
        ]
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", k]) for n, k in (("x", features), ("y", out))
        ]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    feed = {"x": x.numpy()}
    return Path_(f"onnxruntime MatMulNBits g{size}", [lambda s=s: s.run(None, feed) for s in sessions])  # type: ignore[misc]


def openvino_path(w: torch.Tensor, x: torch.Tensor, copies: int) -> Path_ | None:
    """4-bit weights in groups of 64, activations quantized by OpenVINO in groups of 64."""
    try:
        import openvino as ov
        from openvino import opset13 as ops
    except ImportError:
        return None
    out, features = w.shape
    scale = absmax_scale(w, 4, GROUP).float().numpy()
    q = quantize_weight(w, absmax_scale(w, 4, GROUP), 4).numpy().astype(np.int8)
    core, requests, kept = ov.Core(), [], []
    for i in range(copies):
        nibbles = (np.roll(q, i, 0).reshape(-1) & 15).astype(np.uint8)
        data = np.ascontiguousarray(nibbles[::2] | (nibbles[1::2] << 4))
        kept.append(data)
        constant = ops.constant(ov.Tensor(data, [out, features // GROUP, GROUP], ov.Type.i4))
        value = ops.multiply(ops.convert(constant, np.float16), ops.constant(scale.astype(np.float16)[..., None]))
        value = ops.convert(ops.reshape(value, ops.constant([out, features]), False), np.float32)
        parameter = ops.parameter([-1, features], np.float32)
        model = ov.Model([ops.matmul(parameter, value, False, True)], [parameter])
        config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}
        requests.append(core.compile_model(model, "CPU", config).create_infer_request())
    values = x.numpy()
    calls = [lambda r=r: r.infer([values], share_inputs=True) for r in requests]  # type: ignore[misc]
    calls[0].kept = kept  # type: ignore[attr-defined]
    return Path_("openvino int4 g64", calls)


def limit_path(w: torch.Tensor, tokens: int, copies: int) -> Path_:
    """What the machine can do: read the packed integers, or do the products in registers."""
    library = native.library()
    assert library is not None
    if tokens == 1:
        parts = [torch.zeros(w.numel() // 2, dtype=torch.uint8) for _ in range(copies)]
        reads = [lambda p=p: library.mq_read(p.data_ptr(), p.numel()) for p in parts]  # type: ignore[misc]
        return Path_("limit: read 4-bit weights", reads)
    each = library.mq_peak(1)
    rounds = max(2 * tokens * w.numel() // each, 1)
    return Path_("limit: products in registers", [lambda: library.mq_peak(rounds)])


def measure(paths: list[Path_], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, paths in turn."""
    times: dict[str, list[float]] = {p.name: [] for p in paths}
    for p in paths:
        p.calls[0]()
    for _ in range(rounds):
        for p in paths:
            for call in p.calls:
                start = time.perf_counter()
                call()
                times[p.name].append(time.perf_counter() - start)
    return times


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((li.split(":")[1].strip() for li in info.read_text().splitlines() if "model name" in li), name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "kernels": native.instruction_set(),
        "masquant": masquant.__version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="in x out, separated by commas")
    parser.add_argument("--tokens", default="1,256")
    parser.add_argument("--rounds", type=int, default=0, help="default 8 with one token, 15 with more")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if native.library() is None:
        raise SystemExit("there are no kernels to measure")
    console = Console()
    rows: list[dict[str, Any]] = []
    for tokens in map(int, arguments.tokens.split(",")):
        for shape in arguments.shapes.split(","):
            features, out = map(int, shape.split("x"))
            torch.manual_seed(0)
            w, x = torch.randn(out, features) / features**0.5, torch.randn(tokens, features)
            copies = max(2, round(COLD_BYTES / (w.numel() / 2))) if tokens == 1 else 1
            copies = min(copies, 64)
            paths = [limit_path(w, tokens, copies), masquant_path("masquant W4A8 g64", w, x, copies, 4, GROUP)]
            paths += [masquant_path("masquant W4A8 channel", w, x, copies, 4, None)]
            paths += [masquant_path("masquant W8A8 channel", w, x, max(copies // 2, 1), 8, None)]
            paths += torch_paths(w, x, copies)
            paths += [p for p in (onnxruntime_path(w, x, copies), openvino_path(w, x, copies)) if p is not None]
            times = measure(paths, arguments.rounds or (8 if tokens == 1 else 15))
            limit = times[paths[0].name]
            operations = 2 * tokens * w.numel()
            table = Table("path", "median µs", "best µs", "GB/s" if tokens == 1 else "GOPS", "of limit")
            for path in paths:
                median, best = statistics.median(times[path.name]), min(times[path.name])
                share = statistics.median(limit) / median
                rate = w.numel() / 2 / median / 1e9 if tokens == 1 else operations / median / 1e9
                rows.append(
                    {"what": f"{shape}, {tokens} tokens", "path": path.name, "median": median * 1e6,
                     "best": best * 1e6, "unit": "us", "rate": rate, "share_of_limit": share, "error": path.error}
                )  # fmt: skip
                table.add_row(path.name, f"{median * 1e6:.0f}", f"{best * 1e6:.0f}", f"{rate:.1f}", f"{share:.0%}")
            console.print(f"{shape} (in x out), {tokens} tokens")
            console.print(table)
            if arguments.json:
                arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
