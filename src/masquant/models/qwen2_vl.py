# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("qwen2_vl",),
    title="Qwen2-VL",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id")},
    encoders={"visual": Modality.VISION},
    example="Qwen/Qwen2-VL-2B-Instruct",
)
