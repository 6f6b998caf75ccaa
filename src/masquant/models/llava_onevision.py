# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("llava_onevision",),
    title="LLaVA-OneVision",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id")},
    encoders={"vision_tower": Modality.VISION, "multi_modal_projector": Modality.VISION},
    example="llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
)
