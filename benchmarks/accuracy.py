# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every method, of masquant without each of its parts, over bytes and over calibration: writes
docs/accuracy.md.

    python benchmarks/accuracy.py                     # some hours on two cores; goes on where it stopped
    python benchmarks/accuracy.py --tables methods    # only some tables
    python benchmarks/accuracy.py --processes 8       # eight rows at a time
    python benchmarks/accuracy.py --model M --calibration D --data D2 --json F --markdown F2

Without --model it takes omni-135m with the data of `masquant demo`. Every finished row is kept in the JSON file, with
the machine that it ran on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import masquant
from masquant.api import load_processor
from masquant.calibration.dataset import Sample
from masquant.checkpoint.store import write_json
from masquant.compare import measure
from masquant.demo import demo_directory, obtain_model
from masquant.evaluation import BaselineScores, Evaluation, score_baseline
from masquant.integrations.loading import load_any
from masquant.pipeline import Calibration
from masquant.recipe import (
    BudgetArgs,
    CompensationArgs,
    Recipe,
    RefinementArgs,
    RotationArgs,
    RoundingArgs,
    SelectionArgs,
    SmoothingArgs,
)

SEEDS = 5
ROOT = Path(__file__).resolve().parent.parent


def preset(method: str, scheme: str = "W4A8", size: Any = 64, **changes: Any) -> Recipe:
    """A preset with changed fields."""
    return replace(Recipe.preset(method, scheme, size), **changes)


def symmetric(recipe: Recipe) -> Recipe:
    """The recipe on the grid without its one integer more."""
    scheme = recipe.scheme
    return replace(recipe, scheme=replace(scheme, weights=replace(scheme.weights, full_range=False)))


@dataclass(frozen=True)
class Row:
    """A recipe and the samples that it is calibrated on: the calibration data, or samples of the pool.

    Attributes:
        recipe: what to do.
        samples: how many of the pool, evenly over the tasks; 0 for all of it; None for the calibration data.
        seed: of the choice of samples.
    """

    recipe: Recipe
    samples: int | None = None
    seed: int = 0


def seeded(recipe: Recipe, samples: int, seed: int) -> Row:
    """A recipe calibrated on a choice of the pool's samples, its rotations and gradients drawn by the same seed."""
    recipe = replace(recipe, seed=seed)
    if recipe.rotation is not None:
        recipe = replace(recipe, rotation=replace(recipe.rotation, seed=seed))
    return Row(recipe, samples, seed)


def choose_samples(pool: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` samples, as evenly over the tasks as they allow, in the pool's order; 0 chooses all."""
    by_task: dict[str, list[Sample]] = {}
    for sample in pool:
        by_task.setdefault(sample.task, []).append(sample)
    generator = random.Random(seed)
    for samples in by_task.values():
        generator.shuffle(samples)
    depth = max(len(samples) for samples in by_task.values())
    in_turn = [samples[i] for i in range(depth) for samples in by_task.values() if i < len(samples)]
    chosen = {sample.id for sample in in_turn[: count or None]}
    return [sample for sample in pool if sample.id in chosen]


def plain_rows(recipes: Mapping[str, Recipe]) -> dict[str, Row]:
    """Rows that are calibrated on the calibration data."""
    return {name: Row(recipe) for name, recipe in recipes.items()}


def tables() -> dict[str, tuple[str, dict[str, Row]]]:
    """Per table, its title and rows."""
    methods = ("rtn", "smoothquant", "awq", "mbq", "svdquant", "gptq", "quarot", "masquant-paper", "masquant")
    plain = {"smoothing": SmoothingArgs("none"), "selection": None, "compensation": None}
    by_token = RoundingArgs("gptq", balance="token")
    shares = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
    patches = {share: CompensationArgs(max_bytes=share) if share else None for share in shares}
    return {
        "methods": ("Methods, W4A8, groups of 64", plain_rows({m: preset(m) for m in methods})),
        "parts": (
            "masquant without each of its parts, W4A8, groups of 64",
            plain_rows(
                {
                    "masquant": preset("masquant"),
                    "- rotation": preset("masquant", rotation=None),
                    "- online transforms": preset("masquant", rotation=RotationArgs(online_transforms=False)),
                    "- full integer range": symmetric(preset("masquant")),
                    "- gradient weights": preset("masquant", rounding=by_token),
                    "- smoothing and patches": preset("masquant", **plain),
                    "+ patches at a quarter of their price": preset(
                        "masquant", selection=SelectionArgs(byte_price=2.0)
                    ),
                    "+ 5 % of bytes by budget": preset("masquant", budget=BudgetArgs(0.05)),
                    "fast": preset("masquant").fast(),
                }
            ),
        ),
        "two cores": (
            "Seconds on two cores, W4A8, groups of 64",
            plain_rows(
                {
                    "masquant": preset("masquant"),
                    "+ patches at a quarter of their price": preset(
                        "masquant", selection=SelectionArgs(byte_price=2.0)
                    ),
                    "fast": preset("masquant").fast(),
                }
            ),
        ),
        "activations": (
            "W4A6, groups of 64",
            plain_rows({m: preset(m, "W4A6") for m in ("smoothquant", "gptq", "quarot", "masquant")}),
        ),
        "groups": (
            "Group sizes, W4A8 (128 where it divides: down)",
            plain_rows(
                {
                    f"{m} {name}": preset(m, "W4A8", size)
                    for name, size in (("channel", "channel"), ("g128", None))
                    for m in ("gptq", "quarot", "masquant")
                }
            ),
        ),
        "patches": (
            "Loss over bytes: patches of every modality with a fixed share of the group's bytes, W4A8, groups of 64",
            plain_rows(
                {
                    f"{share:.0%} patches": preset("masquant", **(plain | {"compensation": patches[share]}))
                    for share in shares
                }
            ),
        ),
        "budget": (
            "Loss over bytes: one budget for group sizes, bits and patches, W4A8, groups of 64",
            plain_rows({f"{share:.0%} budget": preset("masquant", budget=BudgetArgs(share)) for share in shares}),
        ),
        "schemes": (
            "Other schemes",
            plain_rows(
                {
                    f"{m} {scheme}": preset(m, scheme, None)
                    for scheme in ("W8A8", "W4A16")
                    for m in ("smoothquant", "gptq", "masquant")
                }
            ),
        ),
        "seeds": (
            "Several choices of 96 calibration samples, groups of 64",
            {
                f"{name}, seed {seed}": seeded(recipe, 96, seed)
                for name, recipe in {
                    "gptq W4A8": preset("gptq"),
                    "quarot W4A8": preset("quarot"),
                    "masquant fast W4A8": preset("masquant").fast(),
                    "masquant W4A8": preset("masquant"),
                    "quarot W4A6": preset("quarot", "W4A6"),
                    "masquant W4A6": preset("masquant", "W4A6"),
                }.items()
                for seed in range(SEEDS)
            },
        ),
        "refined": (
            "Refined by gradient block by block, W4A8, groups of 64",
            plain_rows({"masquant, refined": preset("masquant", refinement=RefinementArgs())}),
        ),
        "robustness": (
            "Fewer and other calibration samples, W4A8, groups of 64",
            {
                f"{method}, {size or 'all'} samples, seed {seed}": seeded(preset(method), size, seed)
                for method, sizes in {"masquant": (16, 64, 0), "gptq": (16,), "quarot": (16,)}.items()
                for size in sizes
                for seed in range(3 if method == "masquant" else 1)
            },
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


def sums(row: Mapping[str, Any], tasks: Iterable[str]) -> tuple[float, float]:
    """Change of nll and KL divergence, each per token and summed over the tasks."""
    found = [row["tasks"][task] for task in tasks]
    return sum(m["delta_nll"] for m in found), sum(m["kl"] for m in found)


def spread(found: Sequence[tuple[str, Mapping[str, Any]]], tasks: Sequence[str]) -> list[str]:
    """A table of the mean and the sample standard deviation over the seeds of rows that are named alike else."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in found:
        groups.setdefault(re.sub(r", seed \d+$", "", name), []).append(row)
    groups = {name: rows for name, rows in groups.items() if len(rows) > 1}
    if not groups:
        return []

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):+.3f} ±{statistics.stdev(values):.3f}"

    text = ["Mean and standard deviation over the seeds:", ""]
    text += [f"| | {' | '.join(tasks)} | sum | KL |", "|---" * (len(tasks) + 3) + "|"]
    for name, rows in groups.items():
        cells = [cell([row["tasks"][task]["delta_nll"] for row in rows]) for task in tasks]
        cells += [cell([sums(row, tasks)[0] for row in rows]), cell([sums(row, tasks)[1] for row in rows])]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return [*text, ""]


def over_seeds(
    rows: Mapping[str, Mapping[str, Any]], name: str, others: Sequence[str], tasks: Sequence[str]
) -> list[str]:
    """A table of one recipe minus others, seed by seed: mean and standard error over the seeds that all have."""
    seeds = [s for s in range(SEEDS) if all(f"{n}, seed {s}" in rows for n in (name, *others))]
    if len(seeds) < 2:
        return []
    text = [
        f"{name} minus others, seed by seed, with the standard error over {len(seeds)} seeds; `ratio` is of the sums "
        "of the seeds' means, loss and KL:",
        "",
        f"| | {' | '.join(tasks)} | sum | KL | ratio |",
        "|---" * (len(tasks) + 4) + "|",
    ]

    def values(row: Mapping[str, Any]) -> list[float]:
        return [*(row["tasks"][task]["delta_nll"] for task in tasks), *sums(row, tasks)]

    for other in others:
        ours, theirs = ([values(rows[f"{n}, seed {s}"]) for s in seeds] for n in (name, other))
        cells = []
        for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
            difference = [x - y for x, y in zip(a, b, strict=True)]
            error = statistics.stdev(difference) / math.sqrt(len(seeds))
            cells.append(f"{statistics.mean(difference):+.3f} ±{error:.3f}")
        ratios = [sum(row[i] for row in ours) / sum(row[i] for row in theirs) for i in (-2, -1)]
        text.append(f"| {other} | {' | '.join(cells)} | {', '.join(f'{r:.0%}' for r in ratios)} |")
    return [*text, ""]


def machines(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Where a table's rows ran."""
    names: dict[str, list[str]] = {}
    for name, row in found:
        names.setdefault(row["machine"], []).append(name)
    if len(names) == 1:
        return f"Ran on {next(iter(names))}."
    return " ".join(f"{', '.join(rows)}: ran on {machine}." for machine, rows in names.items())


def markdown(record: Mapping[str, Any]) -> str:
    """The page."""
    rows, tasks = record["rows"], list(record["tasks"])
    text = [
        "# Accuracy",
        "",
        "Written by `python benchmarks/accuracy.py`: do not edit.",
        "",
        f"{record['model']}, {record['calibration']} calibration and {record['evaluation']} evaluation samples. Every "
        "cell is the change of the negative log-likelihood per answer token against the float model, with its paired "
        "standard error over samples, and below it the KL divergence from the float model. `sum` adds the tasks. "
        "The errors are those of the choice of evaluation samples only: summed in another order, as on another "
        "machine, the same recipe rounds otherwise, and rows move about as much as between the seeds at the end of "
        "this page. "
        "Bytes are those of the decoder's linears with scales, vectors and patches. Seconds and peak memory are of "
        "quantizing in a process that also holds the float model's scores; only main memory counts, also where a GPU "
        "did the work.",
        "",
    ]
    for key, (title, wanted) in tables().items():
        found = [(name, rows[f"{key}/{name}"]) for name in wanted if f"{key}/{name}" in rows]
        if not found:
            continue
        text += [
            f"## {title}",
            "",
            machines(found),
            "",
            f"| | {' | '.join(tasks)} | sum | MiB | s | GiB |",
            "|---" * (len(tasks) + 5) + "|",
        ]
        for name, row in found:
            measured = [row["tasks"][task] for task in tasks]
            cells = [f"{m['delta_nll']:+.3f} ±{m['delta_nll_stderr']:.3f}<br>{m['kl']:.3f}" for m in measured]
            total, divergence = sums(row, tasks)
            size = (row["bytes"]["base"] + row["bytes"]["compensation"]) / 2**20
            cells += [f"{total:+.3f}<br>{divergence:.3f}", f"{size:.1f}", f"{row['seconds']:.0f}"]
            text.append(f"| {name} | {' | '.join(cells)} | {row['peak_memory'] / 2**30:.1f} |")
        text.append("")
        if key == "methods" and len(found) > 1 and found[-1][0] == "masquant":
            text += ["masquant minus each other method, paired (change of nll per token):", ""]
            text += [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
            text += [f"| {n} | {' | '.join(paired(found[-1][1], row, record['tasks']))} |" for n, row in found[:-1]]
            text.append("")
        if key == "seeds":
            text += ["Samples, rotations and gradients are drawn by the seed, alike for all methods.", ""]
            text += spread(found, tasks)
            text += over_seeds(dict(found), "masquant W4A8", ("gptq W4A8", "quarot W4A8", "masquant fast W4A8"), tasks)
            text += over_seeds(dict(found), "masquant W4A6", ("quarot W4A6",), tasks)
        if key == "robustness":
            text += [f"Samples are chosen from {record['pool']}, evenly over the tasks, by the seed, which also draws "
                     "rotations and gradients.", ""]  # fmt: skip
            text += spread(found, tasks)
    return "\n".join(text)


@dataclass
class Bench:
    """What measures rows: one model, its data and machine. What rows share is computed when first needed, once in
    every process."""

    model: Path
    calibration: Path
    pool: Path
    data: Path
    device: str
    threads: int
    processes: int
    baseline: BaselineScores | None = None
    calibrations: dict[tuple[int | None, int], Calibration] = field(default_factory=dict)

    def machine(self) -> str:
        """What a row says of where it ran."""
        gpu = f"{torch.cuda.get_device_name(self.device)}, " if self.device.startswith("cuda") else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        beside = f", {self.processes} rows at a time" if self.processes > 1 else ""
        versions = (
            f"torch {torch.__version__}, transformers {transformers.__version__}, masquant {masquant.__version__}"
        )
        return f"{platform.machine()}, {gpu}{threads}{beside}, {versions}, {time.strftime('%Y-%m-%d')}"

    def calibration_of(self, row: Row) -> Calibration:
        """The samples of a row, with what rows of the same samples share."""
        key = row.samples, row.seed if row.samples else 0
        if key not in self.calibrations:
            if row.samples is None:
                samples = masquant.load_samples(self.calibration)
            else:
                samples = choose_samples(masquant.load_samples(self.pool), row.samples, row.seed)
            self.calibrations[key] = Calibration(samples)
        return self.calibrations[key]

    def measure(self, row: Row) -> dict[str, Any]:
        """One row."""
        torch.set_num_threads(self.threads)
        processor, data = load_processor(self.model), masquant.load_samples(self.data)
        if self.baseline is None:
            source = load_any(self.model).to(self.device)
            self.baseline = score_baseline(source, processor, data, batch_size=8, generate=False)
        calibration = self.calibration_of(row)
        _, _, result = measure(
            self.model, row.recipe, calibration, data, self.baseline,
            processor=processor, batch_size=8, generate=False, device=self.device,
        )  # fmt: skip
        return {**row_of(result), "calibration": len(calibration.samples), "machine": self.machine()}

    def measure_all(self, rows: Mapping[str, Row]) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
        """Rows by name as they are finished, or what stopped them."""
        if self.processes == 1:
            for name, row in rows.items():
                try:
                    yield name, self.measure(row)
                except masquant.MasquantError as error:
                    yield name, error
            if self.baseline is not None:
                self.baseline.close()
            return
        with ProcessPoolExecutor(
            self.processes, multiprocessing.get_context("spawn"), start_worker, (self,)
        ) as executor:
            names = {executor.submit(work, row): name for name, row in rows.items()}
            for future in as_completed(names):
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield names[future], error or future.result()


_bench: Bench | None = None  # of a worker process


def start_worker(bench: Bench) -> None:
    """Make a process ready for `work`."""
    global _bench
    _bench = bench


def work(row: Row) -> dict[str, Any]:
    """`Bench.measure` in a worker process."""
    assert _bench is not None
    return _bench.measure(row)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(k for k in tables() if k != "two cores"))
    parser.add_argument("--rows", default="", help="only those whose table/name this regular expression finds")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--pool", type=Path, help="what robustness chooses from; default the calibration data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="rows at a time")
    parser.add_argument("--threads", type=int, help="of each process; default all cores, shared evenly")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/accuracy.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/accuracy.md")
    arguments = parser.parse_args()
    calibration = arguments.calibration or demo_directory() / "data/calibration"
    bench = Bench(
        arguments.model or obtain_model(on_progress=print),
        calibration,
        arguments.pool or calibration,
        arguments.data or demo_directory() / "data/evaluation",
        arguments.device,
        arguments.threads or max((os.cpu_count() or 1) // arguments.processes, 1),
        arguments.processes,
    )
    evaluation = masquant.load_samples(bench.data)
    record = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": {}}
    record |= {
        "model": arguments.model.name if arguments.model else "omni-135m",
        "calibration": len(masquant.load_samples(bench.calibration)),
        "pool": len(masquant.load_samples(bench.pool)),
        "evaluation": len(evaluation),
        "tasks": {
            task: [s.id for s in evaluation if s.task == task] for task in dict.fromkeys(s.task for s in evaluation)
        },
    }
    all_tables = tables()
    wanted: dict[str, Row] = {}
    for key in arguments.tables.split(","):
        wanted |= {f"{key}/{name}": row for name, row in all_tables[key][1].items()}
    missing = {n: row for n, row in wanted.items() if n not in record["rows"] and re.search(arguments.rows, n)}
    distinct: dict[str, Row] = {}
    for name, row in missing.items():
        if row not in distinct.values():
            distinct[name] = row
    failed = []
    for name, result in bench.measure_all(distinct):
        if isinstance(result, Exception):
            failed.append(f"{name}: {type(result).__name__}: {result}")
            print(failed[-1], flush=True)
            continue
        same = [n for n, row in missing.items() if row == distinct[name]]
        record["rows"] |= dict.fromkeys(same, result)
        write_json(arguments.json, record)
        arguments.markdown.write_text(markdown(record))
        print(time.strftime("%H:%M:%S"), ", ".join(same), flush=True)
    arguments.markdown.write_text(markdown(record))
    if failed:
        raise SystemExit(f"{len(failed)} rows failed")


if __name__ == "__main__":
    main()
