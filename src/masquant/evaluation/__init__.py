# SPDX-License-Identifier: Apache-2.0
"""Measuring what quantization took away."""

from .evaluate import BaselineScores, evaluate, score_baseline
from .results import Evaluation, ModelDescription, SampleScore, comparison_dict
from .table import evaluation_table, examples_table, human_bytes, markdown_table

__all__ = [
    "BaselineScores",
    "Evaluation",
    "ModelDescription",
    "SampleScore",
    "comparison_dict",
    "evaluate",
    "evaluation_table",
    "examples_table",
    "human_bytes",
    "markdown_table",
    "score_baseline",
]
