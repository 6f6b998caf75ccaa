# SPDX-License-Identifier: Apache-2.0
"""Several methods on one model: quantize with each, measure each against the float model on the same samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from .api import load_processor, resident_bytes
from .calibration.dataset import Sample
from .evaluation import BaselineScores, Evaluation, ModelDescription, evaluate, score_baseline
from .integrations.loading import load_any
from .measuring import peak_memory, reset_peak_memory
from .modality import Modality
from .pipeline import Calibration, QuantizationReport, quantize
from .progress import AbstractProgress, NoProgress
from .recipe import EncoderScheme, Recipe


def describe(model: PreTrainedModel, name: str, scheme: str, num_parameters: int) -> ModelDescription:
    """What an evaluation says of a model: its bytes in memory by kind."""
    sizes = resident_bytes(model)
    return ModelDescription(
        model=name,
        scheme=scheme,
        num_parameters=num_parameters,
        bytes={
            "base": sizes["packed"] + sizes["smooth_scale"],
            "compensation": sizes["compensation"],
            "float": sizes["float"] + sizes["lm_head"] + sizes["encoders"],
        },
    )


def measure(
    model: str | Path,
    recipe: Recipe,
    calibration: Calibration,
    data: Sequence[Sample],
    baseline: BaselineScores,
    *,
    processor: Any,
    batch_size: int = 16,
    generate: bool | Collection[str] = True,
    progress: AbstractProgress | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> tuple[PreTrainedModel, QuantizationReport, Evaluation]:
    """Quantize a model by one recipe and evaluate it.

    Args:
        model: folder or hub id of the float model.
        recipe: what to do.
        calibration: samples, and what recipes share of them.
        data: samples to measure on.
        baseline: the float model's scores on them.
        processor: the model's.
        batch_size, generate, progress, dtype: see `compare`.
        device: where the model is, is quantized and runs.

    Returns:
        The quantized model, the report, and the evaluation with its cost.
    """
    reset_peak_memory()
    quantized = load_any(model, dtype=dtype).to(device)
    num_parameters = quantized.num_parameters()
    report = quantize(quantized, processor, calibration, recipe=recipe, progress=progress)
    result = evaluate(
        quantized,
        processor,
        data,
        baseline=baseline,
        batch_size=batch_size,
        generate=generate,
        progress=progress,
        description=describe(quantized, str(model), recipe.scheme.name, num_parameters),
    )
    return quantized, report, result.with_cost(seconds=report.seconds, peak_memory=peak_memory())


def compare(
    model: str | Path,
    methods: Sequence[str] | Mapping[str, Recipe],
    calibration: Sequence[Sample],
    data: Sequence[Sample],
    *,
    scheme: str = "W4A8",
    group_size: int | Literal["channel"] | None = None,
    batch_size: int = 16,
    generate: bool | Collection[str] = True,
    progress: AbstractProgress | None = None,
    effort: Literal["default", "fast", "refined"] = "default",
    keep: Callable[[str, PreTrainedModel, Any, QuantizationReport, Evaluation], None] | None = None,
    dtype: str = "auto",
    encoders: Mapping[Modality, EncoderScheme] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate the float model and each method.

    Args:
        model: folder or hub id of the float model.
        methods: names of recipes, or recipes by a name of their own.
        calibration: samples for every method.
        data: samples to measure on.
        scheme, group_size: for every method given by name.
        batch_size: of the evaluation.
        generate: also decode answers (error rates, exact match), all or those of these sample ids.
        progress: receives what happens.
        effort: see `Recipe.with_effort`.
        keep: called with every method's name, model, processor, report and evaluation, for example to save it.
        dtype: to load the model in.
        encoders: of every method's recipe; default each recipe's own.

    Returns:
        "float" first, then the methods in order.
    """
    progress = progress or NoProgress()
    if isinstance(methods, Mapping):
        recipes = dict(methods)
    else:
        recipes = {method: Recipe.preset(method, scheme, group_size) for method in methods}
    recipes = {method: recipe.with_effort(effort) for method, recipe in recipes.items()}
    if encoders is not None:
        recipes = {method: replace(recipe, encoders=encoders) for method, recipe in recipes.items()}
    processor = load_processor(model)
    name = str(model)
    source = load_any(model, dtype=dtype)
    results: dict[str, Evaluation] = {}
    shared = Calibration(calibration)
    with score_baseline(
        source, processor, data, batch_size=batch_size, generate=generate, progress=progress
    ) as baseline:
        results["float"] = baseline.evaluation(describe(source, name, "float", source.num_parameters()))
        del source
        for method, recipe in recipes.items():
            gc.collect()
            start = time.monotonic()
            quantized, report, results[method] = measure(
                model,
                recipe,
                shared,
                data,
                baseline,
                processor=processor,
                batch_size=batch_size,
                generate=generate,
                progress=progress,
                dtype=dtype,
            )
            progress.note(f"{method}: quantized in {report.seconds:.0f} s, {time.monotonic() - start:.0f} s in all")
            if keep is not None:
                keep(method, quantized, processor, report, results[method])
            del quantized
    return results
