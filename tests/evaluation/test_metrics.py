"""Metrics against brute force and the bootstrap."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masquant.evaluation.metrics import (
    answer_log_probabilities,
    error_rates,
    exact_match,
    normalize,
    ratio_of_sums,
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


def test_answer_positions_are_one_before_the_tokens() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]])
    mask = torch.tensor([[False, False, False, True, True], [False, False, True, True, True]])
    for kept in (5, 4):  # the model may have computed the last logits only
        found, targets, rows = answer_log_probabilities(logits[:, -kept:], mask, ids)
        assert targets.tolist() == [3, 4, 0, 1, 2]
        assert rows.tolist() == [0, 0, 1, 1, 1]
        wanted = torch.stack([logits[0, 2], logits[0, 3], logits[1, 1], logits[1, 2], logits[1, 3]]).log_softmax(1)
        torch.testing.assert_close(found, wanted)


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
    assert error_rates(["Hello, world."], ["hello world"]) == (0.0, 0.0)
    assert exact_match(["Red.", "blue"], ["red", "green"]) == 0.5
    assert error_rates(["", "a b"], ["noise", "a c"])[0] == 0.5
    assert math.isnan(error_rates([""], ["x"])[0]) and math.isnan(exact_match([], []))
