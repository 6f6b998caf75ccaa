# SPDX-License-Identifier: Apache-2.0
"""Prompt and answer speed of whole models on this CPU, text only, against llama.cpp and transformers.

    python benchmarks/end_to_end.py --json end_to_end.json                 # omni-135m and random weights of 3B shapes
    python benchmarks/end_to_end.py --models omni-135m --checkpoint OUT    # an own quantized checkpoint of it

masquant runs W4A8 in groups of 64 with embeddings and head in 8 bits; llama.cpp (llama-cpp-python, if installed) the
same float weights as Q4_0 with embeddings and head in Q8_0; transformers the float model in bfloat16; OpenVINO (if
installed) 4 bits in groups of 64 with embeddings and head in 8. All are in one process and take turns;
a prompt of 256 tokens, then 64 tokens one by one. Memory is the growth of the resident set while an engine is loaded
and run once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from linear import machine
from rich.console import Console
from rich.table import Table

import masquant
from masquant.api import quantize_folder, resident_bytes
from masquant.checkpoint.format import HeadFormat, make_format
from masquant.demo import demo_directory, obtain_model
from masquant.generation import native_decoder, stream
from masquant.integrations.loading import load_any
from masquant.integrations.transformers import build_quantized_shell, state_of
from masquant.modality import attach_routing
from masquant.models import decoder_of, family_of
from masquant.plan import make_plan
from masquant.recipe import ActivationArgs, Recipe
from masquant.runtime import MasquantLinear, native

PROMPT, ANSWER = 256, 64


class Engine(ABC):
    """One way to run a model."""

    name: str

    @abstractmethod
    def run(self, prompt: list[int], answer: int) -> tuple[float, float]:
        """Seconds to read the prompt, and seconds for each token after it."""


class Masquant(Engine):
    """`masquant.stream`, with all its cost per token."""

    def __init__(self, model: Any) -> None:
        self.name, self.model = "masquant W4A8 g64", model
        native_decoder(model)

    def run(self, prompt: list[int], answer: int) -> tuple[float, float]:
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        times = [time.perf_counter()]
        for _ in stream(self.model, inputs, max_new_tokens=answer, min_new_tokens=answer):
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / (len(times) - 2)


class Transformers(Engine):
    """The float model with its own cache, without `generate`'s cost per token."""

    def __init__(self, model: Any) -> None:
        self.name, self.model = "transformers bfloat16", model

    @torch.inference_mode()
    def run(self, prompt: list[int], answer: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = self.model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(answer):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return first - start, (time.perf_counter() - first) / answer


class LlamaCpp(Engine):
    """llama.cpp's C interface through llama-cpp-python."""

    def __init__(self, file: Path) -> None:
        import llama_cpp

        self.name, self.lib = "llama.cpp Q4_0", llama_cpp
        callback = llama_cpp.llama_log_callback(lambda *_: None)
        self.kept = callback
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 1024, 512, 512
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _decode(self, tokens: list[int]) -> int:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama.cpp failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def run(self, prompt: list[int], answer: int) -> tuple[float, float]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        start = time.perf_counter()
        token = self._decode(prompt)
        first = time.perf_counter()
        for _ in range(answer):
            token = self._decode([token])
        return first - start, (time.perf_counter() - first) / answer


class OpenVino(Engine):
    """The decoder as an OpenVINO graph."""

    def __init__(self, config: Any, get: Callable[[str], torch.Tensor | None]) -> None:
        from openvino_model import Runner

        self.name, self.runner = "openvino int4 g64", Runner(config, get)

    def run(self, prompt: list[int], answer: int) -> tuple[float, float]:
        self.runner.reset()
        start = time.perf_counter()
        token = self.runner.next(prompt)
        first = time.perf_counter()
        for _ in range(answer):
            token = self.runner.next([token])
        return first - start, (time.perf_counter() - first) / answer


def write_gguf(file: Path, config: Any, tensors: Callable[[str, tuple[int, ...], str], np.ndarray | None]) -> None:
    """A GGUF of the decoder as the architecture with biased q, k and v and halves paired in the rotary embedding.

    Args:
        file: to write.
        config: of the text model.
        tensors: gives a tensor by its name in transformers, shape and type ("Q4_0", "Q8_0", "F32"), already as bytes
            of quantized types; None where the model has none.
    """
    import gguf

    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    hidden, inner = config.hidden_size, config.intermediate_size
    size = hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    block = {
        "attn_norm.weight": ("input_layernorm.weight", (hidden,)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (hidden,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q, hidden)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv, hidden)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv, hidden)),
        "attn_q.bias": ("self_attn.q_proj.bias", (q,)),
        "attn_k.bias": ("self_attn.k_proj.bias", (kv,)),
        "attn_v.bias": ("self_attn.v_proj.bias", (kv,)),
        "attn_output.weight": ("self_attn.o_proj.weight", (hidden, q)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, hidden)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, hidden)),
        "ffn_down.weight": ("mlp.down_proj.weight", (hidden, inner)),
    }
    names = {"token_embd.weight": ("embed_tokens.weight", (config.vocab_size, hidden))}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{ours}": (f"layers.{i}.{theirs}", shape) for ours, (theirs, shape) in block.items()}
    names["output_norm.weight"] = ("norm.weight", (hidden,))
    for name, (theirs, shape) in names.items():
        kind = "F32" if len(shape) == 1 else "Q8_0" if name.startswith("token") else "Q4_0"
        data = tensors(theirs, shape, kind)
        if data is not None:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(decoder: Any) -> Callable[[str, tuple[int, ...], str], np.ndarray | None]:
    """A float decoder's weights, quantized as llama.cpp's own tool does."""
    import gguf

    state = decoder.state_dict()

    def get(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray | None:
        if name not in state:
            return None
        values = state[name].float().numpy()
        return values if kind == "F32" else gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])

    return get


def random_tensors(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random integers with small scales."""
    random = np.random.default_rng(len(name))
    if kind == "F32":
        return np.ones(shape, np.float32) if "norm" in name else np.zeros(shape, np.float32)
    size = 18 if kind == "Q4_0" else 34  # bytes of 32 values: a float16 scale, then the integers
    data = random.integers(0, 256, (shape[0], shape[1] // 32, size), dtype=np.uint8)
    data[..., :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
    return data.reshape(shape[0], -1)


def config_3b() -> Any:
    """A vision-language model whose decoder has the shapes of Qwen2.5-3B, with a tiny encoder."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 2048}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


@torch.no_grad()
def random_quantized(config: Any) -> Any:
    """A quantized model with random integers."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    plan = make_plan(model, Recipe.preset("rtn", "W4A8", 64))
    head = HeadFormat(tied=True)
    checkpoint = make_format(family_of(config), plan.blocks, ActivationArgs(8), (), {}, None, head)
    build_quantized_shell(model, checkpoint, torch.float32)
    decoder = decoder_of(model)
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    for module in model.modules():
        if isinstance(module, MasquantLinear):
            for name, tensor in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
            module.weight_packed.random_(-(2**31), 2**31)
            module.weight_scale.fill_(0.004)
            if module.group.followers + 1 == len(module.group.linears) and module.member == module.group.followers:
                module.packed(torch.device("cpu"))  # each group at once, as in use
        else:
            for name, tensor in module.named_parameters(recurse=False):
                if tensor.is_meta:
                    setattr(module, name, torch.nn.Parameter(torch.ones(tensor.shape), requires_grad=False))
    attach_routing(model, decoder, state_of(model))
    return model.eval()


@torch.no_grad()
def random_float(config: Any) -> Any:
    """A model in bfloat16 with random weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).bfloat16()
    decoder = decoder_of(model.to_empty(device="cpu"))
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
    model.tie_weights()
    for tensor in model.parameters():
        tensor.normal_(0, 0.02) if tensor.dim() > 1 else tensor.fill_(1)
    return model.eval()


@torch.inference_mode()
def media_cost(model: Any, rounds: int) -> list[dict[str, Any]]:
    """Tokens/s of a prompt of text alone and of one modality's tokens alone, through all blocks, in turn."""
    decoder = native_decoder(model)
    names = [m.value for m in decoder.state.tokens.modalities]
    hidden = torch.randn(PROMPT, decoder.hidden)
    cosine, sine = decoder.rotary(torch.arange(PROMPT)[None])
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for row, name in enumerate(names):
            decoder.reset()
            start = time.perf_counter()
            decoder.forward(hidden, torch.full((PROMPT,), row, dtype=torch.uint8) if row else None, cosine, sine)
            times[name].append(time.perf_counter() - start)
    decoder.reset()
    found = {name: PROMPT / statistics.median(seconds[1:]) for name, seconds in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name][1:], times["text"][1:], strict=True))
        for name in names
    }
    return [
        {"what": f"tokens of {name}", "path": "masquant", "median": found[name], "best": PROMPT / min(times[name]),
         "unit": "tokens/s", "cost_against_text": ratios[name]}
        for name in names
    ]  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def build(what: str, checkpoint: Path | None, folder: Path) -> list[tuple[Engine, int, dict[str, int]]]:
    """The engines for one model, with the memory that each took and what it should take."""
    makers: list[Callable[[], Engine]] = []
    if what == "omni-135m":
        model = obtain_model(on_progress=print)
        if checkpoint is None:
            checkpoint = folder / "quantized"
            import dataclasses

            recipe = dataclasses.replace(Recipe.preset("masquant", "W4A8", 64).fast(), quantize_lm_head=True)
            samples = masquant.load_samples(demo_directory() / "data/calibration")
            quantize_folder(model, checkpoint, samples, recipe)
        makers.append(lambda: Masquant(masquant.load(checkpoint)))
        makers.append(lambda: Transformers(load_any(model, dtype=torch.bfloat16)))
        float_model = cache(lambda: load_any(model, dtype=torch.float32))
        text = float_model().config.get_text_config()
        gguf_tensors: Any = tensors_of(decoder_of(float_model()))
    else:
        config = config_3b()
        float_model = cache(lambda: random_float(config))
        makers.append(lambda: Masquant(random_quantized(config)))
        makers.append(lambda: Transformers(float_model()))
        text, gguf_tensors = config.get_text_config(), random_tensors

    def weight(name: str) -> torch.Tensor | None:
        found = decoder_of(float_model()).state_dict().get(name)
        return None if found is None else found.float()

    try:
        import llama_cpp  # noqa: F401

        write_gguf(folder / f"{what}.gguf", text, gguf_tensors)
        makers.append(lambda: LlamaCpp(folder / f"{what}.gguf"))
    except ImportError:
        print("llama-cpp-python is not installed: left out")
    if importlib.util.find_spec("openvino") is not None:
        makers.append(lambda: OpenVino(text, weight))
    engines = []
    prompt = list(range(5, 5 + 16))
    for make in makers:
        before = resident()
        engine = make()
        engine.run(prompt, 2)
        expected: dict[str, int] = {}
        if isinstance(engine, Masquant):
            expected = {**resident_bytes(engine.model), "cache": native_decoder(engine.model).cache_bytes}
        engines.append((engine, resident() - before, expected))
    return engines


def weight_bytes(model: Any) -> int:
    """Bytes that one decoded token reads: packed weights and scales of all linears and the head."""
    groups = {id(m.group): m.group for m in model.modules() if isinstance(m, MasquantLinear)}
    return sum(g.packed.weight_bytes for g in groups.values() if g.packed is not None)


def read_seconds(size: int) -> float:
    """Seconds to read so many bytes with all threads."""
    library = native.library()
    assert library is not None
    data = torch.ones(min(size, 1 << 30), dtype=torch.uint8)  # written, so that it is in memory
    library.mq_read(data.data_ptr(), data.numel())
    start = time.perf_counter()
    library.mq_read(data.data_ptr(), data.numel())
    return (time.perf_counter() - start) * size / data.numel()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="omni-135m,3b", help="omni-135m, 3b")
    parser.add_argument("--checkpoint", type=Path, help="quantized omni-135m; default: quantized here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, rows = Console(), []
    random = np.random.default_rng(0)
    for what in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            engines = build(what, arguments.checkpoint, Path(folder))
            times: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine, *_ in engines}
            limits = []
            size = weight_bytes(next(e.model for e, *_ in engines if isinstance(e, Masquant)))
            prompt = [int(t) for t in random.integers(5, 40000, PROMPT)]
            for _ in range(arguments.rounds):
                limits.append(read_seconds(size))
                for engine, *_ in engines:
                    times[engine.name].append(engine.run(prompt, ANSWER))
            for row in media_cost(next(e.model for e, *_ in engines if isinstance(e, Masquant)), 3 * arguments.rounds):
                rows.append({**row, "what": f"{what}, {row['what']}"})
                console.print(
                    f"{row['what']}: {row['median']:.0f} tokens/s, {row['cost_against_text']:.2f} x text's time"
                )
            table = Table(
                "engine", "prompt tokens/s", "(best)", "answer tokens/s", "(best)", "of reading", "MiB", "needed"
            )
            for engine, memory, expected in engines:
                prompts, answers = zip(*times[engine.name], strict=True)
                share = statistics.median(limits) / statistics.median(answers)
                row = {
                    "prompt": PROMPT / statistics.median(prompts), "prompt_best": PROMPT / min(prompts),
                    "answer": 1 / statistics.median(answers), "answer_best": 1 / min(answers),
                }  # fmt: skip
                for name in ("prompt", "answer"):
                    rows.append(
                        {"what": f"{what}, {name}", "path": engine.name, "median": row[name], "best":
                         row[f"{name}_best"], "unit": "tokens/s", "memory": memory, "expected_memory": expected,
                         **({"share_of_limit": share} if name == "answer" else {})}
                    )  # fmt: skip
                table.add_row(
                    engine.name, *(f"{v:.1f}" for v in row.values()),
                    f"{share:.0%}" if isinstance(engine, Masquant) else "", f"{memory / 2**20:.0f}",
                    f"{sum(expected.values()) / 2**20:.0f}" if expected else "",
                )  # fmt: skip
            console.print(f"{what}: prompt of {PROMPT} tokens, {ANSWER} tokens of answer")
            console.print(table)
            rows.append({"what": f"{what}, limit", "path": "read the packed weights once a token", "unit": "tokens/s",
                         "median": 1 / statistics.median(limits), "best": 1 / min(limits)})  # fmt: skip
            if arguments.json:
                arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
            del engines
            gc.collect()


if __name__ == "__main__":
    main()
