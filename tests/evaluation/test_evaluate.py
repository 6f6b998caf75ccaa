"""Evaluation end to end on a tiny model: against brute force, against itself, and the JSON that programs read."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.calibration.encoding import SampleEncoder
from masquant.errors import DataError
from masquant.evaluation import (
    comparison_dict,
    evaluate,
    evaluation_table,
    examples_table,
    markdown_table,
    score_baseline,
)
from masquant.recipe import Recipe

FAMILY = "qwen2_5_omni"


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
    assert a == b
    assert all(m["kl"] > 0 for m in a.tasks.values())


def test_json_and_tables(setting: Any) -> None:
    model, processor, samples = setting
    results = {"float": evaluate(model, processor, samples, max_new_tokens=4)}
    results["same"] = evaluate(model, processor, samples, baseline=model, max_new_tokens=4)
    found = json.loads(json.dumps(comparison_dict(results)))
    assert set(found) == {"float", "methods"} and set(found["methods"]) == {"same"}
    entry = found["methods"]["same"]
    assert {"model", "scheme", "num_parameters", "bytes", "tasks"} <= set(entry)
    assert set(entry["bytes"]) == {"base", "compensation", "float"}
    for task, metrics in entry["tasks"].items():
        assert {"num_samples", "nll", "nll_stderr", "delta_nll", "delta_nll_stderr", "kl", "top1_agreement"} <= set(
            metrics
        )
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
