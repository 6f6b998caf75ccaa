# SPDX-License-Identifier: Apache-2.0
"""Run a model on samples: likelihood of the answers, decoded answers, and the distance from a float model.

The answers' likelihood is teacher-forced. Against a baseline every token is compared with the same token of the float
model: its log-probabilities at the answers are computed once, kept in a temporary folder, and deleted afterwards.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.dataset import Sample
from ..calibration.encoding import EncodedBatch, SampleEncoder
from ..errors import DataError
from ..progress import AbstractProgress, NoProgress
from .metrics import answer_log_probabilities, token_kl, token_nll
from .results import Evaluation, ModelDescription, SampleScore


class BaselineScores:
    """A float model's scores and log-probabilities, for comparing other models with it; a context manager."""

    def __init__(self, samples: tuple[SampleScore, ...], folder: tempfile.TemporaryDirectory[str], key: Any) -> None:
        self.samples = {sample.id: sample for sample in samples}
        self._folder, self.key = folder, key

    def __enter__(self) -> BaselineScores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def log_probabilities(self, batch: int) -> Tensor:
        """Float32 [tokens, vocabulary] of one batch's answer tokens."""
        return load_file(_batch_file(self._folder.name, batch))["log_probabilities"]

    def evaluation(self, description: ModelDescription) -> Evaluation:
        """The float model's own evaluation."""
        return Evaluation(description, tuple(self.samples.values()))


def _batch_file(folder: str, batch: int) -> Path:
    return Path(folder) / f"{batch}.safetensors"


def _select(samples: Sequence[Sample], tasks: Sequence[str] | None) -> list[Sample]:
    if tasks is None:
        return list(samples)
    unknown = sorted(set(tasks) - {s.task for s in samples})
    if unknown:
        raise DataError(
            f"no samples of task {', '.join(unknown)}; tasks: {', '.join(sorted({s.task for s in samples}))}"
        )
    return [s for s in samples if s.task in tasks]


def _key(samples: Sequence[Sample], batch_size: int) -> tuple[int, tuple[str, ...]]:
    """What the baseline and the model must have in common."""
    return batch_size, tuple(s.id for s in samples)


@torch.no_grad()
def _forward(model: PreTrainedModel, batch: EncodedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at the answers, the answers' tokens, and each one's sample; see `answer_log_probabilities`."""
    arguments: dict[str, Any] = {k: v.to(model.device) for k, v in batch.inputs.items()}
    answers = batch.answer_mask.any(0).nonzero()
    if "logits_to_keep" in inspect.signature(model.forward).parameters and len(answers):
        arguments["logits_to_keep"] = batch.answer_mask.shape[1] - int(answers[0]) + 1
    logits = model(**arguments, use_cache=False).logits
    log_probabilities, targets, rows = answer_log_probabilities(
        logits, batch.answer_mask.to(logits.device), batch.inputs["input_ids"].to(logits.device)
    )
    return log_probabilities.cpu(), targets.cpu(), rows.cpu()


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    encoder: SampleEncoder,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: AbstractProgress,
    only: Collection[str] | None = None,
) -> dict[str, str]:
    """Greedy answers by sample id, for all samples that are conversations (or those of them in `only`)."""
    asked = [s for s in samples if s.text is None and (only is None or s.id in only)]
    answers: dict[str, str] = {}
    batches = encoder.batches(asked, batch_size, with_answer=False)
    for batch in progress.track(batches, "decoding answers", -(-len(asked) // batch_size), "batch"):
        inputs = {k: v.to(model.device) for k, v in batch.inputs.items()}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers.update({s.id: text.strip() for s, text in zip(batch.samples, texts, strict=True)})
    return answers


def _score_batch(
    batch: EncodedBatch, scored: tuple[Tensor, Tensor, Tensor], reference: Tensor | None
) -> list[dict[str, Any]]:
    """Sums over each sample's answer tokens."""
    log_probabilities, targets, rows = scored
    nll = token_nll(log_probabilities, targets).double()
    kl = agreed = None
    if reference is not None:
        kl = token_kl(reference, log_probabilities).double()
        agreed = reference.argmax(1) == log_probabilities.argmax(1)
    scores = []
    for i, sample in enumerate(batch.samples):
        own = rows == i
        total = float(nll[own].sum())
        if not math.isfinite(total):
            raise DataError(f"sample {sample.id}: the model's likelihood of the answer is {total}")
        entry: dict[str, Any] = {"nll": total, "tokens": int(own.sum())}
        if kl is not None and agreed is not None:
            entry.update(kl=float(kl[own].sum()), agreed=int(agreed[own].sum()))
        scores.append(entry)
    return scores


def _run(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    baseline: BaselineScores | None,
    folder: str | None,
    batch_size: int,
    generate: bool | Collection[str],
    max_new_tokens: int,
    progress: AbstractProgress,
) -> tuple[SampleScore, ...]:
    """Scores of all samples in their own order; log-probabilities go to `folder` if given."""
    encoder = SampleEncoder(processor)
    model.eval()
    found: dict[str, dict[str, Any]] = {}
    total = -(-len(samples) // batch_size)
    for number, batch in enumerate(
        progress.track(encoder.batches(samples, batch_size), "scoring answers", total, "batch")
    ):
        scored = _forward(model, batch)
        if folder is not None:
            save_file({"log_probabilities": scored[0].contiguous()}, _batch_file(folder, number))
        reference = None if baseline is None else baseline.log_probabilities(number)
        for sample, entry in zip(batch.samples, _score_batch(batch, scored, reference), strict=True):
            if baseline is not None:
                entry["baseline_nll"] = baseline.samples[sample.id].nll
            found[sample.id] = entry
    answers = {}
    if generate:
        answers = generate_answers(
            model,
            encoder,
            samples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
            only=None if isinstance(generate, bool) else generate,
        )
    return tuple(
        SampleScore(s.id, s.task, s.text is not None, prediction=answers.get(s.id), reference=s.answer, **found[s.id])
        for s in samples
    )


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

    The log-probabilities take 4 bytes x vocabulary x answer tokens in the system's temporary folder.
    """
    folder = tempfile.TemporaryDirectory(prefix="masquant-baseline-")
    try:
        chosen = _select(samples, tasks)
        scores = _run(
            model, processor, chosen, None, folder.name, batch_size, generate, max_new_tokens, progress or NoProgress()
        )
    except BaseException:
        folder.cleanup()
        raise
    return BaselineScores(scores, folder, _key(chosen, batch_size))


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
        description: what to say of the model in the result.

    Raises:
        DataError: unknown task, a likelihood that is not finite, or baseline scores of other samples.
    """
    progress = progress or NoProgress()
    if isinstance(baseline, PreTrainedModel):
        with score_baseline(
            baseline, processor, samples, tasks=tasks, batch_size=batch_size, generate=False, progress=progress
        ) as scores:
            return evaluate(
                model,
                processor,
                samples,
                baseline=scores,
                tasks=tasks,
                batch_size=batch_size,
                generate=generate,
                max_new_tokens=max_new_tokens,
                progress=progress,
                description=description,
            )
    chosen = _select(samples, tasks)
    if baseline is not None and baseline.key != _key(chosen, batch_size):
        raise DataError("the baseline was scored on other samples, or with another batch size; score it on the same")
    scored = _run(model, processor, chosen, baseline, None, batch_size, generate, max_new_tokens, progress)
    return Evaluation(description or ModelDescription(num_parameters=model.num_parameters()), scored)
