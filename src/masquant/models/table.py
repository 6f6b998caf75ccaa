# SPDX-License-Identifier: Apache-2.0
"""The families as a table, for the documentation and the command line, from the same data that quantizes them."""

from __future__ import annotations

from typing import Any

from . import FAMILIES
from .family import ModelFamily


def limits_of(family: ModelFamily) -> list[str]:
    """What a family's models cannot have exactly and so do not get, and what else to know."""
    every = [(group, "") for group in family.groups] + [(group, " of experts") for group in family.expert_groups]
    unfolded = [f"{group.name.removeprefix('experts.{}.')}{whose}" for group, whose in every if not group.folds_text]
    found = [f"residual stream not rotated: {family.unrotated}"] if family.unrotated else []
    if unfolded:
        found.append(f"text is not smoothed before {', '.join(unfolded)}")
    if not any(group.fold_kind == "heads" and group.rotates_heads for group in family.groups):
        found.append("values not rotated")
    return [*found, family.remark] if family.remark else found


def family_rows() -> list[dict[str, Any]]:
    """One mapping a family: `title`, `model_types`, `modalities`, `example`, `experts`, `encoders` (with the
    modality of each), `others` (never quantized), `limits`."""
    return [
        {
            "title": family.title,
            "model_types": list(family.model_types),
            "modalities": [m.value for m in family.modalities],
            "example": family.example,
            "experts": bool(family.experts),
            "encoders": {name: modality.value for name, modality in family.encoders.items()},
            "others": list(family.others),
            "limits": limits_of(family),
        }
        for family in FAMILIES
    ]


def family_table() -> str:
    """Markdown table of all families."""
    lines = ["| family | `model_type` | besides text | for example | limits |", "|---|---|---|---|---|"]
    for row in family_rows():
        types = ", ".join(f"`{name}`" for name in row["model_types"])
        others = ", ".join(row["modalities"][1:])
        lines.append(f"| {row['title']} | {types} | {others} | {row['example']} | {'; '.join(row['limits'])} |")
    return "\n".join(lines)
