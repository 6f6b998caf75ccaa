# SPDX-License-Identifier: Apache-2.0
"""Sound from the microphone, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import MasquantError

RATE = 16_000


class RecordingError(MasquantError):
    """Nothing can be recorded."""


def record(wait: Callable[[], object], max_seconds: float) -> dict[str, Any]:
    """Record until `wait` returns, at most `max_seconds`: {"array": float32 [frames], "sampling_rate": in Hz}.

    Raises:
        RecordingError: sounddevice or PortAudio is missing, there is no microphone, or it gave nothing.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise RecordingError('recording needs sounddevice; pip install "masquant[record]"') from error
    except OSError as error:  # the wheel for Linux comes without the library
        raise RecordingError(f"recording needs PortAudio: {error}; install it (Debian: libportaudio2)") from error
    blocks: list[np.ndarray] = []

    def keep(block: np.ndarray, frames: int, *_: Any) -> None:
        if sum(map(len, blocks)) + frames <= max_seconds * RATE:
            blocks.append(block[:, 0].copy())

    try:
        with sounddevice.InputStream(samplerate=RATE, channels=1, dtype="float32", callback=keep):
            wait()
    except (sounddevice.PortAudioError, ValueError) as error:
        raise RecordingError(f"no microphone can be used: {error}") from error
    if not blocks:
        raise RecordingError("the microphone gave no sound; is it muted, or was it stopped at once?")
    return {"array": np.concatenate(blocks), "sampling_rate": RATE}
