# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/how-it-works.md from the report of a run.

Example: masquant quantize MODEL -o OUT --calibration DATA && python benchmarks/pictures.py OUT
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import vl_convert

from masquant.checkpoint.store import write_text
from masquant.report.charts import Figure, error_figures, range_figures, range_rows

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
WIDTH = 430  # pixels
COLOURS = {
    "text": "#3566b8",
    "vision": "#c65d07",
    "audio": "#12805f",
    "muted": "#66696f",
    "line": "#dcdcd8",
    "accent": "#4b4fae",
    "ink": "#1c1d20",
}


def drawn(figure: Figure) -> str:
    """The figure as SVG on white, with the light page's colours."""
    spec = {**figure.spec, "width": WIDTH, "config": {**figure.spec["config"], "background": "white"}}
    svg = vl_convert.vegalite_to_svg(spec)
    return re.sub(r"var\(--(\w+)\)", lambda found: COLOURS[found[1]], svg)


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="checkpoint folder")
    blocks = json.loads((parser.parse_args().out / "report.json").read_text())["blocks"]
    ranges = {r.group: r for r in range_figures(range_rows(blocks))}
    errors = error_figures(blocks, list(blocks[0]["error"]))
    figures = {
        "ranges-before": ranges["down"].before,
        "ranges-after": ranges["down"].after,
        "misalignment": ranges["down"].misalignment,
        "errors": errors[0],
    }
    PICTURES.mkdir(exist_ok=True)
    for name, figure in figures.items():
        assert figure is not None, f"the run has no {name}"
        write_text(PICTURES / f"{name}.svg", drawn(figure) + "\n")
        print(PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()
