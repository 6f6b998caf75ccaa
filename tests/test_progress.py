"""What people see while work goes on: rate, time left, bytes."""

import io

from rich.console import Console

from masquant.progress import NoProgress, RichProgress


def test_rate_time_left_and_status_are_drawn() -> None:
    progress, shown = RichProgress(), io.StringIO()
    progress.console = Console(file=shown, force_terminal=True, width=160)
    done = []
    for item in progress.track(range(3), "quantizing", 3, "block"):
        done.append(item)
        progress.status(f"{item} -> 1 MiB")
    assert done == [0, 1, 2]
    text = shown.getvalue()
    assert all(part in text for part in ("quantizing", "3/3", "block/s", "2 -> 1 MiB", "0:00:00"))


def test_no_progress_says_nothing() -> None:
    progress = NoProgress()
    assert list(progress.track("ab", "x", 2, "y")) == ["a", "b"]
    progress.status("x")
    progress.note("y")
