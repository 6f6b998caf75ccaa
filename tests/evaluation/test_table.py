# SPDX-License-Identifier: Apache-2.0
"""Results as people see them: whole numbers at every width, and nothing that a model says is obeyed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from masquant.errors import DataError
from masquant.evaluation import (
    Evaluation,
    ModelDescription,
    SampleScore,
    evaluation_table,
    examples_table,
    human_bytes,
    markdown_table,
)

TASKS = ("speech", "picture", "shapes", "spoken-question", "text")
MANY = (*TASKS, "mmmu_val", "textvqa_val", "librispeech_test_clean", "omni_bench")
METHODS = ("rtn", "smoothquant", "gptq", "masquant")


def result(tasks: Sequence[str], method: str | None, said: str = "black") -> Evaluation:
    """Two samples a task, 4 tokens in all; against a float model of nll 1 per token if it is a method."""
    of_baseline = {"kl": 0.5, "agreed": 1, "baseline_nll": 2.0} if method else {}
    samples = []
    for task in tasks:
        answers: dict[str, Any] = {} if task == "text" else {"prediction": said, "reference": "black"}
        samples += [
            SampleScore(f"{task}-{i}", task, task == "text", 2.5 + 0.25 * i, 2, **of_baseline, **answers)
            for i in range(2)
        ]
    sizes = {"base": 53 * 2**20, "compensation": 2**20, "float": 110 * 2**20} if method else {"float": 310 * 2**20}
    found = Evaluation(ModelDescription("m", "W4A8" if method else "float", 1, sizes), tuple(samples))
    return found.with_cost(seconds=25.4, peak_memory=3 * 2**30) if method else found


def results(tasks: Sequence[str] = TASKS) -> dict[str, Evaluation]:
    return {"float": result(tasks, None), **{m: result(tasks, m) for m in METHODS}}


def printed(renderable: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text().splitlines()


@pytest.mark.parametrize("tasks", [TASKS, MANY])
@pytest.mark.parametrize("width", [100, 80, 60])
def test_nothing_is_cut_at_any_width(tasks: Sequence[str], width: int) -> None:
    lines = printed(evaluation_table(results(tasks), title="omni, W4A8"), width)
    text = "\n".join(lines)
    assert max(len(line) for line in lines) <= width
    assert "…" not in text
    assert text.count("+0.312") == len(tasks) * len(METHODS)  # (2.5 + 2.75 - 2 * 2) / 4
    assert text.count("±0.062") >= len(tasks) * len(METHODS)
    for wanted in (*METHODS, "WER", "EM", "ppl", "54.0 MiB", "164.0 MiB", "310.0 MiB", "25 s", "3.00 GiB"):
        assert wanted in text


def test_five_tasks_fit_one_table_of_100_columns() -> None:
    text = "\n".join(printed(evaluation_table(results()), 100))
    assert text.count("method") == 1
    assert "\n".join(printed(evaluation_table(results(MANY)), 100)).count("method") == 2


def test_a_single_sample_has_no_error_and_the_float_model_no_change() -> None:
    one = result(["speech"], None)
    one = Evaluation(one.description, one.samples[:1])
    text = "\n".join(printed(evaluation_table({"float": one}), 100))
    assert "1.250" in text and "+" not in text and "±0" not in text and "nan" not in text


def test_markdown_has_a_cell_for_everything() -> None:
    lines = markdown_table({**results(), "a|b": result(TASKS, "a|b")}).splitlines()
    assert len(lines) == 2 + 1 + len(METHODS) + 1
    assert lines[0].startswith("| method | speech, WER | picture, EM |")
    assert lines[3].startswith("| rtn | +0.312 ±0.062, 0 % |")
    assert all(line.replace("\\|", "").count("|") == lines[1].count("|") for line in lines)
    assert lines[-1].startswith("| a\\|b |")


def test_what_a_model_says_is_shown_and_not_obeyed() -> None:
    said = "[bold]a[/] \x1b[31mred [/nothing]"
    ids = ["speech-0", "picture-1"]
    text = "\n".join(
        printed(examples_table({"float": result(TASKS, None), "[x]": result(TASKS, "x", said)}, ids), 100)
    )
    assert "[bold]a[/] \ufffd[31mred [/nothing]" in text and "\x1b" not in text and "[x]" in text
    assert "reference" in text and all(i in text for i in ids)
    with pytest.raises(DataError, match="evaluation of float has no sample smell-1"):
        examples_table({"float": result(TASKS, None)}, ["smell-1"])


def test_bytes_are_in_binary_units() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]
