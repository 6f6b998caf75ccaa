# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every method, of masquant without each of its parts, and over bytes: writes docs/accuracy.md.

    python benchmarks/accuracy.py                     # about an hour on two cores; goes on where it stopped
    python benchmarks/accuracy.py --tables methods    # only some tables
    python benchmarks/accuracy.py --model M --calibration D --data D2 --json F --markdown F2

Without --model it takes omni-135m with the data of `masquant demo`. Every finished row is kept in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import masquant
from masquant.checkpoint.store import write_json
from masquant.compare import compare
from masquant.demo import demo_directory, obtain_model
from masquant.evaluation import Evaluation
from masquant.progress import NoProgress
from masquant.recipe import (
    BudgetArgs,
    CompensationArgs,
    Recipe,
    RefinementArgs,
    RotationArgs,
    RoundingArgs,
    SmoothingArgs,
)

ROOT = Path(__file__).resolve().parent.parent


def preset(method: str, scheme: str = "W4A8", size: Any = 64, **changes: Any) -> Recipe:
    """A preset with changed fields."""
    return replace(Recipe.preset(method, scheme, size), **changes)


def symmetric(recipe: Recipe) -> Recipe:
    """The recipe on the grid without its one integer more."""
    scheme = recipe.scheme
    return replace(recipe, scheme=replace(scheme, weights=replace(scheme.weights, full_range=False)))


def tables() -> dict[str, tuple[str, dict[str, Recipe]]]:
    """Per table, its title and recipes."""
    methods = ("rtn", "smoothquant", "awq", "mbq", "svdquant", "gptq", "quarot", "masquant")
    plain = {"smoothing": SmoothingArgs("none"), "selection": None, "compensation": None}
    by_token = RoundingArgs("gptq", balance="token")
    return {
        "methods": ("Methods, W4A8, groups of 64", {m: preset(m) for m in methods}),
        "parts": (
            "masquant without each of its parts, W4A8, groups of 64",
            {
                "masquant": preset("masquant"),
                "- rotation": preset("masquant", rotation=None),
                "- online transforms": preset("masquant", rotation=RotationArgs(online_transforms=False)),
                "- full integer range": symmetric(preset("masquant")),
                "- gradient weights": preset("masquant", rounding=by_token),
                "- smoothing and patches": preset("masquant", **plain),
                "+ 5 % of bytes by budget": preset("masquant", budget=BudgetArgs(0.05)),
                "fast": preset("masquant").fast(),
            },
        ),
        "activations": (
            "W4A6, groups of 64",
            {m: preset(m, "W4A6") for m in ("smoothquant", "gptq", "quarot", "masquant")},
        ),
        "groups": (
            "Group sizes, W4A8 (128 where it divides: down)",
            {
                f"{m} {name}": preset(m, "W4A8", size)
                for name, size in (("channel", "channel"), ("g128", None))
                for m in ("gptq", "quarot", "masquant")
            },
        ),
        "patches": (
            "Loss over bytes: patches of every modality with a fixed share of the group's bytes, W4A8, groups of 64",
            {
                f"{share:.0%} patches": preset(
                    "masquant",
                    selection=None,
                    smoothing=SmoothingArgs("none"),
                    compensation=CompensationArgs(max_bytes=share) if share else None,
                )
                for share in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
            },
        ),
        "budget": (
            "Loss over bytes: one budget for group sizes, bits and patches, W4A8, groups of 64",
            {
                f"{share:.0%} budget": preset("masquant", budget=BudgetArgs(share))
                for share in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
            },
        ),
        "schemes": (
            "Other schemes",
            {
                f"{m} {scheme}": preset(m, scheme, None)
                for scheme in ("W8A8", "W4A16")
                for m in ("smoothquant", "gptq", "masquant")
            },
        ),
        "refined": (
            "Refined by gradient block by block, W4A8, groups of 64 (slow)",
            {"masquant, refined": preset("masquant", refinement=RefinementArgs())},
        ),
    }


def row_of(result: Evaluation) -> dict[str, Any]:
    """What is kept of one evaluation."""
    return {**{k: v for k, v in result.to_dict().items() if k != "model"}, "losses": losses_of(result)}


def losses_of(result: Evaluation) -> dict[str, list[float]]:
    """Per sample: change of nll, KL, tokens; for paired differences."""
    return {s.id: [s.nll - (s.baseline_nll or s.nll), s.kl or 0.0, s.tokens] for s in result.samples}


def paired(row: Mapping[str, Any], other: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Per task, row minus other: difference of the change of nll with its paired standard error."""
    cells = []
    for ids in tasks.values():
        difference = [row["losses"][i][0] - other["losses"][i][0] for i in ids]
        tokens = [row["losses"][i][2] for i in ids]
        mean = sum(difference) / sum(tokens)
        error = math.sqrt(sum((d - mean * t) ** 2 for d, t in zip(difference, tokens, strict=True))) / sum(tokens)
        cells.append(f"{mean:+.3f} ±{error:.3f}")
    return cells


def markdown(record: Mapping[str, Any]) -> str:
    """The page."""
    machine, rows = record["machine"], record["rows"]
    tasks: dict[str, list[str]] = record["tasks"]
    text = [
        "# Accuracy",
        "",
        "Written by `python benchmarks/accuracy.py`: do not edit.",
        "",
        f"{record['model']}, {record['calibration']} calibration and {record['evaluation']} evaluation samples; "
        f"{machine}. Every cell is the change of the negative log-likelihood per answer token against the float "
        "model, with its paired standard error over samples, and below it the KL divergence from the float model. "
        "`sum` adds the tasks. Bytes are those of the decoder's linears with scales, vectors and patches; seconds and "
        "peak memory "
        "are of quantizing in a process that also holds the float model's scores.",
        "",
    ]
    for key, (title, recipes) in tables().items():
        found = [(name, rows[f"{key}/{name}"]) for name in recipes if f"{key}/{name}" in rows]
        if not found:
            continue
        text += [
            f"## {title}",
            "",
            f"| | {' | '.join(tasks)} | sum | MiB | s | GiB |",
            "|---" * (len(tasks) + 5) + "|",
        ]
        for name, row in found:
            cells, total, divergence = [], 0.0, 0.0
            for task in tasks:
                m = row["tasks"][task]
                total, divergence = total + m["delta_nll"], divergence + m["kl"]
                cells.append(f"{m['delta_nll']:+.3f} ±{m['delta_nll_stderr']:.3f}<br>{m['kl']:.3f}")
            size = (row["bytes"]["base"] + row["bytes"]["compensation"]) / 2**20
            cells += [f"{total:+.3f}<br>{divergence:.3f}", f"{size:.1f}", f"{row['seconds']:.0f}"]
            text.append(f"| {name} | {' | '.join(cells)} | {row['peak_memory'] / 2**30:.1f} |")
        text.append("")
        if key == "methods" and len(found) > 1 and found[-1][0] == "masquant":
            text += ["masquant minus each other method, paired (change of nll per token):", ""]
            text += [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
            text += [f"| {n} | {' | '.join(paired(found[-1][1], row, tasks))} |" for n, row in found[:-1]]
            text.append("")
    return "\n".join(text)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(k for k in tables() if k != "refined"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/accuracy.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/accuracy.md")
    arguments = parser.parse_args()
    data = demo_directory() / "data"
    model = arguments.model or obtain_model(on_progress=print)
    calibration = masquant.load_samples(arguments.calibration or data / "calibration")
    evaluation = masquant.load_samples(arguments.data or data / "evaluation")
    record = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": {}}
    record |= {
        "model": str(arguments.model or "omni-135m"),
        "calibration": len(calibration),
        "evaluation": len(evaluation),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, masquant {masquant.__version__}, {time.strftime('%Y-%m-%d')}",
        "tasks": {
            task: [s.id for s in evaluation if s.task == task] for task in dict.fromkeys(s.task for s in evaluation)
        },
    }
    all_tables = tables()
    wanted: dict[str, Recipe] = {}
    for key in arguments.tables.split(","):
        wanted |= {f"{key}/{name}": recipe for name, recipe in all_tables[key][1].items()}
    missing = {name: recipe for name, recipe in wanted.items() if name not in record["rows"]}

    def keep(name: str, _model: Any, _processor: Any, _report: Any, result: Evaluation) -> None:
        same = [n for n, r in missing.items() if r == missing[name]]
        record["rows"] |= {n: row_of(result) for n in same}
        write_json(arguments.json, record)
        arguments.markdown.write_text(markdown(record))
        print(time.strftime("%H:%M:%S"), ", ".join(same), flush=True)

    distinct: dict[str, Recipe] = {}
    for name, recipe in missing.items():
        if recipe not in distinct.values():
            distinct[name] = recipe
    if distinct:
        compare(
            model, distinct, calibration, evaluation, batch_size=8, generate=False, progress=NoProgress(), keep=keep
        )
    arguments.markdown.write_text(markdown(record))


if __name__ == "__main__":
    main()
