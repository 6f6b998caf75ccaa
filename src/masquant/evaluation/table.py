# SPDX-License-Identifier: Apache-2.0
"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..errors import DataError
from .results import Evaluation

_CAPTION = "nll per answer token, quantized: its change ± paired standard error; below the task's own metric"
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


def _quality_name(found: Iterable[Mapping[str, Mapping[str, float]]], task: str) -> str:
    for tasks in found:
        for key, name in _QUALITY:
            if key in tasks.get(task, {}):
                return name
    return ""


def _cost_columns(results: Mapping[str, Evaluation]) -> list[tuple[str, list[str]]]:
    """Bytes of the packed linears and of the whole model; seconds and memory that quantizing took, where known."""
    packed, total, seconds, memory = [], [], [], []
    for result in results.values():
        sizes = result.description.bytes
        low_bit = sizes.get("base", 0) + sizes.get("compensation", 0)
        packed.append(human_bytes(low_bit) if low_bit else "")
        total.append(human_bytes(sum(sizes.values())) if any(sizes.values()) else "")
        seconds.append("" if result.seconds is None else f"{result.seconds:.0f} s")
        memory.append("" if result.peak_memory is None else human_bytes(result.peak_memory))
    columns = [("decoder", packed), ("model", total), ("time", seconds), ("process\npeak", memory)]
    return [(name, cells) for name, cells in columns if any(cells)]


def _columns(results: Mapping[str, Evaluation]) -> list[tuple[str, list[str]]]:
    """Header and cells of every column after the names; both forms of the table share them."""
    found = {name: result.tasks for name, result in results.items()}
    columns = []
    for task in dict.fromkeys(task for tasks in found.values() for task in tasks):
        cells = [
            "\n".join([*_loss(tasks[task]), _quality(tasks[task])]).rstrip() if task in tasks else ""
            for tasks in found.values()
        ]
        columns.append((f"{task}\n{_quality_name(found.values(), task)}".rstrip(), cells))
    return [*columns, *_cost_columns(results)]


@dataclass(frozen=True)
class EvaluationTable:
    """A table that rich prints, as several below each other where the terminal is too narrow for one."""

    names: Sequence[str]
    columns: Sequence[tuple[str, Sequence[str]]]
    title: str | None = None

    def _table(self, columns: Sequence[tuple[str, Sequence[str]]]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        tall = any("\n" in cell for _, cells in columns for cell in cells)  # rows of several lines are set apart
        table.add_column("method", no_wrap=True)
        for name, _ in columns:
            # long names of tasks are broken where they have a joint
            header = re.sub(r"(?<=[^\W_])([-_])(?=[^\W_])", r"\1\n", name) if len(name) > 12 else name
            table.add_column(Text(header), justify="right", no_wrap=True)
        for i, name in enumerate(self.names):
            table.add_row(Text(name), *(Text(cells[i]) for _, cells in columns), end_section=tall)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables, start = [], 0
        wide = options.update(width=10_000)
        while start < len(self.columns):
            end = start + 1
            while end < len(self.columns):
                width = Measurement.get(console, wide, self._table(self.columns[start : end + 1])).maximum
                if width > options.max_width:
                    break
                end += 1
            tables.append(self._table(self.columns[start:end]))
            start = end
        if tables:
            tables[0].title = None if self.title is None else Text(self.title, style="table.title")
        yield from tables
        yield Text(f" {_CAPTION}", style="table.caption")


def evaluation_table(results: Mapping[str, Evaluation], title: str | None = None) -> EvaluationTable:
    """One row per model, one column per task: nll per answer token (float) or its change, and the task's metric.

    Args:
        results: by name of the method, the float model first.
        title: printed above.

    Returns:
        What rich prints.
    """
    return EvaluationTable(list(results), _columns(results), title)


def markdown_table(results: Mapping[str, Evaluation]) -> str:
    """The same as GitHub Markdown."""

    def line(cells: Sequence[str]) -> str:
        joined = (", ".join(part for part in cell.split("\n") if part).replace(", ±", " ±") for cell in cells)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in joined) + " |"

    columns = [("method", list(results)), *_columns(results)]
    header, rows = [name for name, _ in columns], zip(*(cells for _, cells in columns), strict=True)
    return "\n".join(line(cells) for cells in (header, ["---"] * len(header), *rows))


def _plain(text: str | None) -> Text:
    """What a model said, with nothing in it that rich or a terminal would obey."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text or ""))


def examples_table(results: Mapping[str, Evaluation], ids: Sequence[str]) -> Table:
    """Decoded answers side by side: one row per model, one column per sample.

    Args:
        results: by name of the method, the float model first.
        ids: of the samples to show.

    Raises:
        DataError: a result lacks one of the samples.
    """
    table = Table(title="decoded answers", show_lines=True, box=box.SIMPLE_HEAD)
    table.add_column("")
    found = {name: {sample.id: sample for sample in result.samples} for name, result in results.items()}
    for name, samples in found.items():
        missing = [i for i in ids if i not in samples]
        if missing:
            raise DataError(f"the evaluation of {name} has no sample {', '.join(missing)}")
    for sample_id in ids:
        table.add_column(Text(sample_id), overflow="fold", ratio=1)
    references = next(iter(found.values()), {})
    table.add_row("reference", *(_plain(references[i].reference) for i in ids), style="bold")
    for name, samples in found.items():
        table.add_row(Text(name), *(_plain(samples[i].prediction) for i in ids))
    return table
