# SPDX-License-Identifier: Apache-2.0
"""What a page shows, as JSON: `report.json` beside it holds every number.

    {"title": str, "quantizations": {method: record}, "main": method, "evaluation"?: {...}, "ranges"?: [...]}

A record is what `QuantizationReport.to_dict` says. `evaluation` has `models` (name: what `Evaluation.to_dict` says
with samples), `media` (task: kinds of media), `modalities` (one entry per mix of media, tasks pooled) and `examples`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..calibration.dataset import Sample
from ..errors import DataError
from ..evaluation import Evaluation, SampleScore, paired_difference, task_metrics

FLOAT = "float"
TEXT_ONLY = "text"
_KINDS = {"image": "vision", "video": "vision", "audio": "audio"}


def quantization_content(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of one finished run, from its report.json.

    Raises:
        DataError: it was written by a version that measured no ranges.
    """
    try:
        groups = record["blocks"][0]["groups"]
        complete = "ranges" in groups[0] and "versions" in record
    except (KeyError, IndexError, TypeError):
        complete = False
    if not complete:
        raise DataError("report.json has no activation ranges: an older version wrote it; quantize again to see them")
    content: dict[str, Any] = {
        "title": record["model"] or "model",
        "quantizations": {record["method"]: {k: v for k, v in record.items() if k != "evaluation"}},
        "main": record["method"],
    }
    if "evaluation" in record:
        content["evaluation"] = record["evaluation"]
    return content


def comparison_content(
    quantizations: Mapping[str, Mapping[str, Any]], results: Mapping[str, Evaluation], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Of several methods; the last one is shown in detail.

    Args:
        quantizations: per method, what `QuantizationReport.to_dict` says.
        results: "float" and the methods.
        samples: that they were measured on.
    """
    main = list(quantizations)[-1]
    return {
        "title": quantizations[main]["model"] or "model",
        "quantizations": {name: dict(record) for name, record in quantizations.items()},
        "main": main,
        "evaluation": evaluation_record(results, samples),
    }


def ranges_content(model: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a model that was not quantized, from its activation ranges per block and group."""
    return {"title": model, "quantizations": {}, "main": None, "ranges": [dict(row) for row in rows]}


def modality_label(media: Sequence[str]) -> str:
    """What samples with these kinds of media measure: "text", "vision", "audio", "vision + audio"."""
    return " + ".join(dict.fromkeys(_KINDS[kind] for kind in media)) or TEXT_ONLY


def evaluation_record(results: Mapping[str, Evaluation], samples: Sequence[Sample]) -> dict[str, Any]:
    """What a page says of evaluations, with loss per modality and differences between methods, paired by sample.

    Args:
        results: by name, "float" first if it was measured; the last one is compared with the others.
        samples: that they were measured on, with their media.

    Raises:
        DataError: a result has a sample that is not among `samples`.
    """
    by_id = {sample.id: sample for sample in samples}
    for name, result in results.items():
        missing = [score.id for score in result.samples if score.id not in by_id]
        if missing:
            raise DataError(
                f"the results of {name} have a sample {missing[0]!r} that the data lacks; give the same data"
            )
    scores = next(iter(results.values())).samples
    media: dict[str, list[str]] = {}
    for score in scores:
        known = media.setdefault(score.task, [])
        known += [kind for kind in by_id[score.id].media if kind not in known]
    labels = {score.id: modality_label(by_id[score.id].media) for score in scores}
    order = sorted(set(labels.values()), key=lambda label: (label != TEXT_ONLY, "+" in label, label != "vision"))
    return {
        "models": {name: result.to_dict(samples=True) for name, result in results.items()},
        "media": media,
        "modalities": [_modality(label, results, labels) for label in order],
        "examples": [_example(by_id[i], results) for i in example_ids(results, per_task=2)],
    }


def _modality(label: str, results: Mapping[str, Evaluation], labels: Mapping[str, str]) -> dict[str, Any]:
    """One mix of media: metrics of every model over all its samples, and the last model against the other methods."""
    own = {name: [s for s in result.samples if labels[s.id] == label] for name, result in results.items()}
    last = list(own)[-1]
    first = next(iter(own.values()))
    entry: dict[str, Any] = {
        "modality": label,
        "tasks": list(dict.fromkeys(s.task for s in first)),
        "num_samples": len(first),
        "models": {name: _likelihoods(scores) for name, scores in own.items()},
        "against": {},
    }
    for name, scores in own.items():
        if name not in (last, FLOAT):
            tokens = [s.tokens for s in scores]
            found = paired_difference([s.nll for s in own[last]], [s.nll for s in scores], tokens)
            entry["against"][name] = dict(zip(("difference", "stderr"), map(_finite, found), strict=True))
    return entry


def _likelihoods(scores: Sequence[SampleScore]) -> dict[str, float | None]:
    """Metrics that can be pooled over tasks: those of likelihoods."""
    pooled = task_metrics("", [dataclasses.replace(s, prediction=None) for s in scores])
    return {key: _finite(value) for key, value in pooled.items()}


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def example_ids(
    results: Mapping[str, Evaluation], *, per_task: int = 1, tasks: Collection[str] | None = None
) -> list[str]:
    """Samples on which the models' answers differ most, of every task with decoded answers or of `tasks` alone; rather
    some that the first model gets right."""
    chosen: list[str] = []
    first = next(iter(results.values()))
    by_task: dict[str, list[SampleScore]] = {}
    for sample in first.samples:
        if sample.prediction is not None and (tasks is None or sample.task in tasks):
            by_task.setdefault(sample.task, []).append(sample)
    answers: dict[str, set[str | None]] = {}
    for result in results.values():
        for sample in result.samples:
            answers.setdefault(sample.id, set()).add(sample.prediction)
    for samples in by_task.values():

        def rank(sample: SampleScore) -> tuple[bool, int]:
            right = (sample.prediction or "").lower() == (sample.reference or "").lower()
            return right, len(answers[sample.id])

        chosen += [s.id for s in sorted(samples, key=rank, reverse=True)[:per_task]]
    return chosen


def _example(sample: Sample, results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Prompt, reference and each model's answer."""
    answers = {name: next(s.prediction for s in r.samples if s.id == sample.id) for name, r in results.items()}
    return {
        "id": sample.id,
        "task": sample.task,
        "prompt": sample.prompt,
        "reference": sample.answer,
        "answers": {name: answer for name, answer in answers.items() if answer is not None},
    }
