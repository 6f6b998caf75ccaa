# SPDX-License-Identifier: Apache-2.0
"""Metrics against brute force and the bootstrap."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masquant.evaluation.metrics import (
    answer_rows,
    error_rates,
    exact_match,
    normalize,
    paired_difference,
    perplexity,
    ratio_of_sums,
    token_agreement,
    token_kl,
    token_nll,
)


def test_nll_and_kl_against_torch() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 30, generator=g) for _ in range(2))
    targets = torch.randint(0, 30, (9,), generator=g)
    p, q = a.log_softmax(1), b.log_softmax(1)
    torch.testing.assert_close(token_nll(p, targets), torch.nn.functional.cross_entropy(a, targets, reduction="none"))
    torch.testing.assert_close(
        token_kl(p, q), torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    )
    assert bool((token_kl(p, p) == 0).all())


def test_kl_and_agreement_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    second = 2 * 0.1 * math.log(0.1 / 0.2) + 0.8 * math.log(0.8 / 0.6)
    assert token_kl(p.log(), q.log()).tolist() == pytest.approx([first, second], rel=1e-5)
    assert token_agreement(p.log(), q.log()).tolist() == [False, True]


def test_kl_of_a_masked_vocabulary_is_finite() -> None:
    masked, free = torch.tensor([[0.0, 1.0, -math.inf]]).log_softmax(1), torch.zeros(1, 3).log_softmax(1)
    p = masked.exp()[0, :2]
    assert float(token_kl(masked, free)[0]) == pytest.approx(float((p * (p.log() - math.log(1 / 3))).sum()), rel=1e-5)
    assert float(token_kl(masked, masked)[0]) == 0
    assert float(token_kl(free, masked)[0]) == math.inf


def test_perplexity() -> None:
    assert perplexity(math.log(35)) == pytest.approx(35)
    assert perplexity(1e4) == math.inf


def test_answer_positions_are_one_before_the_tokens() -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]])
    mask = torch.tensor([[False, False, False, True, True], [False, False, True, True, True]])
    samples, tokens = answer_rows(mask)
    assert ids[samples, tokens].tolist() == [3, 4, 0, 1, 2]
    assert samples.tolist() == [0, 0, 1, 1, 1]
    hidden = torch.arange(10).reshape(2, 5)
    assert hidden[samples, tokens - 1].tolist() == [2, 3, 6, 7, 8]


def test_standard_error_agrees_with_the_bootstrap() -> None:
    generator = random.Random(0)
    tokens = [generator.randint(1, 20) for _ in range(200)]
    values = [t * generator.gauss(1.0, 0.5) for t in tokens]
    mean, error = ratio_of_sums(values, tokens)
    assert mean == pytest.approx(sum(values) / sum(tokens))
    means = []
    for _ in range(2000):
        chosen = generator.choices(range(200), k=200)
        means.append(sum(values[i] for i in chosen) / sum(tokens[i] for i in chosen))
    average = sum(means) / len(means)
    bootstrap = math.sqrt(sum((m - average) ** 2 for m in means) / len(means))
    assert error == pytest.approx(bootstrap, rel=0.1)


def test_paired_error_agrees_with_the_bootstrap_and_is_smaller() -> None:
    generator = random.Random(1)
    tokens = [generator.randint(1, 20) for _ in range(200)]
    baseline = [t * generator.gauss(1.0, 0.5) for t in tokens]
    values = [b + t * generator.gauss(0.1, 0.05) for b, t in zip(baseline, tokens, strict=True)]
    delta, error = paired_difference(values, baseline, tokens)
    assert delta == pytest.approx((sum(values) - sum(baseline)) / sum(tokens))
    deltas = []
    for _ in range(2000):
        chosen = generator.choices(range(200), k=200)
        deltas.append(sum(values[i] - baseline[i] for i in chosen) / sum(tokens[i] for i in chosen))
    average = sum(deltas) / len(deltas)
    assert error == pytest.approx(math.sqrt(sum((d - average) ** 2 for d in deltas) / len(deltas)), rel=0.1)
    assert error < ratio_of_sums(values, tokens)[1] / 5


def test_degenerate_samples() -> None:
    assert ratio_of_sums([3.0], [2.0])[0] == 1.5 and math.isnan(ratio_of_sums([3.0], [2.0])[1])
    assert ratio_of_sums([2.0, 4.0], [1.0, 2.0]) == (2.0, 0.0)
    assert math.isnan(ratio_of_sums([], [])[0])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "bb", "c", "dd"]), min_size=1, max_size=8),
    st.lists(st.sampled_from(["a", "bb", "c"])),
)
def test_word_error_rate_is_edit_distance(reference: list[str], prediction: list[str]) -> None:
    table = [[i + j if i * j == 0 else 0 for j in range(len(prediction) + 1)] for i in range(len(reference) + 1)]
    for i, r in enumerate(reference, 1):
        for j, p in enumerate(prediction, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (r != p))
    wer, _ = error_rates([" ".join(reference)], [" ".join(prediction)])
    assert wer == pytest.approx(table[-1][-1] / len(reference))


def test_normalization() -> None:
    assert normalize("  Héllo,  WORLD! it's\n_fine_ ") == "héllo world it's fine"
    assert normalize("ｆｕｌｌ width") == "full width"
    assert normalize("cole\u0301 — “well-known”") == "colé well known"
    assert exact_match(["Red.", "blue"], ["red", "green"]) == 0.5
    assert math.isnan(exact_match([], []))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don\u2019t say 'yes'", "don't say yes"),
        ("at 10:30, -5 degrees, 3.5 m.", "at 10:30 -5 degrees 3.5 m"),
        ("1-2 (3)", "1 2 3"),
        ("\u22125 €", "-5 €"),
        ("नमस्ते, दुनिया।", "नमस्ते दुनिया"),  # vowel signs are marks, not letters
        ("สวัสดีครับ", "สวัสดีครับ"),
        ("می\u200cروم؟", "میروم"),  # a joiner without width
        ("你好，世界。 再见", "你好世界再见"),
        ("iPhone 很 贵", "iphone 很贵"),
        ("`code` ^", "code"),
    ],
)
def test_normalization_of_other_scripts_and_numbers(text: str, wanted: str) -> None:
    assert normalize(text) == wanted
    assert normalize(wanted) == wanted


def test_answers_that_are_nothing_but_marks_are_compared_as_they_are() -> None:
    assert exact_match(["?", "+", "-5", "!"], ["!", "-", "5", " ! "]) == 0.25


def test_error_rates_are_over_the_whole_set() -> None:
    assert error_rates(["Hello, world."], ["hello world"]) == (0.0, 0.0)
    wer, cer = error_rates(["a b c d", "ef"], ["a b c", "eg"])  # one word missing, one wrong, of 5
    assert wer == pytest.approx(2 / 5)
    assert cer == pytest.approx((2 + 1) / (7 + 2))
    assert error_rates(["one"], ["one two three four"])[0] == 3.0


def test_characters_of_scripts_without_spaces_are_words() -> None:
    wer, cer = error_rates(["今天天气很好"], ["今天，天气不好。"])
    assert wer == pytest.approx(1 / 6) == pytest.approx(cer)


def test_what_is_said_where_the_reference_is_empty_is_inserted() -> None:
    assert error_rates(["", "a b"], ["noise", "a c"]) == (pytest.approx(2 / 2), pytest.approx(6 / 3))
    assert error_rates(["...", "a b"], ["", "a b"]) == (0.0, 0.0)
    assert all(math.isnan(rate) for rate in error_rates([""], ["x"]) + error_rates([], []))
