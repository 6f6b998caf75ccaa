# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from .qwen2_5_omni import FAMILY as THINKER

FAMILY = replace(
    THINKER,
    model_types=("qwen2_5_omni",),
    title="Qwen2.5-Omni",
    core="thinker",
    others=("talker", "token2wav"),
    side_file=("load_speakers", "spk_dict.pt"),
)
