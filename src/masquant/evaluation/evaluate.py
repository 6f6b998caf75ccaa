# SPDX-License-Identifier: Apache-2.0
"""Run a model on samples: likelihood of the answers, decoded answers, and the distance from a float model.

The answers' likelihood is teacher-forced. Against a baseline every token is compared with the same token of the float
model: its logits at the answers are computed once, kept in a temporary folder, and deleted afterwards. Everything is
deterministic, and a model meets the same batches as its baseline.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..cache import KvCache, cache_arguments
from ..calibration.dataset import Sample
from ..calibration.encoding import SampleEncoder, group_batches
from ..errors import DataError
from ..progress import AbstractProgress, NoProgress
from .baseline import BaselineScores, baseline_key, save_logits
from .results import Evaluation, ModelDescription, SampleScore
from .scoring import answer_logits, decode_answers, evaluating, sample_scores, token_scores


@dataclass(frozen=True)
class _Run:
    """How samples are run: the arguments of `evaluate` that a model and its baseline share."""

    processor: Any
    samples: Sequence[Sample]
    batch_size: int
    generate: bool | Collection[str]
    max_new_tokens: int
    progress: AbstractProgress
    kv_cache: KvCache = "float"

    def scores(
        self, model: PreTrainedModel, *, baseline: BaselineScores | None = None, folder: str | None = None
    ) -> tuple[SampleScore, ...]:
        """Scores of all samples, in their order; the answers' logits go to `folder` if given."""
        encoder = SampleEncoder(self.processor)
        with evaluating(model):
            found = self._likelihoods(model, encoder, baseline, folder)
            answers = self._answers(model, encoder)
        return tuple(
            SampleScore(
                s.id, s.task, s.text is not None, prediction=answers.get(s.id), reference=s.answer, **found[s.id]
            )
            for s in self.samples
        )

    def _likelihoods(
        self, model: PreTrainedModel, encoder: SampleEncoder, baseline: BaselineScores | None, folder: str | None
    ) -> dict[str, dict[str, Any]]:
        """Sums over the answer tokens by sample id."""
        found: dict[str, dict[str, Any]] = {}
        total, batches = group_batches(encoder, self.samples, self.batch_size)
        for number, batch in enumerate(self.progress.track(batches, "scoring answers", total, "batch")):
            scored = answer_logits(model, batch, self.kv_cache)
            if folder is not None:
                save_logits(folder, number, scored)
            reference = None if baseline is None else baseline.logits(number, scored)
            entries = sample_scores(batch, scored, token_scores(scored, reference))
            for sample, entry in zip(batch.samples, entries, strict=True):
                if baseline is not None:
                    entry["baseline_nll"] = baseline.samples[sample.id].nll
                found[sample.id] = entry
        return found

    def _answers(self, model: PreTrainedModel, encoder: SampleEncoder) -> dict[str, str]:
        """Decoded answers by sample id."""
        asked = [s for s in self.samples if s.text is None]
        if not isinstance(self.generate, bool):
            asked = [s for s in asked if s.id in self.generate]
        if not self.generate or not asked:
            return {}
        answers: dict[str, str] = {}
        total, batches = group_batches(encoder, asked, self.batch_size, with_answer=False)
        for batch in self.progress.track(batches, "decoding answers", total, "batch"):
            answers.update(decode_answers(model, encoder, batch, self.max_new_tokens, self.kv_cache))
        return answers


def _plan(
    processor: Any,
    samples: Sequence[Sample],
    tasks: Sequence[str] | None,
    batch_size: int,
    generate: bool | Collection[str],
    max_new_tokens: int,
    progress: AbstractProgress | None,
) -> _Run:
    """The run that the arguments of `evaluate` ask for, checked."""
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    known = sorted({s.task for s in samples})
    unknown = sorted(set(tasks or ()) - set(known))
    if unknown:
        raise DataError(f"no samples of task {', '.join(unknown)}; tasks: {', '.join(known)}")
    chosen = [s for s in samples if tasks is None or s.task in tasks]
    if not chosen:
        raise DataError("no samples to evaluate on: at least one is needed")
    sample_id, count = Counter(s.id for s in chosen).most_common(1)[0]
    if count > 1:
        raise DataError(f"sample id {sample_id!r} occurs {count} times; ids tell samples apart, make them unique")
    return _Run(processor, chosen, batch_size, generate, max_new_tokens, progress or NoProgress())


def _score_baseline(model: PreTrainedModel, run: _Run) -> BaselineScores:
    folder = tempfile.TemporaryDirectory(prefix="masquant-baseline-")
    try:
        scores = run.scores(model, folder=folder.name)
    except BaseException:
        folder.cleanup()
        raise
    return BaselineScores(scores, folder, baseline_key(run.samples, run.batch_size))


def score_baseline(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int = 16,
    generate: bool | Collection[str] = True,
    max_new_tokens: int = 48,
    progress: AbstractProgress | None = None,
) -> BaselineScores:
    """Score the float model once, to compare several models with it. Close the result (or use `with`).

    Its logits take vocabulary x answer tokens x 2 bytes (for a bfloat16 or float16 model, otherwise 4) in the system's
    temporary folder.

    Args:
        model: the float model.
        processor, samples, tasks, batch_size, generate, max_new_tokens, progress: as for `evaluate`.

    Raises:
        DataError: as for `evaluate`.
    """
    return _score_baseline(model, _plan(processor, samples, tasks, batch_size, generate, max_new_tokens, progress))


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    *,
    baseline: PreTrainedModel | BaselineScores | None = None,
    tasks: Sequence[str] | None = None,
    batch_size: int = 16,
    generate: bool | Collection[str] = True,
    max_new_tokens: int = 48,
    progress: AbstractProgress | None = None,
    description: ModelDescription | None = None,
    kv_cache: KvCache = "float",
) -> Evaluation:
    """Evaluate a model.

    Args:
        model: float or quantized.
        processor: its processor.
        samples: conversations with answers, and texts.
        baseline: the float model, or its scores on the same samples and batch size.
        tasks: only these.
        batch_size: samples that run together.
        generate: also decode answers greedily, for error rates and exact match; or only those of these sample ids.
        max_new_tokens: longest decoded answer.
        progress: receives what happens.
        description: what to say of the model in the result; by default, what holds for an ordinary float model.
        kv_cache: of the model, not of the baseline: its own, or `Int8Cache`.

    Raises:
        DataError: no samples, an unknown task, a number out of bounds, an answer whose likelihood is not finite, or
            baseline scores of other samples.
        ModelError: the model's logits cannot be matched with the answers' tokens, or it cannot use the cache.
    """
    plain = _plan(processor, samples, tasks, batch_size, generate, max_new_tokens, progress)
    cache_arguments(model, kv_cache)  # refuses before anything runs
    run = replace(plain, kv_cache=kv_cache)
    described = description or ModelDescription.of(model)
    if isinstance(baseline, PreTrainedModel):
        with _score_baseline(baseline, replace(plain, generate=False)) as scores:
            return Evaluation(described, run.scores(model, baseline=scores))
    if baseline is not None and baseline.key != baseline_key(run.samples, batch_size):
        raise DataError("the baseline was scored on other samples, or with another batch size; score it on the same")
    return Evaluation(described, run.scores(model, baseline=baseline))
