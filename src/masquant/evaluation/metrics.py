# SPDX-License-Identifier: Apache-2.0
"""What is measured, as pure functions: likelihoods, distances between distributions, error rates, standard errors."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

import jiwer
import torch
from torch import Tensor


def token_nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [tokens] of targets [tokens] under log-probabilities [tokens, vocabulary]."""
    return -log_probabilities.gather(1, targets[:, None])[:, 0]


def token_kl(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) [tokens] of log-probabilities [tokens, vocabulary]: sum_v p_v (log p_v - log q_v)."""
    return (reference.exp() * (reference - other)).sum(1)


def ratio_of_sums(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Mean per token over samples, sum(v_i) / sum(t_i), and its standard error.

    The samples are the independent units, so the error is that of a ratio estimator, linearised:
    sqrt(n / (n - 1) * sum_i (v_i - r t_i)^2) / sum_i t_i. It is NaN for a single sample.

    Args:
        values: per sample, the sum over its tokens.
        weights: per sample, its number of tokens.
    """
    total = sum(weights)
    if not total:
        return math.nan, math.nan
    ratio = sum(values) / total
    n = len(values)
    if n < 2:
        return ratio, math.nan
    squares = sum((v - ratio * t) ** 2 for v, t in zip(values, weights, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / total


def normalize(text: str) -> str:
    """Text for error rates and exact match: compatibility form, lower case, no punctuation, single spaces."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.sub(r"[^\w\s']|_", " ", folded).split())


def error_rates(references: Sequence[str], predictions: Sequence[str]) -> tuple[float, float]:
    """Word and character error rate over all samples: edits / reference length. Empty references are left out.

    Returns:
        NaN for both without a reference.
    """
    pairs = [(normalize(r), normalize(p)) for r, p in zip(references, predictions, strict=True)]
    pairs = [(r, p) for r, p in pairs if r]
    if not pairs:
        return math.nan, math.nan
    wanted, got = [r for r, _ in pairs], [p for _, p in pairs]
    return float(jiwer.wer(wanted, got)), float(jiwer.cer(wanted, got))


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of predictions that equal their reference after `normalize`."""
    hits = [normalize(r) == normalize(p) for r, p in zip(references, predictions, strict=True)]
    return sum(hits) / len(hits) if hits else math.nan


def answer_log_probabilities(logits: Tensor, answer_mask: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distributions at the answer's tokens.

    Args:
        logits: [batch, kept, vocabulary], for the last `kept` positions.
        answer_mask: bool [batch, tokens].
        input_ids: [batch, tokens].

    Returns:
        Float32 log-probabilities [n, vocabulary] of the positions before each answer token, the tokens [n], and each
        one's sample in the batch [n].
    """
    kept = logits.shape[1]
    mask = answer_mask[:, -kept + 1 :] if kept > 1 else answer_mask[:, :0]
    rows = logits[:, :-1][mask].float()
    return torch.log_softmax(rows, dim=-1), input_ids[:, -kept + 1 :][mask], mask.nonzero()[:, 0]
