# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from .family import EXPERT_GROUPS
from .qwen3_vl import FAMILY as DENSE

FAMILY = replace(
    DENSE,
    model_types=("qwen3_vl_moe",),
    title="Qwen3-VL (experts)",
    example="Qwen/Qwen3-VL-30B-A3B-Instruct",
    experts="mlp.experts",
    expert_groups=EXPERT_GROUPS,
)
