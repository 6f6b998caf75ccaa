# SPDX-License-Identifier: Apache-2.0
"""A float model's scores, kept so that several models can be compared with it while it runs once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..calibration.dataset import Sample
from ..errors import DataError
from .results import Evaluation, ModelDescription, SampleScore
from .scoring import AnswerLogits

Key = tuple[int, tuple[str, ...]]


def baseline_key(samples: Sequence[Sample], batch_size: int) -> Key:
    """What the baseline and the model must have in common, so that both run in the same batches."""
    return batch_size, tuple(sample.id for sample in samples)


def _file(folder: str, batch: int) -> Path:
    return Path(folder) / f"{batch}.safetensors"


def save_logits(folder: str, batch: int, answers: AnswerLogits) -> None:
    """Keep a batch's logits in the model's own precision: what bfloat16 gave is not rounded again, and takes half."""
    save_file({"logits": answers.logits.contiguous(), "targets": answers.targets}, _file(folder, batch))


class BaselineScores:
    """A float model's scores, decoded answers, and logits at the answers' tokens; a context manager.

    The logits are in a temporary folder, which is deleted at the end of the `with` block.

    Attributes:
        samples: scores by sample id.
        key: see `baseline_key`.
    """

    def __init__(self, samples: tuple[SampleScore, ...], folder: tempfile.TemporaryDirectory[str], key: Key) -> None:
        self.samples = {sample.id: sample for sample in samples}
        self._folder, self.key = folder, key

    def __enter__(self) -> BaselineScores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the logits."""
        self._folder.cleanup()

    def logits(self, batch: int, answers: AnswerLogits) -> Tensor:
        """The float model's logits [n, vocabulary] for the batch of `answers`.

        Raises:
            DataError: the scores are closed, or of other tokens or another vocabulary.
        """
        file = _file(self._folder.name, batch)
        if not file.exists():
            raise DataError("the baseline's logits are deleted already; evaluate inside of its `with` block")
        found = load_file(file)
        if not torch.equal(found["targets"], answers.targets) or found["logits"].shape != answers.logits.shape:
            raise DataError(
                "the baseline was scored on other tokens or another vocabulary; model and baseline need the same "
                "processor"
            )
        return found["logits"]

    def evaluation(self, description: ModelDescription) -> Evaluation:
        """The float model's own evaluation."""
        return Evaluation(description, tuple(self.samples.values()))
