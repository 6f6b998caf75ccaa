# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("qwen2_5_vl",),
    title="Qwen2.5-VL",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id")},
    encoders={"visual": Modality.VISION},
    example="Qwen/Qwen2.5-VL-3B-Instruct",
)
