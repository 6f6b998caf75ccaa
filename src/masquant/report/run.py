# SPDX-License-Identifier: Apache-2.0
"""The page of a finished run, from what lies in the checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..calibration.dataset import Sample
from ..card import with_loss
from ..checkpoint.store import write_json, write_text
from ..errors import CheckpointError, DataError, MasquantError
from ..evaluation import Evaluation, results_of
from .content import FLOAT, evaluation_record, quantization_content
from .media import embed_examples
from .page import check_target, render_page

RECORD, PAGE, CARD = "report.json", "report.html", "README.md"


def read_results(path: Path) -> dict[str, Evaluation]:
    """Evaluations of a file that `evaluate --json` or `compare --json` wrote.

    Raises:
        DataError: it is no such file.
    """
    return results_of(_read_json(path, DataError, "give what `evaluate --json` or `compare --json` wrote"))


def report_run(
    out: Path,
    *,
    results: Mapping[str, Evaluation] | None = None,
    samples: Sequence[Sample] = (),
    output: Path | None = None,
) -> Path:
    """Write the page of a checkpoint; returns its path.

    The page in the checkpoint's own folder shares report.json with the run, which takes in the evaluation for the
    next page, as the model card does its table; a page elsewhere gets a JSON file of its own.

    Args:
        out: the checkpoint's folder.
        results: evaluations by method, "float" first; default, what report.json has.
        samples: that they were measured on; for the examples' pictures and sounds.
        output: the HTML file; default `report.html` in the checkpoint's folder.

    Raises:
        CheckpointError: the folder has no report.json of a finished run.
        DataError: the results are of other samples, or the page cannot be written there.
    """
    target = output or out / PAGE
    record = _read_json(out / RECORD, CheckpointError, "`masquant quantize` leaves one in its output folder")
    check_target(target)
    if results is not None:
        if len(results) == 1 and FLOAT not in results:
            results = {str(record.get("method")): next(iter(results.values()))}
        record["evaluation"] = evaluation_record(results, samples)
    try:
        content = quantization_content(record)
        media = embed_examples(content, samples)
        page = render_page(content, media)
    except MasquantError:
        raise
    except Exception as error:  # what is missing in a record, or of another kind, fails anywhere
        raise CheckpointError(
            f"{out / RECORD} holds no record of a whole run ({error!r}); copy it again, or quantize again"
        ) from error
    if target == out / PAGE:
        write_json(out / RECORD, record)
        write_text(target, page)
        card = out / CARD
        if card.is_file() and "evaluation" in record:
            text = card.read_text(encoding="utf-8")
            write_text(card, with_loss(text, record["method"], record["evaluation"]))
    else:
        write_json(target.with_suffix(".json"), content)
        write_text(target, page)
    return target


def _read_json(path: Path, kind: type[CheckpointError] | type[DataError], remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read: {error}; {remedy}") from error
    if not isinstance(found, dict):
        raise kind(f"{path} holds no JSON object; {remedy}")
    return found
