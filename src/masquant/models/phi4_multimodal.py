# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import LinearGroup, ModelFamily

FAMILY = ModelFamily(
    model_types=("phi4_multimodal",),
    title="Phi-4-multimodal",
    modality_tokens={
        Modality.VISION: ("vision_config.image_token_id",),
        Modality.AUDIO: ("audio_config.audio_token_id",),
    },
    encoders={"embed_tokens_extend.image_embed": Modality.VISION, "embed_tokens_extend.audio_embed": Modality.AUDIO},
    example="microsoft/Phi-4-multimodal-instruct",
    groups=(
        LinearGroup("qkv", ("self_attn.qkv_proj",), "input_layernorm", "norm"),
        LinearGroup("o", ("self_attn.o_proj",), "self_attn.qkv_proj", "heads", writes_residual=True, fused=True),
        LinearGroup("gate_up", ("mlp.gate_up_proj",), "post_attention_layernorm", "norm"),
        LinearGroup("down", ("mlp.down_proj",), "mlp.gate_up_proj", "rows", writes_residual=True, fused=True),
    ),
    mixes_media=False,
    remark="its vision and speech adapters (LoRA) are not loaded by from_pretrained; merge one before quantizing",
)
