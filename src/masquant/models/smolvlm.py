# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("smolvlm", "idefics3"),
    title="SmolVLM, Idefics3",
    modality_tokens={Modality.VISION: ("image_token_id",)},
    encoders={"vision_model": Modality.VISION, "connector": Modality.VISION},
    example="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
)
