# SPDX-License-Identifier: Apache-2.0
"""The page's pictures as Vega-Lite specifications: small multiples, each as wide as its place on the page.

Colours are CSS variables of the page, so that light, dark and print need no second picture.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .content import FLOAT

Spec = dict[str, Any]

MODALITY_COLOURS = {
    "text": "var(--text)",
    "vision": "var(--vision)",
    "audio": "var(--audio)",
    "all": "var(--muted)",
}
GROUP_TITLES = {
    "qkv": "input of q, k, v",
    "o": "input of o",
    "gate_up": "input of gate, up",
    "down": "input of down",
}
_CHOICE_SHADES = {"no smoothing": 0.12, "shared vector": 0.4, "between": 0.7, "own vectors": 1.0}
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "tickCount": 5,
        "labelLimit": 130,
    },
}


@dataclass(frozen=True)
class Figure:
    """One picture: what stands above it, and its specification."""

    title: str
    spec: Spec
    note: str = ""


def _figure(title: str, layers: Sequence[Spec], *, height: int, note: str = "", **more: Any) -> Figure:
    return Figure(
        title,
        {
            "description": title,
            "width": "container",
            "height": height,
            "autosize": {"type": "fit", "contains": "padding"},
            "padding": {"left": 2, "right": 6, "top": 5, "bottom": 4},
            "config": _CONFIG,
            "layer": list(layers),
            **more,
        },
        note,
    )


def _colour(keys: Sequence[str]) -> Spec:
    return {
        "field": "modality",
        "type": "nominal",
        "scale": {"domain": list(keys), "range": [MODALITY_COLOURS[key] for key in keys]},
        "legend": None,
    }


def _block_axis(blocks: int) -> Spec:
    return {
        "field": "block",
        "type": "quantitative",
        "scale": {"domain": [0, max(blocks - 1, 1)], "nice": False},
        "axis": {"title": "block", "grid": False, "format": "d", "tickMinStep": 1},
    }


def _number(field: str, title: str, number_format: str) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, "format": number_format}


def _log_axis(field: str, domain: tuple[float, float], title: str, number_format: str = "~g") -> Spec:
    return {
        "field": field,
        "type": "quantitative",
        "scale": {"type": "log", "domain": list(domain), "clamp": True, "nice": False},
        "axis": {"title": title, "format": number_format, "values": _log_ticks(domain)},
    }


def _log_ticks(domain: tuple[float, float]) -> list[float]:
    """Powers of ten, every n-th of them, or 1, 2, 5, 10 where there are less than two decades."""
    low, high = (math.log10(bound) for bound in domain)
    steps = (1, 2, 5) if high - low < 2 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1, max(round((high - low) / 5), 1))
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [float(f"{tick:.0e}") for tick in ticks if domain[0] <= tick <= domain[1]]


def _domain(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a logarithmic axis, with a little air; values below a ten-thousandth of the largest are cut off."""
    positive = sorted(v for v in values if v > 0) or [1.0]
    top = positive[-1]
    return max(positive[0], top * 1e-4) / 1.2, top * 1.3


def loss_figures(evaluation: Mapping[str, Any], main: str | None) -> list[Figure]:
    """Per modality, what every method adds to the negative log-likelihood, with one standard error."""
    figures = []
    for entry in evaluation["modalities"]:
        rows = [
            {
                "method": name,
                "change": m["delta_nll"],
                "stderr": m.get("delta_nll_stderr") or 0.0,
                "main": name == main,
            }
            for name, m in entry["models"].items()
            if name != FLOAT and m.get("delta_nll") is not None
        ]
        if not rows:
            continue
        for row in rows:
            row["low"], row["high"] = row["change"] - row["stderr"], row["change"] + row["stderr"]
        colour = MODALITY_COLOURS.get(entry["modality"], "var(--accent)")
        y = {"field": "method", "type": "nominal", "sort": None, "axis": {"title": None, "labelFontSize": 12}}
        tooltip = [
            {"field": "method", "type": "nominal"},
            _number("change", "added nll per token", "+.4f"),
            _number("stderr", "standard error", ".4f"),
        ]
        opacity = {"condition": {"test": "datum.main", "value": 1.0}, "value": 0.55}
        axis = {"title": "added nll per answer token", "format": "+~g"}
        x = {"field": "low", "type": "quantitative", "axis": axis, "scale": {"nice": True}}
        data = {"values": rows}
        layers = [
            {
                "data": {"values": [{"zero": 0}]},
                "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3]},
                "encoding": {"x": {"field": "zero", "type": "quantitative"}},
            },
            {
                "data": data,
                "mark": {"type": "rule", "strokeWidth": 3, "color": colour},
                "encoding": {"y": y, "x": x, "x2": {"field": "high"}, "opacity": opacity, "tooltip": tooltip},
            },
            {
                "data": data,
                "mark": {"type": "point", "filled": True, "size": 90, "color": colour, "opacity": 1},
                "encoding": {
                    "y": y,
                    "x": {"field": "change", "type": "quantitative"},
                    "opacity": opacity,
                    "tooltip": tooltip,
                },
            },
        ]
        note = f"{', '.join(entry['tasks'])}: {entry['num_samples']} samples"
        figures.append(_figure(entry["modality"], layers, height=26 * len(rows) + 20, note=note))
    return figures


@dataclass(frozen=True)
class Ranges:
    """Pictures of one group: ranges and misalignment, before and (if it was quantized) after."""

    group: str
    before: Figure
    after: Figure | None
    misalignment: Figure | None


def by_kind(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocks with one group of each kind: those that differ by a number in their name, as experts do, become one.

    Of several groups it has the widest range, the worst misalignment, the mean error, the commonest choice, and the
    sum of ranks and bytes.
    """
    found = []
    for block in blocks:
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for group in block["groups"]:
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", "", group["group"]), []).append(group)
        groups = [dict(own[0]) if len(own) == 1 else _together(kind, own) for kind, own in kinds.items()]
        found.append({**block, "groups": groups})
    return found


def _together(kind: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several groups; see `by_kind`."""

    def merged(values: Iterable[Mapping[str, float]], combine: Callable[[list[float]], float]) -> dict[str, float]:
        lists: dict[str, list[float]] = {}
        for value in values:
            for key, number in value.items():
                lists.setdefault(key, []).append(number)
        return {key: combine(numbers) for key, numbers in lists.items()}

    def ranges(state: str) -> dict[str, Any]:
        own = [group["ranges"][state] for group in groups]
        middle: Callable[[list[float]], float] = statistics.median
        combine: dict[str, Callable[[list[float]], float]] = {
            "min": min,
            "q25": middle,
            "median": middle,
            "q75": middle,
        }
        names = dict.fromkeys(name for r in own for name in r["channels"])
        channels = {
            name: {
                key: combine.get(key, max)([r["channels"][name][key] for r in own if name in r["channels"]])
                for key in ("min", "q25", "median", "q75", "max")
            }
            for name in names
        }
        return {"channels": channels, "misalignment_db": merged((r["misalignment_db"] for r in own), min)}

    return {
        **groups[0],
        "group": kind,
        "ranges": {state: ranges(state) for state in groups[0]["ranges"]},
        "plain_errors": merged((g["plain_errors"] for g in groups), statistics.fmean),
        "errors": merged((g["errors"] for g in groups), statistics.fmean),
        "choice": Counter(g["choice"] for g in groups).most_common(1)[0][0],
        "rank": {key: int(rank) for key, rank in merged((g["rank"] for g in groups), sum).items()},
    }


def group_title(group: str) -> str:
    """What feeds a group, for people."""
    experts, _, role = group.rpartition(".")
    title = GROUP_TITLES.get(role, f"input of {role}")
    return f"{title} of {experts}" if experts else title


def range_rows(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows `{"block", "group", "before", "after"}` of a record's blocks."""
    return [
        {"block": block["block"], "group": group["group"], **group["ranges"]}
        for block in blocks
        for group in block["groups"]
    ]


def range_figures(rows: Sequence[Mapping[str, Any]]) -> list[Ranges]:
    """Per group, the channels' ranges over the blocks, before and after.

    Args:
        rows: `{"block", "group", "before", "after"?}`, each state with `channels` and `misalignment_db`.
    """
    blocks = max(row["block"] for row in rows) + 1
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        keys = list(dict.fromkeys(key for row in own for key in row["before"]["channels"]))
        title = group_title(group)
        pictures: dict[str, Figure | None] = {"before": None, "after": None}
        domains = {
            state: _domain([v for row in own for c in row[state]["channels"].values() for v in (c["q25"], c["max"])])
            for state in pictures
            if all(state in row for row in own)
        }
        span = max(high / low for low, high in domains.values())  # both with the same number of decades
        for state, (_, high) in domains.items():
            pictures[state] = _range_figure(title, own, state, keys, blocks, (high / span, high))
        before = pictures["before"]
        assert before is not None
        found.append(Ranges(group, before, pictures["after"], _misalignment_figure(title, own, keys, blocks)))
    return found


def _range_figure(
    title: str,
    own: Sequence[Mapping[str, Any]],
    state: str,
    keys: Sequence[str],
    blocks: int,
    domain: tuple[float, float],
) -> Figure:
    values = [
        {"block": row["block"], "modality": key, **channels}
        for row in own
        for key, channels in row[state]["channels"].items()
    ]
    x, colour = _block_axis(blocks), _colour(keys)
    tooltip = [
        {"field": "block", "type": "quantitative"},
        {"field": "modality", "type": "nominal"},
        _number("max", "loudest channel", ".4~g"),
        _number("median", "median channel", ".4~g"),
        _number("min", "quietest channel", ".4~g"),
    ]
    layers = [
        {
            "mark": {"type": "area", "opacity": 0.16},
            "encoding": {
                "x": x,
                "y": _log_axis("q25", domain, "largest |x| of a channel"),
                "y2": {"field": "q75"},
                "color": colour,
            },
        },
        {
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"x": x, "y": _log_axis("max", domain, ""), "color": colour},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 18, "opacity": 1},
            "encoding": {"x": x, "y": _log_axis("max", domain, ""), "color": colour, "tooltip": tooltip},
        },
    ]
    return _figure(title, layers, height=190, data={"values": values})


def _misalignment_figure(
    title: str, own: Sequence[Mapping[str, Any]], keys: Sequence[str], blocks: int
) -> Figure | None:
    values = [
        {"block": row["block"], "modality": key, "state": state, "db": value}
        for row in own
        for state in ("before", "after")
        if state in row
        for key, value in row[state]["misalignment_db"].items()
    ]
    if not values:
        return None
    encoding = {
        "x": _block_axis(blocks),
        "y": {"field": "db", "type": "quantitative", "axis": {"title": "dB"}, "scale": {"zero": True}},
        "color": _colour(keys),
        "strokeDash": _states("state"),
    }
    tooltip = [
        {"field": "block", "type": "quantitative"},
        {"field": "modality", "type": "nominal"},
        {"field": "state", "type": "nominal"},
        _number("db", "dB", ".2f"),
    ]
    return _figure(title, _lines(encoding, tooltip), height=150, data={"values": values})


def _states(field: str) -> Spec:
    """Dashed before, solid after."""
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": ["before", "after"], "range": [[4, 3], [1, 0]]},
        "legend": None,
    }


def _lines(encoding: Spec, tooltip: Sequence[Spec]) -> list[Spec]:
    points = {key: value for key, value in encoding.items() if key != "strokeDash"}
    return [
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": encoding},
        {
            "mark": {"type": "point", "filled": True, "size": 16, "opacity": 1},
            "encoding": {**points, "tooltip": list(tooltip)},
        },
    ]


def error_figures(blocks: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> list[Figure]:
    """Relative squared error per group, rounded to nearest (dashed) and as quantized (solid)."""
    figures = []
    for group in dict.fromkeys(g["group"] for block in blocks for g in block["groups"]):
        values = [
            {"block": block["block"], "modality": key, "state": state, "error": error}
            for block in blocks
            for g in block["groups"]
            if g["group"] == group
            for state, errors in (("before", g["plain_errors"]), ("after", g["errors"]))
            for key, error in errors.items()
        ]
        title = "output of " + group_title(group).removeprefix("input of ")
        figures.append(_error_figure(title, values, modalities, len(blocks)))
    return figures


def block_error_figure(records: Mapping[str, Mapping[str, Any]], main: str, modality: str) -> Figure:
    """Relative squared error of every block's output for one modality, a line per method."""
    values = [
        {"block": block["block"], "method": name, "error": block["error"][modality], "main": name == main}
        for name, record in records.items()
        for block in record["blocks"]
        if modality in block["error"]
    ]
    blocks = len(records[main]["blocks"])
    domain = _domain([row["error"] for row in values])
    x, y = _block_axis(blocks), _log_axis("error", domain, "relative squared error", "~%")
    detail = {"field": "method", "type": "nominal"}
    tooltip = [{"field": "block", "type": "quantitative"}, detail, _number("error", "relative error", ".2~%")]
    shown = {"condition": {"test": "datum.main", "value": MODALITY_COLOURS[modality]}, "value": "var(--muted)"}
    opacity = {"condition": {"test": "datum.main", "value": 1}, "value": 0.55}
    common = {"x": x, "y": y, "detail": detail, "opacity": opacity}
    layers: list[Spec] = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**common, "stroke": shown}},
        {
            "mark": {"type": "point", "filled": True, "size": 16},
            "encoding": {**common, "color": shown, "tooltip": tooltip},
        },
    ]
    if len(records) > 1:
        last = [row for row in values if row["block"] == blocks - 1]
        layers.append(
            {
                "data": {"values": last},
                "mark": {"type": "text", "align": "right", "dx": -4, "dy": -6, "fontSize": 10, "fill": "var(--muted)"},
                "encoding": {"x": x, "y": y, "text": {"field": "method"}},
            }
        )
    return _figure(modality, layers, height=190, data={"values": values})


def _error_figure(title: str, values: list[dict[str, Any]], modalities: Sequence[str], blocks: int) -> Figure:
    encoding = {
        "x": _block_axis(blocks),
        "y": _log_axis("error", _domain([row["error"] for row in values]), "relative squared error", "~%"),
        "color": _colour(modalities),
        "strokeDash": _states("state"),
    }
    tooltip = [
        {"field": "block", "type": "quantitative"},
        {"field": "modality", "type": "nominal"},
        {"field": "state", "type": "nominal"},
        _number("error", "relative error", ".2~%"),
    ]
    return _figure(title, _lines(encoding, tooltip), height=170, data={"values": values})


def choice_figure(blocks: Sequence[Mapping[str, Any]]) -> Figure:
    """What was chosen for every group: the kind of vectors as a shade, a dot where there is a patch."""
    values = [
        {
            "block": block["block"],
            "group": g["group"],
            "vectors": vector_kind(g["choice"]),
            "choice": g["choice"],
            "patch": bool(g["rank"]),
            "rank": ", ".join(f"{key} {rank}" for key, rank in g["rank"].items()) or "none",
        }
        for block in blocks
        for g in block["groups"]
    ]
    groups = list(dict.fromkeys(row["group"] for row in values))
    x = {
        "field": "block",
        "type": "ordinal",
        "axis": {"title": "block", "labelAngle": 0, "labelOverlap": True, "ticks": False, "domain": False},
        "scale": {"paddingInner": 0.12, "paddingOuter": 0},
    }
    y = {
        "field": "group",
        "type": "nominal",
        "sort": groups,
        "axis": {"title": None, "ticks": False, "domain": False, "labelFontSize": 12},
        "scale": {"paddingInner": 0.12},
    }
    tooltip = [
        {"field": "block", "type": "ordinal"},
        {"field": "group", "type": "nominal"},
        {"field": "choice", "type": "nominal"},
        {"field": "rank", "type": "nominal"},
    ]
    shade = {
        "field": "vectors",
        "type": "ordinal",
        "scale": {"domain": list(_CHOICE_SHADES), "range": list(_CHOICE_SHADES.values())},
        "legend": None,
    }
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "fill": "var(--accent)", "cornerRadius": 2},
            "encoding": {"x": x, "y": y, "fillOpacity": shade, "tooltip": tooltip},
        },
        {
            "transform": [{"filter": "datum.patch"}],
            "mark": {"type": "point", "filled": True, "size": 22, "fill": "var(--ink)", "opacity": 1},
            "encoding": {"x": x, "y": y, "tooltip": tooltip},
        },
    ]
    return _figure("choice per group", layers, height=34 * len(groups) + 30, data={"values": values})


def vector_kind(choice: str) -> str:
    """The kind of vectors in a choice's name: "no smoothing", "shared vector", "between", "own vectors"."""
    kind = choice.partition(",")[0]
    return "between" if kind.startswith("vectors at") else kind


def byte_figure(blocks: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bytes added per block by vectors and by each modality's patches; None where nothing was added."""
    values = []
    for block in blocks:
        sizes = {"vectors": sum(g["bytes"]["smooth_scale"] for g in block["groups"])}
        for g in block["groups"]:
            for key, size in g["patch_bytes"].items():
                sizes[key] = sizes.get(key, 0) + size
        values += [{"block": block["block"], "part": part, "kib": size / 1024} for part, size in sizes.items() if size]
    if not values:
        return None
    colours = {"vectors": "var(--accent)", **MODALITY_COLOURS}
    parts = [part for part in colours if any(row["part"] == part for row in values)]
    color = {
        "field": "part",
        "type": "nominal",
        "scale": {"domain": parts, "range": [colours[part] for part in parts]},
        "legend": {"orient": "top", "title": None, "labelColor": "var(--muted)", "symbolType": "square"},
    }
    bars = {
        "mark": {"type": "bar", "cornerRadius": 1},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "scale": {"domain": list(range(len(blocks)))},
                "axis": {"title": "block", "labelAngle": 0, "labelOverlap": True},
            },
            "y": {"field": "kib", "type": "quantitative", "axis": {"title": "KiB"}},
            "color": color,
            "tooltip": [
                {"field": "block", "type": "ordinal"},
                {"field": "part", "type": "nominal"},
                _number("kib", "KiB", ".1f"),
            ],
        },
    }
    return _figure("bytes beyond the packed weights", [bars], height=190, data={"values": values})


def spectrum_figure(blocks: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Per patch, the share of the missing output that its first ranks hold, with a dot at the rank taken."""
    lines, dots = [], []
    for block in blocks:
        for g in block["groups"]:
            for key, shares in g["spectrum"].items():
                total, site = 0.0, f"{block['block']}.{g['group']}"
                for i, share in enumerate(shares, start=1):
                    total += share
                    row = {"site": site, "modality": key, "key": f"{site} {key}", "rank": i, "share": total}
                    lines.append(row)
                    if i == g["rank"][key]:
                        dots.append(row)
    if not lines:
        return None
    keys = [key for key in MODALITY_COLOURS if any(row["modality"] == key for row in lines)]
    encoding = {
        "x": {
            "field": "rank",
            "type": "quantitative",
            "axis": {"title": "rank", "grid": False, "tickMinStep": 1},
            "scale": {"nice": False},
        },
        "y": {"field": "share", "type": "quantitative", "axis": {"title": "share removed", "format": "~%"}},
        "color": _colour(keys),
        "detail": {"field": "key", "type": "nominal"},
    }
    tooltip = [
        {"field": "site", "type": "nominal"},
        {"field": "modality", "type": "nominal"},
        {"field": "rank", "type": "quantitative"},
        _number("share", "share removed", ".1%"),
    ]
    layers: list[Spec] = [
        {"data": {"values": lines}, "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.45}, "encoding": encoding},
        {
            "data": {"values": dots},
            "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
            "encoding": {**encoding, "tooltip": tooltip},
        },
    ]
    return _figure("spectrum of what the base misses", layers, height=190)
