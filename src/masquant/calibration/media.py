# SPDX-License-Identifier: Apache-2.0
"""Pictures and sounds of samples, bounded in size before they are decoded, in the form that processors take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from ..errors import DataError

MAX_PIXELS = 64_000_000
MAX_EDGE = 16_384
MIN_EDGE = 2
MAX_SECONDS = 300.0
MAX_FRAMES = 64


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if min(size) < MIN_EDGE:
        raise DataError(
            f"{where}: an image of {width} x {height} pixels is too small, at least {MIN_EDGE} x {MIN_EDGE}"
        )
    if max(size) > MAX_EDGE or width * height > MAX_PIXELS:
        raise DataError(
            f"{where}: an image of {width} x {height} pixels is too large, at most {MAX_EDGE} on an edge and "
            f"{MAX_PIXELS // 10**6} million in all; scale it down"
        )


def open_image(source: Path | Image.Image, where: str) -> Image.Image:
    """An image file's header, checked against the bounds; nothing is decoded yet.

    Raises:
        DataError: missing, no image, or out of bounds.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, where)
        return source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bounds below are stricter
            image = Image.open(source)
    except FileNotFoundError as error:
        raise DataError(f"{where}: image file {source} does not exist") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {source}: {error}; at most {MAX_PIXELS // 10**6} million pixels") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{where}: {source} is no readable image: {error}") from error
    try:
        _check_size(image.size, f"{where}: {source}")
    except DataError:
        image.close()
        raise
    return image


def check_image(source: Path | Image.Image, where: str) -> None:
    """Check an image's header."""
    image = open_image(source, where)
    if image is not source:
        image.close()


def load_image(source: Path | Image.Image, where: str) -> Image.Image:
    """RGB picture, upright.

    Raises:
        DataError: missing, broken or out of bounds.
    """
    image = open_image(source, where)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: {source} is a broken image: {error}") from error
    finally:
        if image is not source:
            image.close()


def load_video(source: Path | Sequence[Any], where: str) -> list[Image.Image]:
    """Frames of a video given as a list of pictures or as an animated GIF or WebP.

    Raises:
        DataError: another kind of file, or broken, or too long.
    """
    if not isinstance(source, Path):
        frames = [load_image(Path(f) if isinstance(f, str) else f, where) for f in source]
    else:
        if source.suffix.lower() not in (".gif", ".webp"):
            raise DataError(f"{where}: {source}: a video is a list of pictures or an animated GIF or WebP")
        with open_image(source, where) as image:
            if getattr(image, "n_frames", 1) > MAX_FRAMES:
                raise DataError(f"{where}: {source} has more than {MAX_FRAMES} frames")
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise DataError(f"{where}: a video of {len(frames)} frames; 1 to {MAX_FRAMES} are supported")
    return frames


def check_audio(source: Path | Mapping[str, Any], where: str) -> None:
    """Check a sound file's header, or an array's form.

    Raises:
        DataError: missing, no sound file, or out of bounds.
    """
    if isinstance(source, Mapping):
        if "array" not in source or "sampling_rate" not in source:
            raise DataError(f"{where}: audio in memory needs 'array' and 'sampling_rate', got {', '.join(source)}")
        seconds = len(source["array"]) / source["sampling_rate"]
    else:
        if not source.exists():
            raise DataError(f"{where}: audio file {source} does not exist")
        try:
            info = soundfile.info(str(source))
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise DataError(f"{where}: {source} is no readable sound file: {error}") from error
        seconds = info.frames / info.samplerate
    if not 0 < seconds <= MAX_SECONDS:
        raise DataError(
            f"{where}: audio of {seconds:.1f} s; more than 0 and at most {MAX_SECONDS:.0f} s are supported"
        )


def load_audio(source: Path | Mapping[str, Any], sampling_rate: int, where: str) -> np.ndarray:
    """Mono sound, float32 [frames], resampled to `sampling_rate`.

    Raises:
        DataError: missing, broken, out of bounds, or not finite.
    """
    check_audio(source, where)
    if isinstance(source, Mapping):
        data, rate = np.asarray(source["array"], dtype=np.float32), int(source["sampling_rate"])
    else:
        try:
            data, rate = soundfile.read(str(source), dtype="float32", always_2d=False)
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise DataError(f"{where}: {source} is a broken sound file: {error}") from error
    mono = data.mean(axis=1) if data.ndim == 2 else data
    if not mono.size or not np.isfinite(mono).all():
        raise DataError(f"{where}: the audio is empty or holds values that are not finite")
    return resample(torch.from_numpy(np.ascontiguousarray(mono)), rate, sampling_rate).numpy()


def resample(wave: Tensor, rate: int, new_rate: int, zeros: int = 32, rolloff: float = 0.95) -> Tensor:
    """Band-limited resampling by a windowed sinc.

    y(n / new_rate) = sum_k x_k h(n / new_rate - k / rate), h the ideal low-pass of rolloff * min(rates) / 2 under a
    squared-cosine window of `zeros` zero crossings on each side. One filter per output phase.

    Args:
        wave: [frames].
        rate, new_rate: in Hz.
        zeros: half width of the filter in zero crossings.
        rolloff: share of the band that is kept.

    Returns:
        [ceil(frames * new_rate / rate)].
    """
    if rate == new_rate:
        return wave
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    band = min(old, new) * rolloff
    width = math.ceil(zeros * old / band)
    taps = torch.arange(-width, width + old, dtype=torch.float64) / old
    phases = torch.arange(new, dtype=torch.float64) / new
    t = ((taps[None] - phases[:, None]) * band).clamp(-zeros, zeros)
    kernel = torch.sinc(t) * torch.cos(t * math.pi / (2 * zeros)).square() * (band / old)
    padded = torch.nn.functional.pad(wave, (width, width + old))
    frames = torch.nn.functional.conv1d(padded[None, None], kernel.to(wave.dtype)[:, None], stride=old)[0]
    return frames.t().flatten()[: math.ceil(len(wave) * new / old)]
