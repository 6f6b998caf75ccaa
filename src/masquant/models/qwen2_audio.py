# SPDX-License-Identifier: Apache-2.0
from ..modality import Modality
from .family import ModelFamily

FAMILY = ModelFamily(
    model_types=("qwen2_audio",),
    title="Qwen2-Audio",
    modality_tokens={Modality.AUDIO: ("audio_token_id",)},
    encoders={"audio_tower": Modality.AUDIO, "multi_modal_projector": Modality.AUDIO},
    example="Qwen/Qwen2-Audio-7B-Instruct",
)
