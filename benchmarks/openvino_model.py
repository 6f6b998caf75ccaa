# SPDX-License-Identifier: Apache-2.0
"""A pre-norm decoder with rotary attention as an OpenVINO graph with a cache: linears of 4 bits, the rest of 8.

Written with OpenVINO's own operations, because its exporter for language models needs other versions of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset6
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo
from torch import Tensor

from masquant.quantization import absmax_scale, quantize_weight

GROUP = 64


class Decoder:
    """The graph's parts; `get(name)` gives a float weight by its name in transformers, None where there is none."""

    def __init__(self, config: Any, get: Callable[[str], Tensor | None]) -> None:
        self.config, self.get = config, get
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.sinks: list[Any] = []
        self.kept: list[np.ndarray] = []  # a packed tensor does not own its memory

    def weight(self, name: str) -> Tensor:
        """A weight that must be there."""
        found = self.get(name)
        assert found is not None, name
        return found

    def rows_of_4_bits(self, w: Tensor) -> Any:
        """float32 [out, in] of a constant in groups."""
        out, features = w.shape
        scale = absmax_scale(w, 4, GROUP)
        q = (quantize_weight(w, scale, 4).numpy().reshape(-1) & 15).astype(np.uint8)
        data = np.ascontiguousarray(q[::2] | (q[1::2] << 4))
        self.kept.append(data)
        constant = ops.constant(ov.Tensor(data, [out, features // GROUP, GROUP], ov.Type.i4))
        value = ops.multiply(
            ops.convert(constant, np.float16), ops.constant(scale.numpy().astype(np.float16)[..., None])
        )
        return ops.convert(ops.reshape(value, ops.constant(np.array([out, features])), False), np.float32)

    def rows_of_8_bits(self, w: Tensor) -> Any:
        """float32 [out, in] of a constant with one scale a row."""
        scale = absmax_scale(w, 8, None)
        constant = ops.constant(quantize_weight(w, scale, 8).numpy())
        value = ops.multiply(ops.convert(constant, np.float16), ops.constant(scale.numpy().astype(np.float16)))
        return ops.convert(value, np.float32)

    def linear(self, x: Any, name: str) -> Any:
        """A linear with its bias, if it has one."""
        y, bias = (
            ops.matmul(x, self.rows_of_4_bits(self.weight(name + ".weight")), False, True),
            self.get(name + ".bias"),
        )
        return y if bias is None else ops.add(y, ops.constant(bias.float().numpy()))

    def norm(self, x: Any, name: str) -> Any:
        """RMSNorm."""
        mean = ops.reduce_mean(ops.multiply(x, x), ops.constant([-1]), True)
        root = ops.sqrt(ops.add(mean, ops.constant(np.float32(self.config.rms_norm_eps))))
        return ops.multiply(ops.divide(x, root), ops.constant(self.weight(name).float().numpy()))

    def turned(self, x: Any, cosine: Any, sine: Any) -> Any:
        """Rotary embedding of [1, heads, tokens, size], halves paired."""
        half, step, axis = self.size // 2, ops.constant([1]), ops.constant([3])
        first, second = (
            ops.slice(x, ops.constant([start]), ops.constant([start + half]), step, axis) for start in (0, half)
        )
        return ops.add(ops.multiply(x, cosine), ops.multiply(ops.concat([ops.negative(second), first], 3), sine))

    def split(self, x: Any, heads: int) -> Any:
        """[1, heads, tokens, size] of [1, tokens, heads * size]."""
        parts = ops.reshape(x, ops.constant([1, -1, heads, self.size]), False)
        return ops.transpose(parts, ops.constant([0, 2, 1, 3]))

    def cached(self, name: str, new: Any) -> Any:
        """All keys or values so far, repeated for the query heads."""
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([1, self.kv_heads, -1, self.size]), ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        empty = ops.constant(np.zeros((1, self.kv_heads, 0, self.size), np.float32))
        full = ops.concat([opset6.read_value(empty, variable), new], 2)
        self.sinks.append(opset6.assign(full, variable))
        repeats = ops.constant([1, 1, self.heads // self.kv_heads, 1, 1])
        wide = ops.tile(ops.unsqueeze(full, ops.constant(2)), repeats)
        return ops.reshape(wide, ops.constant([1, self.heads, -1, self.size]), False)

    def model(self) -> ov.Model:
        """Inputs: token ids int64 [1, tokens] and positions int64 [tokens]; output: the last token's logits."""
        config = self.config
        ids, positions = ops.parameter([1, -1], np.int64), ops.parameter([-1], np.int64)
        embeddings = self.rows_of_8_bits(self.weight("embed_tokens.weight"))
        x = ops.gather(embeddings, ids, ops.constant(0))
        exponents = np.arange(0, self.size, 2, dtype=np.float32) / self.size
        frequencies = ops.constant((1.0 / config.rope_parameters["rope_theta"] ** exponents)[None].astype(np.float32))
        angles = ops.multiply(ops.unsqueeze(ops.convert(positions, np.float32), ops.constant(1)), frequencies)
        angles = ops.concat([angles, angles], 1)
        cosine, sine = ops.cos(angles), ops.sin(angles)
        mask = None
        for i in range(config.num_hidden_layers):
            block = f"layers.{i}."
            h = self.norm(x, block + "input_layernorm.weight")
            q, k, v = (self.linear(h, f"{block}self_attn.{part}_proj") for part in "qkv")
            q = self.turned(self.split(q, self.heads), cosine, sine)
            keys = self.cached(f"k{i}", self.turned(self.split(k, self.kv_heads), cosine, sine))
            values = self.cached(f"v{i}", self.split(v, self.kv_heads))
            if mask is None:
                total = ops.gather(ops.shape_of(keys), ops.constant(2), ops.constant(0))
                at = ops.range(ops.constant(np.int64(0)), total, ops.constant(np.int64(1)), "i64")
                seen = ops.less_equal(ops.unsqueeze(at, ops.constant(0)), ops.unsqueeze(positions, ops.constant(1)))
                mask = ops.select(seen, ops.constant(np.float32(0)), ops.constant(np.float32(-1e30)))
                mask = ops.unsqueeze(mask, ops.constant([0, 1]))
            a = ops.transpose(ops.scaled_dot_product_attention(q, keys, values, mask), ops.constant([0, 2, 1, 3]))
            a = ops.reshape(a, ops.constant([1, -1, config.hidden_size]), False)
            x = ops.add(x, self.linear(a, block + "self_attn.o_proj"))
            h = self.norm(x, block + "post_attention_layernorm.weight")
            gate, up = (self.linear(h, f"{block}mlp.{part}_proj") for part in ("gate", "up"))
            x = ops.add(x, self.linear(ops.multiply(ops.swish(gate), up), block + "mlp.down_proj"))
        last = ops.gather(self.norm(x, "norm.weight"), ops.constant([-1]), ops.constant(1))
        logits = ops.matmul(last, embeddings, False, True)
        return ov.Model([ops.result(logits)], self.sinks, [ids, positions])


class Runner:
    """A compiled graph and its sequence."""

    def __init__(self, config: Any, get: Callable[[str], Tensor | None]) -> None:
        self.decoder = Decoder(config, get)
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}
        self.request = ov.Core().compile_model(self.decoder.model(), "CPU", options).create_infer_request()
        self.length = 0

    def reset(self) -> None:
        """Forget the sequence."""
        self.request.reset_state()
        self.length = 0

    def next(self, tokens: list[int]) -> int:
        """The likeliest token after these."""
        positions = np.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        return int(self.request.infer([np.array([tokens]), positions])[0].argmax())
