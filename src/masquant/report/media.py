# SPDX-License-Identifier: Apache-2.0
"""Pictures and sounds of samples inside a page: made small, in forms that every browser shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from ..calibration.dataset import Sample
from ..calibration.media import load_audio, load_image, load_video

PICTURE_EDGE = 480  # pixels
STRIP_FRAMES = 4
SAMPLING_RATE = 16_000
SECONDS = 30.0


def embed_examples(content: Mapping[str, Any], samples: Iterable[Sample]) -> dict[str, dict[str, str]]:
    """Media of a page's examples as data URIs: by sample id, `image`, `video` (a strip of frames), `audio`.

    Args:
        content: of the page.
        samples: among which the examples are.

    Raises:
        DataError: a file is missing or broken.
    """
    wanted = {example["id"] for example in content.get("evaluation", {}).get("examples", ())}
    return {sample.id: _media_of(sample) for sample in samples if sample.id in wanted and sample.media}


def _media_of(sample: Sample) -> dict[str, str]:
    where, found = f"sample {sample.id}", {}
    if sample.image is not None:
        found["image"] = _jpeg(load_image(sample.image, where))
    if sample.video is not None:
        found["video"] = _jpeg(_strip(load_video(sample.video, where)))
    if sample.audio is not None:
        found["audio"] = _flac(load_audio(sample.audio, SAMPLING_RATE, where))
    return found


def _strip(frames: list[Image.Image]) -> Image.Image:
    """A few frames side by side."""
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames)))]
    width, height = chosen[0].size
    strip = Image.new("RGB", (width * len(chosen), height))
    for i, frame in enumerate(chosen):
        strip.paste(frame, (i * width, 0))
    return strip


def _jpeg(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((PICTURE_EDGE, PICTURE_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _data_uri("image/jpeg", buffer)


def _flac(wave: np.ndarray) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave[: int(SECONDS * SAMPLING_RATE)].clip(-1, 1), SAMPLING_RATE, "PCM_16", format="FLAC")
    return _data_uri("audio/flac", buffer)


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
