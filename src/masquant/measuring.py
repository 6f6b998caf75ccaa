# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of this process, by stage."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .progress import AbstractProgress

T = TypeVar("T")


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak_memory() -> None:
    """Start `peak_memory` anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Stages:
    """What the stages of some work took.

    Attributes:
        seconds: by stage, in the order in which they began.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of a stage; what other stages take inside of it is theirs."""
        start, before = time.monotonic(), self.total
        try:
            yield
        finally:
            others = self.total - before
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start - others

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


class Clock(AbstractProgress):
    """Counts the seconds of every item of tracked work: taking it and what is done with it.

    Attributes:
        seconds: by description, in the order of the items.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def track(self, items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
        taken = self.seconds.setdefault(description, [])
        start = time.monotonic()
        for item in items:
            yield item
            taken.append(time.monotonic() - start)
            start = time.monotonic()

    def status(self, text: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass
