# SPDX-License-Identifier: Apache-2.0
"""The tiny models' configurations, processors and chat templates, one entry a family; see `tiny_models`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

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
        norm_offset: what the decoder's norms add to their weight.
        write_files: writes the files that the family's folders have besides; none for most.
    """

    media: tuple[str, ...]
    special_tokens: Mapping[str, str]
    chat_template: str
    model_class: type[hf.PreTrainedModel]
    config: Callable[[TokenIds], dict[str, Any]]
    processor_class: type[hf.ProcessorMixin]
    components: Callable[[], dict[str, Any]]
    norm_offset: float = 0.0
    write_files: Callable[[Path], None] = lambda folder: None

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


_QWEN3_VISION = _QWEN_VISION | _WIDTHS | {"out_hidden_size": 64, "num_position_embeddings": 64}
_QWEN3_VISION |= {"deepstack_visual_indexes": [0]}


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def _qwen3_vl_moe_config(ids: TokenIds) -> dict[str, Any]:
    text = _text_config(ids, rope_parameters=dict(_MROPE), mlp_only_layers=[0], **_EXPERTS)  # one dense block
    return _qwen_vl_config(_QWEN3_VISION, ids) | {"text_config": text}


def _qwen3_omni_moe_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, rope_parameters=dict(_MROPE), **_EXPERTS),
        "vision_config": dict(_QWEN3_VISION),
        "audio_config": _AUDIO | {"output_dim": 64, "downsample_hidden_size": 8},
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "audio_token_id": ids["audio_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "user_token_id": ids["im_start"],
    }


def _qwen3_omni_moe_full_config(ids: TokenIds) -> dict[str, Any]:
    sizes = _WIDTHS | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = sizes | {"vocab_size": 1024 + 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text |= {"shared_expert_intermediate_size": 16, "rope_parameters": dict(_MROPE)}
    codec = {"codec_eos_token_id": 1050, "codec_nothink_id": 1051, "codec_think_bos_id": 1052}
    talker = codec | {"codec_think_eos_id": 1053, "codec_pad_id": 1054, "codec_bos_id": 1055, "num_code_groups": 2}
    talker |= {"text_config": text, "accept_hidden_layer": 1, "speaker_id": {"chelsie": 1049}}
    talker |= {"spatial_merge_size": 2, "thinker_hidden_size": 64}
    talker |= {"code_predictor_config": sizes | {"vocab_size": 32, "head_dim": 16, "num_code_groups": 2}}
    talker |= {f"{kind}_token_id": ids[f"{kind}_token"] for kind in ("image", "video", "audio")}
    wave = _WIDTHS | {"codebook_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    wave |= {"num_quantizers": 2, "upsample_rates": [2, 2], "upsampling_ratios": [2], "decoder_dim": 64}
    return {
        "thinker_config": _qwen3_omni_moe_config(ids),
        "talker_config": talker,
        "code2wav_config": wave | {"head_dim": 16},
        "im_start_token_id": ids["im_start"],
        "im_end_token_id": ids["eos_token"],
        "tts_pad_token_id": 280,
        "tts_bos_token_id": 281,
        "tts_eos_token_id": 282,
        "system_token_id": 82,  # the bytes s, u and a, with which the roles begin
        "user_token_id": 84,
        "assistant_token_id": 64,
    }


_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
_HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_HYBRID |= {"linear_value_head_dim": 16}


def _qwen3_5_config(ids: TokenIds) -> dict[str, Any]:
    vision = {key: value for key, value in _QWEN3_VISION.items() if key != "deepstack_visual_indexes"}
    text = _text_config(ids, rope_parameters=_MROPE | {"partial_rotary_factor": 1.0}, **_HYBRID)
    return _qwen_vl_config(vision, ids) | {"text_config": text}


def _minicpmv_config(ids: TokenIds) -> dict[str, Any]:
    text = _text_config(ids, rope_parameters=_MROPE | {"partial_rotary_factor": 1.0}, **_HYBRID)
    return {
        "text_config": text | {"model_type": "qwen3_5_text"},
        "vision_config": dict(_TOWER),
        "insert_layer_id": 0,
        "image_size": 2 * _SIDE,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "tie_word_embeddings": False,
    }


def _qwen2_5_omni_full_config(ids: TokenIds) -> dict[str, Any]:
    talker = {"vocab_size": 40, "embedding_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    talker |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    talker |= {"rope_parameters": dict(_MROPE), "image_token_index": ids["image_token"]}
    talker |= {"video_token_index": ids["video_token"], "audio_token_index": ids["audio_token"]}
    talker |= {"tts_text_start_token_id": 280, "tts_text_end_token_id": 281, "tts_text_pad_token_id": 282}
    codec = {"tts_codec_start_token_id": 33, "tts_codec_end_token_id": 34, "tts_codec_pad_token_id": 32}
    encoder = {"enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 8}
    encoder |= {"enc_se_channels": 8, "mel_dim": 16, "num_embeds": 40, "emb_dim": 16, "head_dim": 16}
    dit = encoder | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "look_ahead_layers": [1]}
    vocoder = {
        "mel_dim": 16,
        "upsample_initial_channel": 64,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
    }
    return {
        "thinker_config": _qwen2_5_omni_config(ids),
        "talker_config": talker | codec | {"tts_codec_mask_token_id": 35},
        "token2wav_config": {"dit_config": dit | {"look_backward_layers": [0]}, "bigvgan_config": vocoder},
    }


def _write_speaker(folder: Path) -> None:
    voice = {"bos_token": 270, "cond": torch.ones(1, 8), "ref_mel": torch.ones(1, 24, 16)}
    torch.save({"Chelsie": voice}, folder / "spk_dict.pt")


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


def _gemma3_config(ids: TokenIds) -> dict[str, Any]:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 32}
    return {
        "text_config": _text_config(ids, **layers),
        "vision_config": _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": ids["image_token"],
        "boi_token_index": ids["boi_token"],
        "eoi_token_index": ids["eoi_token"],
        "tie_word_embeddings": False,
    }


def _gemma4_config(ids: TokenIds, **changes: Any) -> dict[str, Any]:
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    layers |= {"head_dim": 16, "global_head_dim": 32, "vocab_size_per_layer_input": VOCAB_SIZE}
    layers |= {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    vision = _WIDTHS | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision |= {"pooling_kernel_size": 2, "patch_size": PATCH, "position_embedding_size": 64}
    audio = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 32}
    return {
        "text_config": _text_config(ids, **(layers | changes)),
        "vision_config": vision,
        "audio_config": audio | {"subsampling_conv_channels": [128, 4]},
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video"],
        "audio_token_id": ids["audio_token"],
        "boi_token_id": ids["boi_token"],
        "eoi_token_id": ids["eoi_token"],
        "boa_token_id": ids["boa_token"],
        "eoa_token_index": ids["eoa_token"],
        "tie_word_embeddings": False,
    }


def _gemma4_moe_config(ids: TokenIds) -> dict[str, Any]:
    """As the 26B: experts beside the dense MLP, full attention without values of its own, no inputs per layer."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "attention_k_eq_v": True}
    layers |= {"num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    return _gemma4_config(ids, **layers, **experts, use_double_wide_mlp=False)


def _smolvlm_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, model_type="llama"),
        "vision_config": dict(_TOWER),
        "image_token_id": ids["image_token"],
        "scale_factor": 2,
    }


def _internvl_config(ids: TokenIds) -> dict[str, Any]:
    sizes = {"image_size": [_SIDE, _SIDE], "patch_size": [PATCH, PATCH]}
    return {
        "text_config": _text_config(ids, model_type="qwen2"),
        "vision_config": _TOWER | sizes,
        "image_token_id": ids["context_image_token"],
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }


def _mistral3_config(ids: TokenIds) -> dict[str, Any]:
    return {
        "text_config": _text_config(ids, model_type="mistral", head_dim=32),
        "vision_config": _TOWER | {"model_type": "pixtral", "image_size": 2 * _SIDE},
        "image_token_index": ids["image_token"],
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _phi4_config(ids: TokenIds) -> dict[str, Any]:
    audio = {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2, "input_size": 80}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16}
    vision = _TOWER | {"image_size": 448, "patch_size": 14, "crop_size": 448, "image_token_id": ids["image_token"]}
    return _text_config(ids, max_position_embeddings=4096) | {
        "vision_config": vision,
        "audio_config": audio | {"audio_token_id": ids["audio_token"], "bias_max_distance": 50},
    }


def _phi4_components() -> dict[str, Any]:
    return {
        "image_processor": hf.Phi4MultimodalImageProcessor(dynamic_hd=1),
        "audio_processor": hf.Phi4MultimodalFeatureExtractor(),
    }


def _gemma3_components() -> dict[str, Any]:
    size = {"height": _SIDE, "width": _SIDE}
    return {"image_processor": hf.Gemma3ImageProcessor(size=size, do_convert_rgb=True), "image_seq_length": 4}


def _gemma4_components() -> dict[str, Any]:
    patches = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return {
        "feature_extractor": hf.Gemma4AudioFeatureExtractor(),
        "image_processor": hf.Gemma4ImageProcessor(**patches),
        "video_processor": hf.Gemma4VideoProcessor(num_frames=2, **patches),
    }


def _smolvlm_components() -> dict[str, Any]:
    size, tile = {"longest_edge": 2 * _SIDE}, {"longest_edge": _SIDE}
    return {
        "image_processor": hf.SmolVLMImageProcessor(size=size, max_image_size=tile),
        "video_processor": hf.SmolVLMVideoProcessor(size=tile, max_image_size=tile, fps=1, num_frames=2),
        "image_seq_len": 4,
    }


def _internvl_components() -> dict[str, Any]:
    size = {"height": _SIDE, "width": _SIDE}
    return {
        "image_processor": hf.GotOcr2ImageProcessor(size=size, max_patches=2),
        "video_processor": hf.InternVLVideoProcessor(size=size),
        "image_seq_length": 4,
    }


def _mistral3_components() -> dict[str, Any]:
    sizes = {"size": {"longest_edge": 2 * _SIDE}, "patch_size": PATCH}
    return {"image_processor": hf.PixtralImageProcessor(**sizes), "patch_size": PATCH, "spatial_merge_size": 2}


def _qwen_vision_components() -> dict[str, Any]:
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return {
        "image_processor": hf.Qwen2VLImageProcessor(size=size, **patches),
        "video_processor": hf.Qwen2VLVideoProcessor(size=dict(VIDEO_SIZE), cap_pixels_per_frame=False, **patches),
    }


def _qwen3_vl_components() -> dict[str, Any]:
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    video = hf.Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False, min_frames=2, **patches)
    return _qwen_vision_components() | {"video_processor": video}


def _minicpmv_components() -> dict[str, Any]:
    sizes = {"scale_resolution": 2 * _SIDE, "patch_size": PATCH, "max_slice_nums": 1}
    return {
        "image_processor": hf.MiniCPMV4_6ImageProcessor(**sizes),
        "video_processor": hf.MiniCPMV4_6VideoProcessor(do_sample_frames=False, **sizes),
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

_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'].replace('assistant', 'model') + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + message['role'].replace('assistant', 'model') + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] in ('image', 'audio', 'video') %}"
    "{{ '<|' + part['type'] + '|>' }}{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)

_SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'audio' %}<|audio|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% else %}{{ message['content'][0]['text'] + eos_token }}"
    "{% endif %}{% endfor %}"
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

_QWEN2_5_OMNI = TinyFamily(
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
)

_GEMMA4 = TinyFamily(
    media=("image", "video", "audio"),
    special_tokens={"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    | {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "video": "<|video|>"}
    | {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    | {"turn_start": "<|turn>", "turn_end": "<turn|>"},
    chat_template=_GEMMA4_TEMPLATE,
    model_class=hf.Gemma4ForConditionalGeneration,
    config=_gemma4_config,
    processor_class=hf.Gemma4Processor,
    components=_gemma4_components,
)

_QWEN3_OMNI = replace(
    _QWEN2_5_OMNI,
    model_class=hf.Qwen3OmniMoeThinkerForConditionalGeneration,
    config=_qwen3_omni_moe_config,
    processor_class=hf.Qwen3OmniMoeProcessor,
)

TINY_FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_omni_full": replace(
        _QWEN2_5_OMNI,
        model_class=hf.Qwen2_5OmniForConditionalGeneration,
        config=_qwen2_5_omni_full_config,
        write_files=_write_speaker,
    ),
    "qwen2_5_omni": _QWEN2_5_OMNI,
    "qwen3_vl": TinyFamily(
        media=("image", "video"),
        special_tokens=_QWEN_VL_TOKENS,
        chat_template=_QWEN_VL_TEMPLATE,
        model_class=hf.Qwen3VLForConditionalGeneration,
        config=partial(_qwen_vl_config, _QWEN3_VISION),
        processor_class=hf.Qwen3VLProcessor,
        components=_qwen3_vl_components,
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
    "gemma3": TinyFamily(
        media=("image",),
        special_tokens={"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        | {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        | {"start_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"},
        chat_template=_GEMMA_TEMPLATE,
        model_class=hf.Gemma3ForConditionalGeneration,
        config=_gemma3_config,
        processor_class=hf.Gemma3Processor,
        components=_gemma3_components,
        norm_offset=1.0,
    ),
    "gemma4": _GEMMA4,
    "gemma4_moe": replace(_GEMMA4, config=_gemma4_moe_config),
    "smolvlm": TinyFamily(
        media=("image", "video"),
        special_tokens={"pad_token": "<pad>", "im_start": "<|im_start|>", "eos_token": "<end_of_utterance>"}
        | {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
        | {"global_image_token": "<global-img>", "video_token": "<video>"},
        chat_template=_SMOLVLM_TEMPLATE,
        model_class=hf.SmolVLMForConditionalGeneration,
        config=_smolvlm_config,
        processor_class=hf.SmolVLMProcessor,
        components=_smolvlm_components,
    ),
    "internvl": TinyFamily(
        media=("image", "video"),
        special_tokens=_CHATML_TOKENS
        | {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        | {"video_token": "<video>"},
        chat_template=_chatml(image="<IMG_CONTEXT>\n", video="<video>\n"),
        model_class=hf.InternVLForConditionalGeneration,
        config=_internvl_config,
        processor_class=hf.InternVLProcessor,
        components=_internvl_components,
    ),
    "mistral3": TinyFamily(
        media=("image",),
        special_tokens={"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "inst": "[INST]"}
        | {"end_inst": "[/INST]", "image_token": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"},
        chat_template=_MISTRAL_TEMPLATE,
        model_class=hf.Mistral3ForConditionalGeneration,
        config=_mistral3_config,
        processor_class=hf.PixtralProcessor,
        components=_mistral3_components,
    ),
    "phi4_multimodal": TinyFamily(
        media=("image", "audio"),
        special_tokens={"pad_token": "<|endoftext|>", "user": "<|user|>", "assistant": "<|assistant|>"}
        | {"eos_token": "<|end|>", "image_token": "<|image|>", "audio_token": "<|audio|>"},
        chat_template=_PHI4_TEMPLATE,
        model_class=hf.Phi4MultimodalForCausalLM,
        config=_phi4_config,
        processor_class=hf.Phi4MultimodalProcessor,
        components=_phi4_components,
    ),
    "qwen3_vl_moe": TinyFamily(
        media=("image", "video"),
        special_tokens=_QWEN_VL_TOKENS,
        chat_template=_QWEN_VL_TEMPLATE,
        model_class=hf.Qwen3VLMoeForConditionalGeneration,
        config=_qwen3_vl_moe_config,
        processor_class=hf.Qwen3VLProcessor,
        components=_qwen3_vl_components,
    ),
    "qwen3_omni_moe": _QWEN3_OMNI,
    "qwen3_omni_moe_full": replace(
        _QWEN3_OMNI,
        model_class=hf.Qwen3OmniMoeForConditionalGeneration,
        config=_qwen3_omni_moe_full_config,
    ),
    "qwen3_5": TinyFamily(
        media=("image", "video"),
        special_tokens=_QWEN_VL_TOKENS,
        chat_template=_QWEN_VL_TEMPLATE,
        model_class=hf.Qwen3_5ForConditionalGeneration,
        config=_qwen3_5_config,
        processor_class=hf.Qwen3VLProcessor,
        components=_qwen3_vl_components,
        norm_offset=1.0,
    ),
    "minicpmv": TinyFamily(
        media=("image", "video"),
        special_tokens=_CHATML_TOKENS
        | {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        | {"image_start_token": "<image>", "image_end_token": "</image>"}
        | {"slice_start_token": "<slice>", "slice_end_token": "</slice>"}
        | {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
        chat_template=_chatml(image="<|image_pad|>", video="<|video_pad|>"),
        model_class=hf.MiniCPMV4_6ForConditionalGeneration,
        config=_minicpmv_config,
        processor_class=hf.MiniCPMV4_6Processor,
        components=_minicpmv_components,
        norm_offset=1.0,
    ),
}
