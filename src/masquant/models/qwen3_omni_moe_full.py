# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from .qwen3_omni_moe import FAMILY as THINKER

FAMILY = replace(
    THINKER,
    model_types=("qwen3_omni_moe",),
    title="Qwen3-Omni (experts)",
    core="thinker",
    others=("talker", "code2wav"),
)
