# SPDX-License-Identifier: Apache-2.0
"""What `masquant quantize --dry-run` expects and what the run then takes: seconds and peak memory, by method.

    python benchmarks/estimate.py                            # omni-135m and the data of `masquant demo`, five methods
    python benchmarks/estimate.py --methods rtn,fast --limit 24 --stages
    python benchmarks/estimate.py --model M --calibration D --methods masquant

Each is a process of its own, one after the other. A method may be a preset's effort: `fast` and `refined` are those of
masquant. Seconds are from reading the model's files to the finished folder; Python's own start is in neither.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from masquant.demo import demo_directory, obtain_model

METHODS = "rtn,fast,masquant,smoothquant,gptq"
EFFORTS = ("fast", "refined")


def run(arguments: argparse.Namespace, method: str, output: Path, *, dry: bool) -> dict[str, Any]:
    """What `masquant quantize --json` prints."""
    effort = ["--method", "masquant", "--preset", method] if method in EFFORTS else ["--method", method]
    command = [
        sys.executable, "-m", "masquant.cli", "quantize", str(arguments.model), "-o", str(output), *effort,
        "--calibration", str(arguments.calibration), "--json", "--quiet", "--group-size", arguments.group_size,
        "--batch-size", str(arguments.batch_size),
        *(["--limit", str(arguments.limit)] if arguments.limit else []), *(["--dry-run"] if dry else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found["estimate"] if dry else found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default omni-135m")
    parser.add_argument("--calibration", type=Path, default=demo_directory() / "data/calibration")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", action="store_true", help="also stage by stage")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.model = arguments.model or obtain_model(on_progress=print)
    table = Table("method", "s expected", "s taken", "ratio", "GiB expected", "GiB taken", "ratio")
    parts = Table("method", "stage", "s expected", "s taken")
    rows = []
    for method in arguments.methods.split(",") * arguments.rounds:
        with tempfile.TemporaryDirectory() as folder:
            expected = run(arguments, method, Path(folder) / "out", dry=True)
            taken = run(arguments, method, Path(folder) / "out", dry=False)
        seconds, memory = (expected["seconds"], taken["seconds"]), (expected["peak_memory"], taken["peak_memory"])
        rows.append({"method": method, "expected": expected, "taken": {**taken, "blocks": None}})
        table.add_row(
            method, *(f"{s:.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}",
            *(f"{m / 2**30:.2f}" for m in memory), f"{memory[0] / memory[1]:.2f}",
        )  # fmt: skip
        for stage in {**expected["stages"], **taken["stages"]}:
            found = (e["stages"].get(stage, 0.0) for e in (expected, taken))
            parts.add_row(method, stage, *(f"{s:.2f}" for s in found))
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
    console = Console()
    console.print(table)
    if arguments.stages:
        console.print(parts)


if __name__ == "__main__":
    main()
