# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from ..modality import Modality
from .qwen3_5 import FAMILY as QWEN3_5

FAMILY = replace(
    QWEN3_5,
    model_types=("minicpmv4_6",),
    title="MiniCPM-V 4.6",
    encoders={"vision_tower": Modality.VISION, "merger": Modality.VISION},
    example="openbmb/MiniCPM-V-4.6",
    remark="videos need do_sample_frames switched off in its video processor",
)
