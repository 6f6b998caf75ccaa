# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from ..modality import Modality
from .family import EXPERT_GROUPS, GEMMA_GROUPS, LinearGroup, ModelFamily

VISION, AUDIO = Modality.VISION, Modality.AUDIO
QKV, _, GATE_UP, DOWN = GEMMA_GROUPS
EXPERT_GATE_UP, EXPERT_DOWN = EXPERT_GROUPS

FAMILY = ModelFamily(
    model_types=("gemma4",),
    title="Gemma 4",
    modality_tokens={VISION: ("image_token_id", "video_token_id"), AUDIO: ("audio_token_id",)},
    encoders={"vision_tower": VISION, "embed_vision": VISION, "audio_tower": AUDIO, "embed_audio": AUDIO},
    others=("vision_tower.patch_embedder",),  # linears of pixels, as convolutions are elsewhere
    example="google/gemma-4-e2b-it",
    groups=(
        replace(QKV, optional=("self_attn.k_proj", "self_attn.v_proj")),  # keys and values may be another block's
        LinearGroup("o", ("self_attn.o_proj",), "", "none", folds_text=False),  # behind a norm of the values
        GATE_UP,
        DOWN,
    ),
    experts="experts",
    expert_groups=(
        replace(
            EXPERT_GATE_UP,
            linears=("experts.{}.gate_proj", "experts.{}.up_proj"),
            fold_into="pre_feedforward_layernorm_2",
            readers=(),
        ),
        replace(EXPERT_DOWN, linears=("experts.{}.down_proj",), fold_into="experts.{}.up_proj", writes_residual=False),
    ),
    kept=("per_layer_input_gate", "per_layer_projection", "router.proj"),
    unrotated="norms with a weight per channel stand between attention or MLP and the stream",
    last_tokens=True,
)
