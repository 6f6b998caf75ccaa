# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("mistral3",),
    title="Mistral 3 (vision)",
    modality_tokens={Modality.VISION: ("image_token_id",)},
    encoders={"vision_tower": Modality.VISION, "multi_modal_projector": Modality.VISION},
    example="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
)
