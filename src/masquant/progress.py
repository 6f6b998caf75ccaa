# SPDX-License-Identifier: Apache-2.0
"""How long work reports: an abstract progress, silent by default, drawn by the command line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class AbstractProgress(ABC):
    """Receives what a long-running call does."""

    @abstractmethod
    def track(self, items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
        """Yield `items`, showing rate and time left."""

    @abstractmethod
    def status(self, text: str) -> None:
        """Say how far the tracked work is, beside its rate and time left."""

    @abstractmethod
    def note(self, message: str) -> None:
        """Say something that a user should know."""


class NoProgress(AbstractProgress):
    """Says nothing."""

    def track(self, items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
        yield from items

    def status(self, text: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass


class RichProgress(AbstractProgress):
    """Bars with rate and time left on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self._update: Callable[[str], None] = lambda _: None

    def track(self, items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{speed:.2f} {unit}/s" if speed else f"- {unit}/s", style="cyan")

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", style="dim"),
        )
        with Progress(*columns, console=self.console, transient=not self.console.is_terminal) as bar:
            task = bar.add_task(description, total=total, status="")
            self._update = lambda text: bar.update(task, status=text)
            for item in items:
                yield item
                bar.advance(task)

    def status(self, text: str) -> None:
        self._update(text)

    def note(self, message: str) -> None:
        self.console.print(message, style="yellow", highlight=False)
