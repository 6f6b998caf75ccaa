# SPDX-License-Identifier: Apache-2.0
"""Evaluation end to end on a tiny model: against brute force, against itself, and the JSON that programs read."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.calibration.encoding import SampleEncoder
from masquant.errors import DataError
from masquant.evaluation import (
    Evaluation,
    ModelDescription,
    SampleScore,
    comparison_dict,
    evaluate,
    evaluation_table,
    examples_table,
    markdown_table,
    score_baseline,
)
from masquant.evaluation.metrics import answer_rows
from masquant.progress import AbstractProgress
from masquant.recipe import Recipe

FAMILY = "qwen2_5_omni"
T = TypeVar("T")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Any]]:
    samples = masquant.load_samples(tiny_samples(FAMILY, tmp_path_factory.mktemp("media"), count=12))
    return tiny_model(FAMILY), tiny_processor(FAMILY), samples


def test_nll_against_cross_entropy_sample_by_sample(setting: Any) -> None:
    model, processor, samples = setting
    result = evaluate(model, processor, samples, batch_size=4, generate=False)
    encoder = SampleEncoder(processor)
    for score, sample in zip(result.samples, samples, strict=True):
        batch = encoder.encode([sample])
        with torch.no_grad():
            logits = model(**batch.inputs).logits[0]
        wanted = sum(
            -float(logits[t - 1].log_softmax(0)[batch.inputs["input_ids"][0, t]])
            for t in batch.answer_mask[0].nonzero()[:, 0].tolist()
        )
        assert score.id == sample.id
        assert score.tokens == int(batch.answer_mask.sum())
        assert score.nll == pytest.approx(wanted, rel=1e-4)


def test_a_model_against_itself_has_no_distance(setting: Any) -> None:
    model, processor, samples = setting
    result = evaluate(model, processor, samples, baseline=model, generate=False)
    for metrics in result.tasks.values():
        assert metrics["delta_nll"] == 0 and metrics["kl"] == pytest.approx(0, abs=1e-6)
        assert metrics["top1_agreement"] == 1


def test_scores_and_model_as_baseline_agree(setting: Any) -> None:
    model, processor, samples = setting
    quantized = tiny_model(FAMILY)
    masquant.quantize(quantized, processor, samples, recipe=Recipe.preset("rtn", "W4A8", 32))
    with score_baseline(model, processor, samples, generate=False) as scores:
        a = evaluate(quantized, processor, samples, baseline=scores, generate=False)
        folder = Path(scores._folder.name)
        assert folder.exists()
        with pytest.raises(DataError, match="scored on other samples"):
            evaluate(quantized, processor, samples[:3], baseline=scores, generate=False)
    assert not folder.exists()
    b = evaluate(quantized, processor, samples, baseline=model, generate=False)
    assert a.samples == b.samples
    assert all(m["kl"] > 0 for m in a.tasks.values())


def test_json_and_tables(setting: Any) -> None:
    model, processor, samples = setting
    results = {"float": evaluate(model, processor, samples, max_new_tokens=4)}
    results["same"] = evaluate(model, processor, samples, baseline=model, max_new_tokens=4)
    found = json.loads(json.dumps(comparison_dict(results)))
    assert set(found) == {"float", "methods"} and set(found["methods"]) == {"same"}
    entry = found["methods"]["same"]
    assert set(entry) == {"model", "scheme", "num_parameters", "bytes", "tasks"}
    assert set(entry["bytes"]) == {"base", "compensation", "float"}
    for task, metrics in entry["tasks"].items():
        common = {"num_samples", "nll", "nll_stderr", "delta_nll", "delta_nll_stderr", "kl", "kl_stderr"}
        assert common | {"top1_agreement"} <= set(metrics)
        assert ("wer" in metrics and "cer" in metrics) == (task == "speech")
        assert ("perplexity" in metrics) == (task == "text")
        assert ("exact_match" in metrics) == (task not in ("speech", "text"))
    assert entry["tasks"]["text"]["perplexity"] == pytest.approx(math.exp(entry["tasks"]["text"]["nll"]))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(evaluation_table(results))
    ids = [s.id for s in results["float"].samples if s.prediction is not None][:2]
    console.print(examples_table(results, ids))
    text = console.export_text()
    assert "+0.000" in text and "±0.000" in text and "WER" in text and "reference" in text
    assert (
        markdown_table(results).splitlines()[1].count("---") == markdown_table(results).splitlines()[0].count("|") - 1
    )


def test_a_few_answers_are_decoded_but_not_measured(setting: Any) -> None:
    model, processor, samples = setting
    chosen = [s.id for s in samples if s.text is None][:2]
    result = evaluate(model, processor, samples, generate=chosen, max_new_tokens=3)
    assert {s.id for s in result.samples if s.prediction is not None} == set(chosen)
    assert not any("wer" in m or "exact_match" in m for m in result.tasks.values())


def test_tasks_can_be_chosen(setting: Any) -> None:
    model, processor, samples = setting
    assert set(evaluate(model, processor, samples, tasks=["text"], generate=False).tasks) == {"text"}
    with pytest.raises(DataError, match="no samples of task smell"):
        evaluate(model, processor, samples, tasks=["smell"])


def test_likelihoods_that_are_not_finite_are_refused(setting: Any) -> None:
    _, processor, samples = setting
    model = tiny_model(FAMILY)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(DataError, match="likelihood of the answer is nan"):
        evaluate(model, processor, samples, generate=False)


def test_json_has_no_numbers_that_json_lacks(setting: Any) -> None:
    score = SampleScore("a", "speech", False, 1.0, 2, kl=math.inf, agreed=0, baseline_nll=0.5)
    found = Evaluation(ModelDescription(), (score,)).to_dict(samples=True)
    assert found["tasks"]["speech"]["kl"] is None and found["tasks"]["speech"]["nll_stderr"] is None
    assert found["samples"][0]["kl"] is None and found["samples"][0]["nll"] == 1.0
    json.dumps(found, allow_nan=False)


def test_records_tell_what_was_answered(setting: Any) -> None:
    model, processor, samples = setting
    found = evaluate(model, processor, samples, max_new_tokens=3).to_dict(samples=True)
    assert [s["id"] for s in found["samples"]] == [s.id for s in samples]
    for record, sample in zip(found["samples"], samples, strict=True):
        assert {"id", "task", "nll", "tokens", "prediction", "reference"} <= set(record)
        assert (record["prediction"] is None) == (sample.text is not None)
        assert record["reference"] == sample.answer
    assert found["num_parameters"] == model.num_parameters() and found["scheme"] == "float"
    assert found["bytes"] == {"base": 0, "compensation": 0, "float": model.get_memory_footprint()}


def test_a_baseline_in_bfloat16_is_kept_without_loss_in_half_the_space(setting: Any) -> None:
    _, processor, samples = setting
    model, other = tiny_model(FAMILY).bfloat16(), tiny_model(FAMILY, seed=1).bfloat16()
    with score_baseline(model, processor, samples, batch_size=4, generate=False) as scores:
        size = sum(f.stat().st_size for f in Path(scores._folder.name).iterdir())
        tokens = sum(s.tokens for s in scores.samples.values())
        vocabulary = model.config.get_text_config().vocab_size
        assert size < 2 * vocabulary * tokens + 8 * tokens + 400 * len(samples)
        itself = evaluate(model, processor, samples, baseline=scores, batch_size=4, generate=False)
        found = evaluate(other, processor, samples, baseline=scores, batch_size=4, generate=False)
    assert all(s.kl == 0 and s.nll == s.baseline_nll and s.agreed == s.tokens for s in itself.samples)
    for score, sample in zip(found.samples, samples, strict=True):
        batch = SampleEncoder(processor).encode([sample])
        rows, positions = answer_rows(batch.answer_mask)
        with torch.no_grad():
            p, q = (m(**batch.inputs).logits[rows, positions - 1].float().log_softmax(1) for m in (model, other))
        wanted = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        assert score.kl == pytest.approx(wanted, rel=0.1)  # bfloat16 rounds differently in a batch
        assert score.baseline_nll == scores.samples[sample.id].nll


def test_a_baseline_that_does_not_fit_is_refused(setting: Any) -> None:
    model, processor, samples = setting
    with score_baseline(model, processor, samples, generate=False) as scores:
        with pytest.raises(DataError, match="another batch size"):
            evaluate(model, processor, samples, baseline=scores, batch_size=2, generate=False)
        other = [dataclasses.replace(s, text=s.text + " It was." if s.text else None) for s in samples]
        with pytest.raises(DataError, match="scored on other tokens"):
            evaluate(model, processor, other, baseline=scores, generate=False)
        smaller = tiny_model(FAMILY)
        smaller.set_output_embeddings(torch.nn.Linear(64, 280))
        with pytest.raises(DataError, match="another vocabulary"):
            evaluate(smaller, processor, samples, baseline=scores, generate=False)
    with pytest.raises(DataError, match="deleted already"):
        evaluate(model, processor, samples, baseline=scores, generate=False)


def test_a_failed_baseline_leaves_no_files(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor, samples = setting
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model(FAMILY)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(DataError, match="likelihood of the answer"):
        score_baseline(model, processor, samples, generate=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"tasks": []}, "no samples to evaluate on"),
    ],
)
def test_arguments_are_checked(setting: Any, options: dict[str, Any], message: str) -> None:
    model, processor, samples = setting
    with pytest.raises(DataError, match=message):
        evaluate(model, processor, samples, **options)
    with pytest.raises(DataError, match="occurs 2 times"):
        evaluate(model, processor, [samples[0], samples[0]])


class Recorder(AbstractProgress):
    def __init__(self) -> None:
        self.bars: list[tuple[str, int, str, int]] = []

    def track(self, items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
        count = 0
        for item in items:
            count += 1
            yield item
        self.bars.append((description, total, unit, count))

    def status(self, text: str) -> None:
        pass

    def note(self, message: str) -> None:
        raise AssertionError(message)


def test_progress_counts_batches(setting: Any) -> None:
    model, processor, samples = setting
    seen = Recorder()
    evaluate(model, processor, samples, baseline=model, batch_size=4, max_new_tokens=2, progress=seen)
    assert [bar[0] for bar in seen.bars] == ["scoring answers", "scoring answers", "decoding answers"]
    assert all(total == count and unit == "batch" for _, total, unit, count in seen.bars)
