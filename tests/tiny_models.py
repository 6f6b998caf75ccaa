# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the real transformers classes, with real processors and little conversations.

Nothing is downloaded. A model has 2 decoder layers of width 64; its norm weights and biases are random too, so that
an error in folding shows. One image patch is 7 pixels; in the Qwen families 2 x 2 patches are one token. Audio lasts
at most one second, which is 25 tokens.

Example:
    model, processor = tiny_model("qwen2_5_omni"), tiny_processor("qwen2_5_omni")
    samples = tiny_samples("qwen2_5_omni", tmp_path)
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SAMPLING_RATE = 16_000
VOCAB_SIZE = 288  # 256 bytes, then the special tokens of a family; a few ids stay unused, as in real models
PATCH = 7
VIDEO_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}  # the Qwen families' video size, in pixels per frame

_SIDE = 4 * PATCH
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
_PINPOINTS = [[_SIDE, _SIDE], [_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE]]

TokenIds = Mapping[str, int]


@dataclass(frozen=True)
class TinyFamily:
    """One model family as it is tested.

    Attributes:
        media: what the family takes besides text: `image`, `video`, `audio`.
        special_tokens: name -> token, in the order of the token ids; names in `_token` become tokenizer attributes.
        chat_template: Jinja source, in the family's own format.
        model_class: the transformers class.
        config: arguments of the model's config, from the token ids by name.
        processor_class: the transformers class.
        components: arguments of the processor besides tokenizer and chat template.
    """

    media: tuple[str, ...]
    special_tokens: Mapping[str, str]
    chat_template: str
    model_class: type[hf.PreTrainedModel]
    config: Callable[[TokenIds], dict[str, Any]]
    processor_class: type[hf.ProcessorMixin]
    components: Callable[[], dict[str, Any]]

    @property
    def token_ids(self) -> TokenIds:
        """Token id of every special token, by its name."""
        return {name: 256 + position for position, name in enumerate(self.special_tokens)}


def _text_config(ids: TokenIds, **changes: Any) -> dict[str, Any]:
    """The decoder that all families share, with `changes`."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 1024}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    tokens = {f"{name}_token_id": ids.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    return sizes | layers | tokens | changes


_WIDTHS = {"hidden_size": 32, "intermediate_size": 64}
_TOWER = _WIDTHS | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": _SIDE, "patch_size": PATCH}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN2_VISION = _QWEN_VISION | {"embed_dim": 32, "hidden_size": 64}
_QWEN2_5_VISION = _QWEN_VISION | _WIDTHS | {"out_hidden_size": 64, "window_size": _SIDE, "fullatt_block_indexes": [1]}
_AUDIO = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32}
_AUDIO |= {"max_source_positions": 50}  # one second, after the encoder's convolution of stride 2


def _qwen2_5_omni_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, rope_parameters=dict(_MROPE)),
        "vision_config": dict(_QWEN2_5_VISION),
        "audio_config": _AUDIO | {"output_dim": 64, "n_window": 10},
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "audio_token_index": ids["audio_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "user_token_id": ids["im_start"],
        "tie_word_embeddings": False,
    }


def _qwen_vl_config(vision: Mapping[str, Any], ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, rope_parameters=dict(_MROPE)),
        "vision_config": dict(vision),
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": False,
    }


def _llava_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, model_type="llama", num_key_value_heads=4),  # no GQA, as in LLaVA 1.5
        "vision_config": _TOWER | {"model_type": "clip_vision_model"},
        "image_token_index": ids["image_token"],
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _llava_onevision_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, model_type="qwen2"),
        "vision_config": _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "image_grid_pinpoints": _PINPOINTS,
    }


def _qwen2_audio_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, model_type="qwen2", num_key_value_heads=4, intermediate_size=96),
        "audio_config": _AUDIO | {"model_type": "qwen2_audio_encoder"},
        "audio_token_index": ids["audio_token"],
    }


def _qwen_vision_components() -> dict[str, Any]:
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return {
        "image_processor": hf.Qwen2VLImageProcessor(size=size, **patches),
        "video_processor": hf.Qwen2VLVideoProcessor(size=dict(VIDEO_SIZE), cap_pixels_per_frame=False, **patches),
    }


def _audio_components() -> dict[str, Any]:
    return {"feature_extractor": hf.WhisperFeatureExtractor(16, sampling_rate=SAMPLING_RATE, chunk_length=1)}


def _llava_components() -> dict[str, Any]:
    size, crop_size = {"shortest_edge": _SIDE}, {"height": _SIDE, "width": _SIDE}
    return {
        "image_processor": hf.CLIPImageProcessor(size=size, crop_size=crop_size),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token, which the strategy "default" drops again
    }


def _llava_onevision_components() -> dict[str, Any]:
    size = {"height": _SIDE, "width": _SIDE}
    return {
        "image_processor": hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_PINPOINTS),
        "video_processor": hf.LlavaOnevisionVideoProcessor(size=size),
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
    }


def _chatml(**placeholders: str) -> str:
    """Qwen's template: parts in the order given, a default system turn. `placeholders`: kind of part -> its text."""
    branches = "".join(
        f"{{% elif part['type'] == '{kind}' %}}{placeholder}" for kind, placeholder in placeholders.items()
    )
    return (
        "{% set number = namespace(audio=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}" + branches + "{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


# As in LLaVA 1.5: all pictures come first
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# The prompt for generation, 'assistant\n', is not a prefix of the finished turn, 'assistant \n': so in the original
_LLAVA_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CHATML_TOKENS = {"pad_token": "<|endoftext|>", "im_start": "<|im_start|>", "eos_token": "<|im_end|>"}
_AUDIO_TOKENS = {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>", "audio_token": "<|AUDIO|>"}
_QWEN_VL_TOKENS = _CHATML_TOKENS | {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_QWEN_VL_TEMPLATE = _chatml(
    image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>"
)

_FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_omni": TinyFamily(
        media=("image", "video", "audio"),
        special_tokens=_CHATML_TOKENS
        | {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
        | {"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>"}
        | _AUDIO_TOKENS,
        chat_template=_chatml(
            image="<|vision_bos|><|IMAGE|><|vision_eos|>",
            video="<|vision_bos|><|VIDEO|><|vision_eos|>",
            audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
        model_class=hf.Qwen2_5OmniThinkerForConditionalGeneration,
        config=_qwen2_5_omni_config,
        processor_class=hf.Qwen2_5OmniProcessor,
        components=lambda: _qwen_vision_components() | _audio_components(),
    ),
    "qwen2_5_vl": TinyFamily(
        media=("image", "video"),
        special_tokens=_QWEN_VL_TOKENS,
        chat_template=_QWEN_VL_TEMPLATE,
        model_class=hf.Qwen2_5_VLForConditionalGeneration,
        config=partial(_qwen_vl_config, _QWEN2_5_VISION),
        processor_class=hf.Qwen2_5_VLProcessor,
        components=_qwen_vision_components,
    ),
    "qwen2_vl": TinyFamily(
        media=("image", "video"),
        special_tokens=_QWEN_VL_TOKENS,
        chat_template=_QWEN_VL_TEMPLATE,
        model_class=hf.Qwen2VLForConditionalGeneration,
        config=partial(_qwen_vl_config, _QWEN2_VISION),
        processor_class=hf.Qwen2VLProcessor,
        components=_qwen_vision_components,
    ),
    "llava": TinyFamily(
        media=("image",),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"},
        chat_template=_LLAVA_TEMPLATE,
        model_class=hf.LlavaForConditionalGeneration,
        config=_llava_config,
        processor_class=hf.LlavaProcessor,
        components=_llava_components,
    ),
    "llava_onevision": TinyFamily(
        media=("image", "video"),
        special_tokens=_CHATML_TOKENS | {"image_token": "<image>", "video_token": "<video>"},
        chat_template=_LLAVA_ONEVISION_TEMPLATE,
        model_class=hf.LlavaOnevisionForConditionalGeneration,
        config=_llava_onevision_config,
        processor_class=hf.LlavaOnevisionProcessor,
        components=_llava_onevision_components,
    ),
    "qwen2_audio": TinyFamily(
        media=("audio",),
        special_tokens=_CHATML_TOKENS | _AUDIO_TOKENS,
        chat_template=_chatml(
            audio="{% set number.audio = number.audio + 1 %}"
            "Audio {{ number.audio }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
        ),
        model_class=hf.Qwen2AudioForConditionalGeneration,
        config=_qwen2_audio_config,
        processor_class=hf.Qwen2AudioProcessor,
        components=_audio_components,
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def tiny_media(family: str) -> tuple[str, ...]:
    """What a family takes besides text, of `image`, `video` and `audio`."""
    return _FAMILIES[family].media


def tiny_model(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model of a family: float32, in eval mode, the same for the same seed."""
    settings = _FAMILIES[family]
    model = settings.model_class(settings.model_class.config_class(**settings.config(settings.token_ids))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * values if is_norm_weight else 0.15 * values)
    return model


def talking_model(family: str) -> hf.PreTrainedModel:
    """`tiny_model` whose generation config makes it write words of the letters a to h without end."""
    model = tiny_model(family)
    letters = {index for index, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) if c in "abcdefgh\u0120"}
    others = [token for token in range(VOCAB_SIZE) if token not in letters]
    model.generation_config.update(suppress_tokens=others, no_repeat_ngram_size=4, eos_token_id=VOCAB_SIZE)
    return model


def _tokenizer(settings: TinyFamily) -> hf.PreTrainedTokenizerFast:
    """One token per byte, plus the special tokens; a `bos_token` is put before every text."""
    tokens, ids = settings.special_tokens, settings.token_ids
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens.values()])
    if "bos_token" in tokens:
        bos = tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids["bos_token"])])
    common = {name: tokens[name] for name in ("bos_token", "eos_token", "pad_token") if name in tokens}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={k: v for k, v in tokens.items() if k.endswith("_token") and k not in common},
        padding_side="left",
        model_max_length=1024,
        chat_template=settings.chat_template,
        **common,
    )


def tiny_processor(family: str) -> hf.ProcessorMixin:
    """The family's processor: byte tokenizer, chat template, left padding, pictures of at most 56 pixels."""
    settings = _FAMILIES[family]
    return settings.processor_class(
        tokenizer=_tokenizer(settings), chat_template=settings.chat_template, **settings.components()
    )


_COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
_SENTENCES = ("The bridge was closed at night.", "Seven boats left the harbour.", "She counts in whole numbers.")


def _write_image(path: Path, colour: str, random: np.random.Generator) -> str:
    """A coloured square on noise; the sides are 28 to 56 pixels."""
    height, width = random.choice([28, 42, 56], size=2)
    pixels = random.integers(0, 120, size=(height, width, 3), dtype=np.uint8)
    pixels[8:22, 8:22] = _COLOURS[colour]
    Image.fromarray(pixels).save(path)
    return str(path.resolve())


def _write_audio(path: Path, semitone: int, random: np.random.Generator) -> str:
    """A noisy tone of 0.3 to 0.9 seconds."""
    time = np.arange(int(random.uniform(0.3, 0.9) * SAMPLING_RATE)) / SAMPLING_RATE
    signal = 0.5 * np.sin(2 * np.pi * 220 * 2 ** (semitone / 12) * time) + 0.05 * random.standard_normal(time.size)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((signal.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return str(path.resolve())


_TASKS = {("image", "audio"): "spoken-question", ("image",): "picture", ("audio",): "speech"}


def tiny_samples(family: str, folder: Path, count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with all that the family takes from a file (so no video), in the toolkit's data format.

    Args:
        family: one of `FAMILIES`.
        folder: where the PNG and WAV files go; created if missing.
        count: number of samples; 4 are enough to see every mix.
        seed: for the content.

    Returns:
        `{"id", "task", "image"?, "audio"?, "prompt", "answer"}` or `{"id", "task": "text", "text"}`, with absolute
        paths.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(kind for kind in tiny_media(family) if kind != "video")
    mixes = (files, (), *((kind,) for kind in files if len(files) > 1))  # all media, none, each alone
    samples: list[dict[str, Any]] = []
    for number, media in enumerate(islice(cycle(mixes), count)):
        if not media:
            samples.append({"id": f"text-{number:04d}", "task": "text", "text": str(random.choice(_SENTENCES))})
            continue
        colour, semitone = str(random.choice(list(_COLOURS))), int(random.integers(0, 24))
        name = f"{_TASKS[media]}-{number:04d}"
        sample = {"id": name, "task": _TASKS[media], "prompt": "What is it?", "answer": f"{colour} {semitone}"}
        if "image" in media:
            sample["image"] = _write_image(folder / f"{name}.png", colour, random)
        if "audio" in media:
            sample["audio"] = _write_audio(folder / f"{name}.wav", semitone, random)
        samples.append(sample)
    return samples
