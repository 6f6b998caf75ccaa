# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("qwen2_5_omni_thinker",),
    title="Qwen2.5-Omni (thinker)",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id"), Modality.AUDIO: ("audio_token_id",)},
    encoders={"visual": Modality.VISION, "audio_tower": Modality.AUDIO},
    example="Qwen/Qwen2.5-Omni-3B",
)
