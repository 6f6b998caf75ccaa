# SPDX-License-Identifier: Apache-2.0
"""Measuring what quantization took away."""

from .baseline import BaselineScores
from .evaluate import evaluate, score_baseline
from .metrics import paired_difference
from .results import Evaluation, ModelDescription, SampleScore, comparison_dict, results_of, task_metrics
from .table import EvaluationTable, evaluation_table, examples_table, human_bytes, markdown_table

__all__ = [
    "BaselineScores",
    "Evaluation",
    "EvaluationTable",
    "ModelDescription",
    "SampleScore",
    "comparison_dict",
    "evaluate",
    "evaluation_table",
    "examples_table",
    "human_bytes",
    "markdown_table",
    "paired_difference",
    "results_of",
    "score_baseline",
    "task_metrics",
]
