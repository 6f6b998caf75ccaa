# SPDX-License-Identifier: Apache-2.0
"""One page about a run: pictures, tables and decoded examples, in a single file that needs no network."""

from .content import comparison_content, evaluation_record, example_ids, quantization_content, ranges_content
from .media import embed_examples
from .page import check_target, render_page, write_report
from .run import read_results, report_run

__all__ = [
    "check_target",
    "comparison_content",
    "embed_examples",
    "evaluation_record",
    "example_ids",
    "quantization_content",
    "ranges_content",
    "read_results",
    "render_page",
    "report_run",
    "write_report",
]
