# SPDX-License-Identifier: Apache-2.0
"""Pictures and sounds of samples, bounded in size before they are decoded, in the form that processors take."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from ..errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that starts another program, as EPS does
MAX_PIXELS = 64_000_000
MAX_EDGE = 16_384
MIN_EDGE = 2
MAX_FRAMES = 64
MAX_VIDEO_PIXELS = 4 * MAX_PIXELS  # of all frames together
MAX_SECONDS = 300.0
MIN_SECONDS = 0.1  # less gives no audio token at all in some models
MIN_RATE, MAX_RATE = 1_000, 768_000

_IMAGE_LIMITS = f"at most {MAX_EDGE:,} pixels on an edge and {MAX_PIXELS // 10**6} million in all; scale it down"


@contextmanager
def _reading(what: str, fault: str) -> Iterator[None]:
    """Turn what a decoder raises into a DataError. Broken files make decoders raise nearly any exception."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # size (bounded here more strictly), EXIF (ignored)
            yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what} does not exist") from error
    except Exception as error:
        raise DataError(f"{what} {fault}: {error}; replace it, or leave it out") from error


def _check_size(size: tuple[int, int], what: str) -> None:
    width, height = size
    if min(size) < MIN_EDGE:
        raise DataError(f"{what} of {width} x {height} pixels is too small, at least {MIN_EDGE} x {MIN_EDGE}")
    if max(size) > MAX_EDGE or width * height > MAX_PIXELS:
        raise DataError(f"{what} of {width} x {height} pixels is too large, {_IMAGE_LIMITS}")


def _image_name(source: Any, where: str) -> str:
    return f"{where}: image file {source}" if isinstance(source, Path) else f"{where}: the picture"


def _file(source: Path | bytes) -> Any:
    """What decoders read: a path, or a stream over a file's content."""
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _header(source: Path | bytes) -> Image.Image:
    """An image file, not decoded yet."""
    try:
        return Image.open(_file(source), formats=FORMATS)
    except Image.DecompressionBombError:  # far beyond the bounds here: read its size again, to say it
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(_file(source), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def open_image(source: Path | bytes | Image.Image, where: str) -> Image.Image:
    """An image with its header checked against the bounds; a file is not decoded yet.

    Args:
        source: file, a file's content, or picture in memory.
        where: what to call the sample in an error.

    Raises:
        DataError: missing, no image, or out of bounds.
    """
    what = _image_name(source, where)
    if isinstance(source, Image.Image):
        _check_size(source.size, what)
        return source
    if not isinstance(source, Path | bytes):
        raise DataError(f"{where}: an image must be a path or a PIL picture, got {type(source).__name__}")
    with _reading(what, f"is no readable image ({', '.join(FORMATS)})"):
        image = _header(source)
    try:
        _check_size(image.size, what)
    except DataError:
        image.close()
        raise
    return image


def check_image(source: Path | bytes | Image.Image, where: str) -> tuple[int, int]:
    """Check an image's header: (width, height).

    Raises:
        DataError: as `open_image`.
    """
    image = open_image(source, where)
    if image is not source:
        image.close()
    return image.size


def _rgb(image: Image.Image, what: str) -> Image.Image:
    """Decoded, upright, RGB. Transparency is dropped, as transformers' image processors do."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DataError(f"{what} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
    upright = ImageOps.exif_transpose(image)
    return upright.convert("RGBA").convert("RGB") if "transparency" in upright.info else upright.convert("RGB")


def load_image(source: Path | bytes | Image.Image, where: str) -> Image.Image:
    """RGB picture, turned upright by its EXIF orientation.

    Args:
        source: file, a file's content, or picture in memory.
        where: what to call the sample in an error.

    Raises:
        DataError: missing, broken, out of bounds, or of more than 8 bits per channel.
    """
    image, what = open_image(source, where), _image_name(source, where)
    try:
        with _reading(what, "is a broken image"):
            return _rgb(image, what)
    finally:
        if image is not source:
            image.close()


def check_video(source: Path | Sequence[Any], where: str) -> int:
    """Check the headers of a video: number of frames.

    Raises:
        DataError: another kind of source, missing, no image, or out of bounds.
    """
    if isinstance(source, Path):
        if source.suffix.lower() not in (".gif", ".webp"):
            raise DataError(
                f"{where}: {source}: a video is a list of pictures, or one animated GIF or WebP; other files are not "
                "read, extract their frames first"
            )
        with open_image(source, where) as image, _reading(_image_name(source, where), "is a broken image"):
            count = int(getattr(image, "n_frames", 1))
            pixels = count * image.width * image.height
    elif isinstance(source, Sequence) and not isinstance(source, str | bytes):
        count = len(source)
        pixels = sum(width * height for width, height in (check_image(frame, where) for frame in source[:MAX_FRAMES]))
    else:
        raise DataError(
            f"{where}: a video is a list of pictures, or one animated GIF or WebP; got {type(source).__name__}"
        )
    if not 1 <= count <= MAX_FRAMES:
        raise DataError(f"{where}: the video has {count} frames; 1 to {MAX_FRAMES} are supported, leave some out")
    if pixels > MAX_VIDEO_PIXELS:
        raise DataError(
            f"{where}: the video's {count} frames have {pixels:,} pixels; at most {MAX_VIDEO_PIXELS // 10**6} million "
            "are supported, scale them down"
        )
    return count


def load_video(source: Path | Sequence[Any], where: str) -> list[Image.Image]:
    """Frames of a video given as a list of pictures or as an animated GIF or WebP.

    Raises:
        DataError: as `check_video`, or broken, or frames of several sizes.
    """
    check_video(source, where)
    if isinstance(source, Path):
        what = _image_name(source, where)
        with open_image(source, where) as image, _reading(what, "is a broken image"):
            frames = [_rgb(frame, what) for frame in ImageSequence.Iterator(image)]
    else:
        frames = [load_image(frame, where) for frame in source]
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise DataError(f"{where}: the video's frames differ in size: {sizes[0]} and {sizes[1]}; make them equal")
    return frames


def _sound_in_memory(source: Mapping[str, Any], where: str) -> tuple[np.ndarray, int]:
    """Array [frames] or [frames, channels] as given, and its rate."""
    if "array" not in source or "sampling_rate" not in source:
        raise DataError(
            f"{where}: audio in memory needs 'array' and 'sampling_rate', got {', '.join(map(str, source))}"
        )
    rate = source["sampling_rate"]
    if isinstance(rate, bool) or not isinstance(rate, Integral):
        raise DataError(f"{where}: the audio's sampling_rate must be an integer, got {rate!r}")
    with _reading(f"{where}: the audio's array", "is none of numbers"):
        array = np.asarray(source["array"])
    if array.ndim not in (1, 2) or array.dtype.kind not in "fi":
        raise DataError(
            f"{where}: the audio's array must be [frames] or [channels, frames] of floats or signed integers, got "
            f"{array.dtype} {list(array.shape)}"
        )
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    return array, int(rate)


def _check_bounds(frames: int, rate: int, what: str, max_seconds: float) -> float:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise DataError(f"{what} has a sampling rate of {rate} Hz; {MIN_RATE:,} to {MAX_RATE:,} Hz are supported")
    seconds = frames / rate
    if not MIN_SECONDS <= seconds <= max_seconds:
        remedy = "cut it" if seconds > max_seconds else "leave it out"
        raise DataError(f"{what} lasts {seconds:.2f} s; {MIN_SECONDS} to {max_seconds:g} s are supported, {remedy}")
    return seconds


def _audio_name(source: Any, where: str) -> str:
    return f"{where}: audio file {source}" if isinstance(source, Path) else f"{where}: the audio"


def check_audio(source: Path | bytes | Mapping[str, Any], where: str, *, max_seconds: float = MAX_SECONDS) -> float:
    """Check a sound file's header, or an array's form: its seconds.

    Args:
        source: file, a file's content, or mapping with `array` and `sampling_rate`.
        where: what to call the sample in an error.
        max_seconds: longest duration.

    Raises:
        DataError: missing, no sound file, or out of bounds.
    """
    if isinstance(source, Mapping):
        array, rate = _sound_in_memory(source, where)
        return _check_bounds(len(array), rate, _audio_name(source, where), max_seconds)
    if not isinstance(source, Path | bytes):
        raise DataError(f"{where}: audio must be a path or a mapping, got {type(source).__name__}")
    what = _audio_name(source, where)
    with _reading(what, "is no readable sound file"):
        if isinstance(source, Path) and not source.exists():
            raise FileNotFoundError(source)
        info = soundfile.info(_file(source))
    return _check_bounds(info.frames, info.samplerate, what, max_seconds)


def _mono_in_memory(source: Mapping[str, Any], where: str) -> tuple[np.ndarray, int]:
    """Mono float64 [frames] of an array, and its rate."""
    array, rate = _sound_in_memory(source, where)
    scale = 1.0 if array.dtype.kind == "f" else 1.0 / (np.iinfo(array.dtype).max + 1)
    return array.reshape(len(array), -1).mean(axis=1, dtype=np.float64) * scale, rate


def _mono_file(source: Path | bytes, what: str) -> tuple[np.ndarray, int]:
    """Mono float32 [frames] of a file, read in pieces, and its rate."""
    with _reading(what, "is a broken sound file"), soundfile.SoundFile(_file(source)) as file:
        pieces = file.blocks(1 << 20, frames=file.frames, dtype="float32", always_2d=True)
        wave = np.concatenate([piece.mean(axis=1) for piece in pieces])
        if len(wave) != file.frames:
            raise DataError(f"{what} is cut off: {len(wave)} of {file.frames} frames")
        return wave, int(file.samplerate)


def load_audio(
    source: Path | bytes | Mapping[str, Any], sampling_rate: int, where: str, *, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """Mono sound, resampled: float32 [frames].

    Args:
        source: file, a file's content, or mapping with `array` ([frames] or [channels, frames]) and `sampling_rate`;
            integers are scaled to [-1, 1).
        sampling_rate: of the result.
        where: what to call the sample in an error.
        max_seconds: longest duration.

    Raises:
        DataError: as `check_audio`, or broken, or not finite.
    """
    check_audio(source, where, max_seconds=max_seconds)
    what = _audio_name(source, where)
    with np.errstate(invalid="ignore", over="ignore"):  # checked below
        wave, rate = _mono_in_memory(source, where) if isinstance(source, Mapping) else _mono_file(source, what)
    if not (np.abs(wave) <= np.finfo(np.float32).max).all():
        raise DataError(f"{what} holds values that are not finite")
    return resample(torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)), rate, sampling_rate).numpy()


def resample(
    wave: Tensor, rate: int, new_rate: int, *, zeros: int = 64, rolloff: float = 0.95, beta: float = 9.0
) -> Tensor:
    """Band-limited resampling by a windowed sinc, exact for any ratio of rates.

    y[n] = sum_k x[k] h(n old / new - k), h the ideal low-pass at rolloff * min(rates) / 2 under a Kaiser window; one
    filter per phase, each of sum 1. With the defaults the band up to 90 % of the lower Nyquist frequency is kept and
    aliases are about 90 dB down.

    Args:
        wave: float [frames].
        rate, new_rate: in Hz.
        zeros: half width of the filter in zero crossings.
        rolloff: where the low-pass cuts, as a share of the lower Nyquist frequency.
        beta: of the Kaiser window.

    Returns:
        [ceil(frames * new_rate / rate)].
    """
    if rate == new_rate:
        return wave
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    length = -(-len(wave) * new // old)
    band = rolloff * min(1.0, new / old)
    width = math.ceil(zeros / band)
    padded = torch.nn.functional.pad(wave, (width - 1, width))
    taps = torch.arange(1 - width, width + 1, dtype=torch.float64)
    edge = torch.special.i0(torch.tensor(beta, dtype=torch.float64))
    result = wave.new_empty(length)
    for phase in range(min(new, length)):
        start, remainder = divmod(phase * old, new)
        t = (remainder / new - taps) * band
        window = torch.special.i0(beta * (1 - (t / zeros).square()).clamp(min=0).sqrt()) / edge
        kernel = torch.sinc(t) * window * (t.abs() <= zeros)
        kernel = (kernel / kernel.sum()).to(wave.dtype)
        windows = padded[start:].unfold(0, 2 * width, old)[: -(-(length - phase) // new)]
        result[phase::new] = torch.cat([part @ kernel for part in windows.split(1 << 13)])
    return result


def content_digest(source: Any) -> str:
    """SHA-256 of a medium's content: a file's bytes, or a picture's, a sound's or frames' own values."""
    total = hashlib.sha256()
    if isinstance(source, Path):
        total.update(source.read_bytes())
    elif isinstance(source, Image.Image):
        total.update(f"{source.mode} {source.size}".encode() + source.tobytes())
    elif isinstance(source, Mapping):
        array = np.ascontiguousarray(source["array"])
        total.update(f"{source['sampling_rate']} {array.dtype} {array.shape}".encode() + array.tobytes())
    else:
        total.update(" ".join(map(content_digest, source)).encode())
    return total.hexdigest()
