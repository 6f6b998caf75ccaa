# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("qwen3_vl",),
    title="Qwen3-VL",
    modality_tokens={Modality.VISION: ("image_token_id", "video_token_id")},
    encoders={"visual": Modality.VISION},
    example="Qwen/Qwen3-VL-4B-Instruct",
    stream_inputs=("deepstack_visual_embeds",),
)
