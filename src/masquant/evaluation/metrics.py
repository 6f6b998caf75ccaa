# SPDX-License-Identifier: Apache-2.0
"""What is measured, as pure functions: likelihoods, distances between distributions, error rates, standard errors."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import jiwer
from torch import Tensor

# Characters of scripts that are written without spaces and in which one character is about a word: kana and Han
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IDEOGRAPH = re.compile(f"([{_IDEOGRAPHS}])")
_SPACE_BETWEEN_IDEOGRAPHS = re.compile(f"(?<=[{_IDEOGRAPHS}]) +(?=[{_IDEOGRAPHS}])")

# Marks that belong to a word or number: don't, 3.5, 10:30, -5
_INNER_MARK = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])|(?<=\d)[.,:](?=\d)|(?<!\w)-(?=\d)")
_SAME_MARK = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u2212": "-"})


def token_nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every token, -log p(target).

    Args:
        log_probabilities: [tokens, vocabulary].
        targets: integer [tokens].

    Returns:
        [tokens], in nats.
    """
    return -log_probabilities.gather(1, targets[:, None])[:, 0]


def token_kl(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of every token, sum_v p_v (log p_v - log q_v), where 0 log 0 is 0.

    Args:
        reference, other: log-probabilities [tokens, vocabulary]: log p and log q. A model that masks parts of its
            vocabulary has -inf there.

    Returns:
        [tokens], in nats; infinite where q excludes what p allows.
    """
    terms = reference - other
    terms *= reference.exp()
    return terms.masked_fill_(reference.isneginf(), 0.0).sum(1)


def token_agreement(reference: Tensor, other: Tensor) -> Tensor:
    """Whether both distributions [tokens, vocabulary] have their largest value at the same place; bool [tokens]."""
    return reference.argmax(1) == other.argmax(1)


def perplexity(nll: float) -> float:
    """exp(nll) of a mean nll per token; infinite where that overflows."""
    return math.exp(nll) if nll < 709.0 else math.inf


def ratio_of_sums(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Mean per token over samples, r = sum(v_i) / sum(t_i), and its standard error.

    The samples are the independent units, not their tokens, so r is a ratio estimator. Linearised (Taylor), its error
    is sqrt(n / (n - 1) * sum_i (v_i - r t_i)^2) / sum_i t_i.

    Args:
        values: v_i, per sample the sum over its tokens.
        weights: t_i, per sample its number of tokens.

    Returns:
        r, NaN without tokens; its standard error, NaN for a single sample.
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


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], weights: Sequence[float]
) -> tuple[float, float]:
    """Change per token against a baseline on the same samples, sum(d_i) / sum(t_i) with d_i = v_i - b_i, and its
    standard error.

    The error is that of `ratio_of_sums` of the d_i. What makes a sample hard for both models cancels in d_i, so it is
    far smaller than the errors of the two means would suggest.

    Args:
        values, baseline: v_i and b_i, per sample the sums over its tokens.
        weights: t_i, per sample its number of tokens.
    """
    return ratio_of_sums([v - b for v, b in zip(values, baseline, strict=True)], weights)


def normalize(text: str) -> str:
    """Text as it is compared by error rates and exact match, in any language.

    Unicode compatibility form (NFKC), lower case, one kind of apostrophe; punctuation (categories P and Sk) becomes a
    space, except inside of words and numbers (don't, 3.5, 10:30, -5); format characters are dropped; spaces are folded
    and removed between Han and kana characters. Letters keep their marks, symbols such as + and $ stay.
    """
    folded = unicodedata.normalize("NFKC", text.translate(_SAME_MARK)).lower()
    kept = {match.start() for match in _INNER_MARK.finditer(folded)}

    def clean(position: int, character: str) -> str:
        category = unicodedata.category(character)
        if category == "Cf":
            return ""
        return " " if position not in kept and (category[0] == "P" or category == "Sk") else character

    spaced = "".join(clean(position, character) for position, character in enumerate(folded))
    return _SPACE_BETWEEN_IDEOGRAPHS.sub("", " ".join(spaced.split()))


def error_rates(references: Sequence[str], predictions: Sequence[str]) -> tuple[float, float]:
    """Word and character error rate over all samples: (substitutions + deletions + insertions) / reference length.

    Both are taken after `normalize`, over the whole set and not averaged over samples. A Han or kana character counts
    as a word. All that is said where the reference is empty counts as inserted.

    Returns:
        NaN for both if no reference has a word.
    """
    wanted, got = [normalize(r) for r in references], [normalize(p) for p in predictions]
    return (
        _error_rate(
            [_words(t) for t in wanted], [_words(t) for t in got], jiwer.process_words, lambda t: len(t.split())
        ),
        _error_rate(wanted, got, jiwer.process_characters, len),
    )


def _words(text: str) -> str:
    return " ".join(_IDEOGRAPH.sub(r" \1 ", text).split())


def _error_rate(
    references: Sequence[str], predictions: Sequence[str], align: Callable[..., Any], length: Callable[[str], int]
) -> float:
    """Edits / length of the references. jiwer 3 refuses empty references: they are left to us."""
    total = sum(length(r) for r in references)
    if not total:
        return math.nan
    pairs = [(r, p) for r, p in zip(references, predictions, strict=True) if r]
    inserted = sum(length(p) for r, p in zip(references, predictions, strict=True) if not r)
    found = align([r for r, _ in pairs], [p for _, p in pairs])
    return float(found.substitutions + found.deletions + found.insertions + inserted) / total


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of predictions that equal their reference after `normalize`; NaN of none.

    An answer of nothing but punctuation is compared as it is.
    """

    def comparable(text: str) -> str:
        return normalize(text) or text.strip()

    hits = [comparable(r) == comparable(p) for r, p in zip(references, predictions, strict=True)]
    return sum(hits) / len(hits) if hits else math.nan


def answer_rows(answer_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the distributions of the answer's tokens are: one position before each of them.

    Args:
        answer_mask: bool [batch, tokens]; the first token of a sample has nothing before it and is never an answer.

    Returns:
        Integers [n], each one's sample in the batch, and [n], its token: `input_ids[sample, token]` is predicted from
        the hidden state of `[sample, token - 1]`. Ordered by sample, then token.
    """
    sample, token = answer_mask[:, 1:].nonzero(as_tuple=True)
    return sample, token + 1
