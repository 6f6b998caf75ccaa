# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("internvl",),
    title="InternVL",
    modality_tokens={Modality.VISION: ("image_token_id",)},
    encoders={"vision_tower": Modality.VISION, "multi_modal_projector": Modality.VISION},
    example="OpenGVLab/InternVL3-1B-hf",
)
