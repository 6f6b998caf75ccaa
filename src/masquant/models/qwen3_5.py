# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from ..modality import Modality
from .family import LLAMA_GROUPS, LinearGroup, ModelFamily

QKV, OUT, GATE_UP, DOWN = LLAMA_GROUPS
_LINEAR_QKV = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
_LINEAR_OUT = ("linear_attn.out_proj",)

FAMILY = ModelFamily(
    model_types=("qwen3_5",),
    title="Qwen3.5",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id")},
    encoders={"visual": Modality.VISION},
    example="Qwen/Qwen3.5-4B",
    groups=(
        replace(QKV, optional=QKV.linears),
        replace(OUT, optional=OUT.linears, rotates_heads=False),  # a gate per channel follows the attention
        LinearGroup(
            "linear.qkv",
            _LINEAR_QKV,
            "input_layernorm",
            "norm",
            readers=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
            optional=_LINEAR_QKV,
        ),
        LinearGroup("linear.o", _LINEAR_OUT, "", "none", folds_text=False, writes_residual=True, optional=_LINEAR_OUT),
        GATE_UP,
        DOWN,
    ),
    norm_offset=1.0,
)
