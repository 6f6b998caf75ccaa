# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation, and the JSON that programs read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..errors import DataError, RecipeError
from ..strict import from_plain
from .metrics import error_rates, exact_match, paired_difference, perplexity, ratio_of_sums

# How decoded answers of a task are scored; plain texts have a perplexity instead
ERROR_RATES, EXACT_MATCH = "error rates", "exact match"
ANSWER_METRICS: Mapping[str, str] = {"speech": ERROR_RATES, "asr": ERROR_RATES, "transcription": ERROR_RATES}
OTHER_ANSWERS = EXACT_MATCH


@dataclass(frozen=True)
class ModelDescription:
    """What was evaluated: name, scheme ("float" if unquantized), parameters of the float model, bytes by kind."""

    model: str = ""
    scheme: str = "float"
    num_parameters: int = 0
    bytes: Mapping[str, int] = field(default_factory=lambda: {"base": 0, "compensation": 0, "float": 0})

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelDescription:
        """Of an ordinary float model: where it came from, its parameters, and their bytes."""
        size = model.get_memory_footprint()
        sizes = {"base": 0, "compensation": 0, "float": size}
        return cls(model.name_or_path, "float", model.num_parameters(), sizes)


@dataclass(frozen=True)
class SampleScore:
    """One sample: sums over its answer tokens, and its decoded answer.

    `kl`, `agreed` and `baseline_nll` are None without a baseline, `prediction` without generation.
    """

    id: str
    task: str
    is_text: bool
    nll: float
    tokens: int
    kl: float | None = None
    agreed: int | None = None
    baseline_nll: float | None = None
    prediction: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """All scores of one model."""

    description: ModelDescription
    samples: tuple[SampleScore, ...]
    seconds: float | None = None
    peak_memory: int | None = None

    def with_cost(self, *, seconds: float, peak_memory: int) -> Evaluation:
        """The same with what quantizing took: seconds, and bytes of the process."""
        return dataclasses.replace(self, seconds=seconds, peak_memory=peak_memory)

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Metrics per task, in the order in which tasks first occur."""
        by_task: dict[str, list[SampleScore]] = {}
        for sample in self.samples:
            by_task.setdefault(sample.task, []).append(sample)
        return {task: task_metrics(task, scores) for task, scores in by_task.items()}

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """As JSON; numbers that JSON lacks (NaN, infinite) become null.

        Args:
            samples: also every sample's scores and answers, under `samples`.

        Returns:
            `model`, `scheme`, `num_parameters`, `bytes`, `tasks`; with a cost also `seconds` and `peak_memory`.
        """
        result: dict[str, Any] = {
            "model": self.description.model,
            "scheme": self.description.scheme,
            "num_parameters": self.description.num_parameters,
            "bytes": dict(self.description.bytes),
            "tasks": {task: _finite(metrics) for task, metrics in self.tasks.items()},
        }
        if self.seconds is not None:
            result["seconds"] = self.seconds
            result["peak_memory"] = self.peak_memory
        if samples:
            result["samples"] = [_finite(dataclasses.asdict(sample)) for sample in self.samples]
        return result


def evaluation_of(found: Any) -> Evaluation:
    """The evaluation of what `Evaluation.to_dict(samples=True)` gave.

    Raises:
        DataError: it is none, without samples, or with values of another kind.
    """
    if not isinstance(found, Mapping) or not isinstance(found.get("samples"), list) or not found["samples"]:
        raise DataError("not the result of an evaluation with its samples; evaluate again")
    described = {f.name: found[f.name] for f in dataclasses.fields(ModelDescription) if f.name in found}
    try:
        description = from_plain(ModelDescription, described, "result")
        samples = tuple(_score(sample, f"samples[{i}]") for i, sample in enumerate(found["samples"]))
        cost = from_plain(_Cost, {k: found[k] for k in ("seconds", "peak_memory") if k in found}, "result")
    except RecipeError as error:
        raise DataError(f"not the result of an evaluation: {error}; evaluate again") from error
    if len(described) < len(dataclasses.fields(ModelDescription)) or len({s.id for s in samples}) < len(samples):
        raise DataError("the result of an evaluation lacks its model, or has a sample twice; evaluate again")
    return Evaluation(description, samples, cost.seconds, cost.peak_memory)


@dataclass(frozen=True)
class _Cost:
    seconds: float | None = None
    peak_memory: int | None = None


def _score(found: Any, where: str) -> SampleScore:
    """One sample's score, complete and of finite numbers."""
    required = {f.name for f in dataclasses.fields(SampleScore) if f.default is dataclasses.MISSING}
    if not isinstance(found, Mapping) or not required <= set(found):
        raise RecipeError(f"{where} must have {', '.join(sorted(required))}")
    score = from_plain(SampleScore, found, where)
    numbers = (score.nll, score.kl, score.agreed, score.baseline_nll)
    if score.tokens < 1 or not all(n is None or math.isfinite(n) for n in numbers):
        raise RecipeError(f"{where} has no token, or numbers that are not finite")
    return score


def results_of(found: Any) -> dict[str, Evaluation]:
    """Evaluations by name of what `evaluate --json` or `compare --json` wrote, "float" first.

    Raises:
        DataError: it is neither, or its evaluations are of different samples.
    """
    if not (isinstance(found, Mapping) and isinstance(found.get("methods"), Mapping)):
        result = evaluation_of(found)
        return {result.description.scheme: result}
    results = {name: evaluation_of(e) for name, e in {"float": found.get("float"), **found["methods"]}.items()}
    wanted = [(s.id, s.task) for s in results["float"].samples]
    for name, result in results.items():
        if [(s.id, s.task) for s in result.samples] != wanted:
            raise DataError(f"the results of {name} are of other samples than those of float; compare again")
    return results


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def task_metrics(task: str, scores: Sequence[SampleScore]) -> dict[str, float]:
    """Metrics of one task's samples."""
    tokens = [s.tokens for s in scores]
    nll, nll_stderr = ratio_of_sums([s.nll for s in scores], tokens)
    metrics: dict[str, float] = {"num_samples": len(scores), "nll": nll, "nll_stderr": nll_stderr}
    if all(s.is_text for s in scores):
        metrics["perplexity"] = perplexity(nll)
    decoded = [s for s in scores if s.prediction is not None and s.reference is not None]
    if len(decoded) == len(scores):  # a few decoded examples are no measurement
        references = [s.reference or "" for s in decoded]
        predictions = [s.prediction or "" for s in decoded]
        if ANSWER_METRICS.get(task, OTHER_ANSWERS) == ERROR_RATES:
            metrics["wer"], metrics["cer"] = error_rates(references, predictions)
        else:
            metrics["exact_match"] = exact_match(references, predictions)
    if all(s.baseline_nll is not None for s in scores):
        baseline = [s.baseline_nll or 0.0 for s in scores]
        metrics["delta_nll"], metrics["delta_nll_stderr"] = paired_difference(
            [s.nll for s in scores], baseline, tokens
        )
        metrics["kl"], metrics["kl_stderr"] = ratio_of_sums([s.kl or 0.0 for s in scores], tokens)
        metrics["top1_agreement"], _ = ratio_of_sums([float(s.agreed or 0) for s in scores], tokens)
    return metrics


def comparison_dict(results: Mapping[str, Evaluation], *, samples: bool = False) -> dict[str, Any]:
    """JSON of several methods: the float model and, under `methods`, each method with its change against it.

    Args:
        results: `float` and the methods.
        samples: see `Evaluation.to_dict`.
    """
    return {
        "float": results["float"].to_dict(samples=samples),
        "methods": {name: result.to_dict(samples=samples) for name, result in results.items() if name != "float"},
    }
