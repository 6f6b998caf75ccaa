# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import EXPERT_GROUPS, ModelFamily

FAMILY = ModelFamily(
    model_types=("qwen3_omni_moe_thinker",),
    title="Qwen3-Omni (thinker, experts)",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id"), Modality.AUDIO: ("audio_token_id",)},
    encoders={"visual": Modality.VISION, "audio_tower": Modality.AUDIO},
    example="Qwen/Qwen3-Omni-30B-A3B-Instruct",
    experts="mlp.experts",
    expert_groups=EXPERT_GROUPS,
    stream_inputs=("deepstack_visual_embeds",),
)
