# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file with its pictures' data, their drawing code, and the examples' media inside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
import yaml
from markupsafe import Markup

from ..checkpoint.store import write_json, write_text
from ..errors import DataError
from ..evaluation import human_bytes
from . import charts
from .content import FLOAT

WORST_SITES = 12
_STATE_WORDS = {"before": "before", "after": "as quantized"}


def write_report(path: Path, content: Mapping[str, Any], media: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Write a page and, beside it, the JSON with every number that it shows.

    Args:
        path: of the HTML file; the JSON gets the same name with `.json`.
        content: see `content`.
        media: by sample id, data URIs of the examples' media.

    Raises:
        DataError: the name does not end in `.html`, or its folder does not exist.
    """
    check_target(path)
    page = render_page(content, media)
    write_json(path.with_suffix(".json"), content)
    write_text(path, page)


def check_target(path: Path) -> None:
    """Refuse a page's file name before any work is done for it.

    Raises:
        DataError: the name does not end in `.html`, or its folder does not exist.
    """
    if path.suffix != ".html":
        raise DataError(f"the report's file must end in .html, got {path}")
    if not path.parent.is_dir():
        raise DataError(f"folder {path.parent} of the report does not exist")


def render_page(content: Mapping[str, Any], media: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The page as HTML; a pure function of its content."""
    drawn: list[charts.Spec] = []

    def draw(figure: charts.Figure) -> Markup:
        """Place of a picture; its specification goes to the end of the page."""
        drawn.append(figure.spec)
        return Markup('<div class="chart" id="chart-{}" role="img" aria-label="{}"></div>').format(
            len(drawn) - 1, figure.title
        )

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("masquant.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(bytes=human_bytes, signed=_signed, number=_number, percent=_percent, error=_error)
    view = _view(content)
    body = environment.get_template("page.html").render(
        **view, draw=draw, media=media or {}, colours=charts.MODALITY_COLOURS, states=_STATE_WORDS
    )
    specs = json.dumps(drawn, allow_nan=False).replace("</", "<\\/")
    library = drawing_code().replace("</script", "<\\/script")
    scripts = f'<script type="application/json" id="charts">{specs}</script>\n<script>{library}</script>\n'
    return body.replace("<!--scripts-->", scripts, 1)


@lru_cache(maxsize=1)
def drawing_code() -> str:
    """JavaScript of Vega, Vega-Lite and vega-embed."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _view(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the template reads: numbers of the content, sorted and summed, and pictures."""
    main, records = content["main"], content["quantizations"]
    evaluation = content.get("evaluation")
    view: dict[str, Any] = {
        "title": content["title"],
        "main": main,
        "record": None,
        "evaluation": evaluation,
        "losses": charts.loss_figures(evaluation, main) if evaluation else [],
        "changes": _changes(evaluation, main),
        "tasks": _task_table(evaluation),
        "methods": _methods(evaluation),
        "num_records": len(records),
    }
    if main is None:
        return {**view, "ranges": charts.range_figures([{**row, "before": row} for row in content["ranges"]])}
    record = records[main]
    blocks, modalities = record["blocks"], record["modalities"]
    kinds = charts.by_kind(blocks)
    named = [{**g, "block": block["block"]} for block in blocks for g in block["groups"]]
    seen = [m for m in modalities if any(m in block["error"] for block in blocks)]
    return {
        **view,
        "record": record,
        "recipe": yaml.safe_dump(record["recipe"], sort_keys=False),
        "size": low_bit_bytes(record),
        "ranges": charts.range_figures(charts.range_rows(kinds)),
        "block_errors": [charts.block_error_figure(records, main, m) for m in seen],
        "group_errors": charts.error_figures(kinds, seen),
        "choices": charts.choice_figure(kinds),
        "kinds": _counts(charts.vector_kind(g["choice"]) for g in named),
        "patched": sum(bool(g["rank"]) for g in named),
        "num_sites": len(named),
        "bytes_added": charts.byte_figure(blocks),
        "spectrum": charts.spectrum_figure(blocks),
        "worst": sorted(named, key=_worst_error, reverse=True)[:WORST_SITES],
        "improvement": _improvement(named, seen),
        "seen": seen,
    }


def low_bit_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a run's quantized linears with vectors and patches."""
    return sum(record["bytes"][key] for key in ("packed", "smooth_scale", "compensation"))


def _worst_error(group: Mapping[str, Any]) -> float:
    return max(group["errors"].values(), default=0.0)


def _methods(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Evaluations of the quantized models."""
    models = evaluation["models"] if evaluation else {}
    return [{"name": name, **model} for name, model in models.items() if name != FLOAT]


def _counts(values: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def _improvement(groups: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> dict[str, float]:
    """Per modality, the geometric mean over groups of error / error of rounding to nearest."""
    found = {}
    for m in modalities:
        logs = [
            math.log(g["errors"][m] / g["plain_errors"][m])
            for g in groups
            if g["errors"].get(m, 0) > 0 and g["plain_errors"].get(m, 0) > 0
        ]
        if logs:
            found[m] = math.exp(sum(logs) / len(logs))
    return found


def _changes(evaluation: Mapping[str, Any] | None, main: str | None) -> list[dict[str, Any]]:
    """Per modality, the main model's change of nll."""
    if evaluation is None:
        return []
    name = main if main in evaluation["models"] else list(evaluation["models"])[-1]
    return [
        {"modality": entry["modality"], "tasks": entry["tasks"], **entry["models"][name]}
        for entry in evaluation["modalities"]
    ]


def _task_table(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Per task, its kinds of media and every model's metrics."""
    if evaluation is None:
        return []
    models = evaluation["models"]
    return [
        {
            "task": task,
            "media": kinds,
            "rows": [
                {"name": name, "is_float": name == FLOAT, **model["tasks"][task]}
                for name, model in models.items()
                if task in model["tasks"]
            ],
        }
        for task, kinds in evaluation["media"].items()
    ]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}".replace("-", "\u2212")


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}\u202f%"


def _error(value: float | None) -> str:
    """A relative error in percent, with two digits that matter."""
    return "" if value is None else f"{100 * value:.2g}\u202f%"
