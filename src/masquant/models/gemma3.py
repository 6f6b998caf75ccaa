# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import GEMMA_GROUPS, ModelFamily

FAMILY = ModelFamily(
    model_types=("gemma3",),
    title="Gemma 3",
    modality_tokens={Modality.VISION: ("image_token_id",)},
    encoders={"vision_tower": Modality.VISION, "multi_modal_projector": Modality.VISION},
    example="google/gemma-3-4b-it",
    groups=GEMMA_GROUPS,
    norm_offset=1.0,
    unrotated="norms with a weight per channel stand between attention or MLP and the stream",
)
