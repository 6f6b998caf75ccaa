# SPDX-License-Identifier: Apache-2.0
"""`masquant demo`: from nothing to a compared, packed checkpoint of a small model that reads, sees and hears."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel

from .api import save
from .calibration.dataset import load_samples
from .checkpoint.store import check_output, write_json
from .compare import compare
from .demo import MODEL_NAME, demo_directory, obtain_model
from .evaluation import Evaluation, comparison_dict, evaluation_table, examples_table
from .measuring import peak_memory
from .pipeline import QuantizationReport
from .progress import AbstractProgress
from .report import evaluation_record, example_ids, report_run

METHODS = ("rtn", "smoothquant", "gptq", "masquant")
EXAMPLE_TASKS = ("speech", "picture", "spoken-question")
QUICK_CALIBRATION, QUICK_EVALUATION = 24, 30


def run_demo(
    output: Path,
    scheme: str,
    *,
    quick: bool,
    overwrite: bool,
    json_file: Path | None,
    progress: AbstractProgress,
) -> None:
    """Obtain the model, compare four methods with the float model, leave masquant's checkpoint at `output` with a page
    about it."""
    start = time.monotonic()
    check_output(output, overwrite=overwrite, resume=False)
    model = obtain_model(on_progress=progress.note)
    data = demo_directory() / "data"
    calibration = load_samples(data / "calibration", limit=QUICK_CALIBRATION if quick else None)
    evaluation = load_samples(data / "evaluation", limit=QUICK_EVALUATION if quick else None)

    def keep(
        method: str, quantized: PreTrainedModel, processor: Any, report: QuantizationReport, result: Evaluation
    ) -> None:
        if method == "masquant":
            named = replace(report, model=MODEL_NAME)
            measured = evaluation_record({method: result}, evaluation)
            save(quantized, processor, output, named, source=model, evaluation=measured)

    examples = [next(s.id for s in evaluation if s.task == task) for task in EXAMPLE_TASKS]
    results = compare(
        model,
        METHODS,
        calibration,
        evaluation,
        scheme=scheme,
        group_size=64 if scheme.startswith("W4") else None,
        generate=examples if quick else True,
        progress=progress,
        keep=keep,
        effort="fast" if quick else "default",
    )
    if json_file:
        write_json(json_file, comparison_dict(results, samples=True))
    page = report_run(output, results=results, samples=evaluation)
    console = Console()
    console.print(evaluation_table(results, title=f"omni-135m, {scheme}: loss per task"))
    console.print(examples_table(results, example_ids(results, tasks=EXAMPLE_TASKS)))
    console.print(
        f"checkpoint: {output}   page: {page}\n({len(calibration)} calibration, {len(evaluation)} evaluation samples, "
        f"{time.monotonic() - start:.0f} s, peak memory {peak_memory() / 2**30:.1f} GiB; {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__})",
        highlight=False,
    )
