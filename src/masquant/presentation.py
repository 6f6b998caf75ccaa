# SPDX-License-Identifier: Apache-2.0
"""Descriptions, estimates and activation ranges as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .contents import ranges_of
from .description import Description
from .estimate import Estimate
from .evaluation import human_bytes


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def show_description(found: Description) -> None:
    """What is quantized how, what is not and why, bytes before and after."""
    method = f", {found.method}" if found.method else ""
    table = Table(title=f"{found.family}: {found.blocks} blocks, {found.scheme}{method}")
    for column in ("group", "blocks", "bits", "inputs", "size", "ranks of patches", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    details: dict[str, None] = {}
    for row in found.groups:
        many = "" if row.groups == len(row.blocks) else f" ({row.groups} groups)"
        patches = ", ".join(f"{name} {rank}" for name, rank in row.patches.items())
        bits = str(row.weight_bits), str(row.activation_bits), str(row.group_size)
        table.add_row(
            row.group,
            ranges_of(row.blocks) + many,
            *bits,
            patches or "none",
            human_bytes(row.before),
            human_bytes(row.after),
        )
        outs = ", ".join(map(str, row.out_features))
        details[
            f"{row.group}: {', '.join(row.linears)} ({row.in_features} -> {outs}); text's vector: {row.text_vector}; "
            f"vectors of other modalities: {row.own_vectors}; rotated: {', '.join(row.rotated) or 'nothing'}"
        ] = None
    console = Console()
    console.print(table)
    for line in details:
        console.print(line, highlight=False, markup=False)
    console.print(f"patches: {found.patches}", highlight=False)
    for modality, encoder in found.encoders.items():
        console.print(f"{modality} encoder: linears in {encoder}", highlight=False)
    parts = Table("part", "before", "after", title="bytes of weights")
    for name, sizes in found.bytes.items():
        if sizes["before"] or sizes["after"]:
            parts.add_row(name, human_bytes(sizes["before"]), human_bytes(sizes["after"]))
    totals = [sum(sizes[when] for sizes in found.bytes.values()) for when in ("before", "after")]
    parts.add_row("all", *map(human_bytes, totals))
    console.print(parts)
    console.print("in floating point:", highlight=False)
    for entry in found.skipped:
        console.print(f"  {entry.name} ({human_bytes(entry.bytes)}): {entry.reason}", highlight=False, markup=False)
    if found.memory:
        ratio = found.memory["packed_in_memory"] / found.memory["packed_on_disk"]
        console.print(
            f"quantized linears: {human_bytes(found.memory['packed_on_disk'])} on disk, "
            f"{human_bytes(found.memory['packed_in_memory'])} in memory ({ratio:.3f} x), of which vectors "
            f"{human_bytes(found.memory['smooth_scale'])}, patches {human_bytes(found.memory['compensation'])}",
            highlight=False,
        )
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def show_estimate(estimate: Estimate) -> None:
    """Time, memory and disk that a run will take."""
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in estimate.stages.items() if seconds >= 0.05)
    typer.echo(
        f"quantizing will take about {duration(estimate.seconds)} ({stages}), {human_bytes(estimate.peak_memory)} of "
        f"memory and {human_bytes(estimate.disk)} of disk, and leave {human_bytes(estimate.output)} of weights; tried "
        f"on {estimate.share:.0%} of the samples' tokens and {estimate.blocks} blocks"
    )


def show_ranges(rows: Sequence[Mapping[str, Any]]) -> None:
    """Largest magnitudes of `inspection.activation_ranges`."""
    modalities = list(rows[0]["absmax"])
    table = Table(title="activation range per modality: largest magnitude, and misalignment with text (dB)")
    table.add_column("block.group")
    for name in modalities:
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for name in modalities:
            loss = row["misalignment_db"].get(name)
            absmax = row["absmax"][name]
            cells.append("-" if absmax is None else f"{absmax:.2f}" + (f" ({loss:.1f})" if loss is not None else ""))
        table.add_row(f"{row['block']}.{row['group']}", *cells)
    Console().print(table)
