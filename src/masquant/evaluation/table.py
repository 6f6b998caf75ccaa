# SPDX-License-Identifier: Apache-2.0
"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from .results import Evaluation

_QUALITY = (("wer", "WER"), ("exact_match", "EM"), ("perplexity", "ppl"))


def human_bytes(size: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _loss(metrics: Mapping[str, float]) -> list[str]:
    """Change against the float model, or the likelihood itself, and its standard error."""
    name, sign = ("delta_nll", "+") if "delta_nll" in metrics else ("nll", "")
    error = metrics[f"{name}_stderr"]
    return [f"{metrics[name]:{sign}.3f}", "" if math.isnan(error) else f"±{error:.3f}"]


def _quality(metrics: Mapping[str, float]) -> str:
    for key, _ in _QUALITY:
        if key in metrics:
            return f"{metrics[key]:.1f}" if key == "perplexity" else f"{100 * metrics[key]:.0f} %"
    return ""


def _quality_name(results: Mapping[str, Evaluation], task: str) -> str:
    for result in results.values():
        for key, name in _QUALITY:
            if key in result.tasks.get(task, {}):
                return name
    return ""


def _rows(results: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Header and rows shared by both forms of the table."""
    tasks = list(dict.fromkeys(task for result in results.values() for task in result.tasks))
    has_cost = any(result.seconds is not None for result in results.values())
    names = {task: _quality_name(results, task) for task in tasks}
    header = ["method", *(f"{task}\n{names[task]}".rstrip() for task in tasks), "decoder"]
    rows = []
    for name, result in results.items():
        found = result.tasks
        cells = ["\n".join([*_loss(found[t]), _quality(found[t])]).rstrip() if t in found else "" for t in tasks]
        sizes = result.description.bytes
        packed = sizes.get("base", 0) + sizes.get("compensation", 0)
        row = [name, *cells, human_bytes(packed) if packed else ""]
        if has_cost:
            row.append("" if result.seconds is None else f"{result.seconds:.0f} s")
        rows.append(row)
    return [*header, *(["time"] if has_cost else [])], rows


def evaluation_table(results: Mapping[str, Evaluation], title: str | None = None) -> Table:
    """One row per model, one column per task: nll per answer token (float) or its change, and the task's metric."""
    header, rows = _rows(results)
    table = Table(
        title=title,
        caption="nll per answer token, quantized: its change ± paired standard error; below the task's own metric",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(header):
        table.add_column(column.replace("-", "-\n"), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, end_section=True)
    return table


def markdown_table(results: Mapping[str, Evaluation]) -> str:
    """The same as GitHub Markdown."""
    header, rows = _rows(results)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| "
        + " | ".join(", ".join(part for part in cell.split("\n") if part).replace(", ±", " ±") for cell in line)
        + " |"
        for line in lines
    )


def examples_table(results: Mapping[str, Evaluation], ids: Sequence[str]) -> Table:
    """Decoded answers side by side: one row per model, one column per sample."""
    table = Table(title="decoded answers", show_lines=True, box=box.SIMPLE_HEAD)
    table.add_column("")
    first = next(iter(results.values()))
    samples = {s.id: s for s in first.samples}
    for sample_id in ids:
        table.add_column(sample_id, overflow="fold", ratio=1)
    table.add_row("reference", *(samples[i].reference or "" for i in ids), style="bold")
    for name, result in results.items():
        found = {s.id: s.prediction or "" for s in result.samples}
        table.add_row(name, *(found[i] for i in ids))
    return table
