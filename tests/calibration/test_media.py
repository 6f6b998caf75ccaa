# SPDX-License-Identifier: Apache-2.0
"""Media: bounded before they are decoded, broken ones named, sounds resampled as the formula says."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from masquant.calibration.media import (
    check_audio,
    check_image,
    check_video,
    load_audio,
    load_image,
    load_video,
    resample,
)
from masquant.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "sample 1: image file .* of 1 x 1 pixels is too small, at least 2 x 2"),
        ((300, 1), "300 x 1 pixels is too small"),
        ((20_000, 20_000), "20000 x 20000 pixels is too large, at most 16,384 pixels on an edge and 64 million"),
        ((9_000, 9_000), "9000 x 9000 pixels is too large"),
        ((16_385, 2), "16385 x 2 pixels is too large"),
    ],
)
def test_image_bounds(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    Image.new("1", size).save(tmp_path / "a.png")  # one bit a pixel: a small file that would decode to 1.2 GB
    limit = Image.MAX_IMAGE_PIXELS
    for read in (check_image, load_image):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.png", "sample 1")
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="the picture of 16385 x 2 pixels is too large"):
        check_image(Image.new("1", (16_385, 2)), "sample 1")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm", "gif", "jpg"])
def test_images_keep_their_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = load_image(path, "")
    assert image.mode == "RGB" and image.size == check_image(path, "") == (64, 48)
    if suffix not in ("gif", "jpg"):
        np.testing.assert_array_equal(np.asarray(image), NOISE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    pixels = NOISE[:4, :8]
    undone = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]  # by the definition of the EXIF tag
    undone += [pixels.swapaxes(0, 1), pixels.swapaxes(0, 1)[:, ::-1]]
    undone += [pixels[::-1, ::-1].swapaxes(0, 1), pixels.swapaxes(0, 1)[::-1]]
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png", "")), undone[orientation - 1])


def test_modes_of_images(tmp_path: Path) -> None:
    image = Image.fromarray(NOISE)
    image.quantize(8).save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    expected = np.asarray(image.quantize(8).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "palette.png", "")), expected)
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")  # unreadable EXIF: no orientation
    assert load_image(tmp_path / "exif.jpg", "").size == (64, 48)
    Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")  # PIL would clip it to white
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        load_image(tmp_path / "deep.png", "")
    image.save(tmp_path / "program.eps")  # PIL would start a PostScript interpreter
    with pytest.raises(DataError, match="no readable image"):
        load_image(tmp_path / "program.eps", "")


def test_truncated_image_is_found_when_decoded(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    assert check_image(tmp_path / "a.png", "") == (64, 48)
    with pytest.raises(DataError, match="sample 1: image file .*a.png is a broken image"):
        load_image(tmp_path / "a.png", "sample 1")


def encoded(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        if suffix in ("wav", "flac", "ogg"):
            soundfile.write(path, np.sin(np.arange(3_200) / 7) * 0.5, 16_000)
        else:
            Image.fromarray(NOISE).save(path)
        return path.read_bytes()


FILES = {suffix: encoded(suffix) for suffix in ("png", "jpg", "gif", "webp", "tiff", "bmp", "wav", "flac", "ogg")}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_damaged_file_is_read_or_refused(suffix: str, data: Any) -> None:
    content = bytearray(FILES[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        path.write_bytes(content)
        refused = None
        try:
            if suffix in ("wav", "flac", "ogg"):
                assert np.isfinite(load_audio(path, 8_000, "sample 1")).all()
            else:
                assert load_image(path, "sample 1").mode == "RGB"
        except DataError as error:
            refused = str(error)
        assert refused is None or refused.startswith("sample 1: ")


def test_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(3)]
    for name, options in (("v.gif", {}), ("v.webp", {"lossless": True})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert check_video(tmp_path / name, "") == 3
        loaded = load_video(tmp_path / name, "")
        assert [f.getpixel((4, 4)) for f in loaded] == [f.getpixel((4, 4)) for f in frames]
    frames[0].save(tmp_path / "a.png")
    assert [f.size for f in load_video([tmp_path / "a.png", frames[1]], "")] == [(8, 8)] * 2


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (Path("v.mp4"), "v.mp4: a video is a list of pictures, or one animated GIF or WebP"),
        ("v.gif", "got str"),
        ([], "the video has 0 frames; 1 to 64"),
        ([Image.new("RGB", (8, 8))] * 65, "the video has 65 frames"),
        ([Image.new("1", (8_000, 8_000))] * 5, "5 frames have 320,000,000 pixels; at most 256 million"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 4))], "differ in size"),
        ([5], "an image must be a path or a PIL picture, got int"),
    ],
)
def test_videos_that_are_none(video: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_video(video, "sample 1")


def test_audio_bounds(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(8_000 * 301, dtype=np.float32), 8_000)
    with pytest.raises(DataError, match="long.flac lasts 301.00 s; 0.1 to 300 s are supported, cut it"):
        check_audio(tmp_path / "long.flac", "sample 1")
    assert check_audio(tmp_path / "long.flac", "sample 1", max_seconds=400) == 301
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 8_000)
    with pytest.raises(DataError, match=r"lasts 0.00 s"):
        check_audio(tmp_path / "empty.wav", "sample 1")
    soundfile.write(tmp_path / "nan.wav", np.array([np.nan] * 2_000), 8_000, subtype="FLOAT")
    with pytest.raises(DataError, match="nan.wav holds values that are not finite"):
        load_audio(tmp_path / "nan.wav", 8_000, "sample 1")
    soundfile.write(tmp_path / "cut.flac", np.sin(np.arange(16_000)), 16_000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:9_000])
    with pytest.raises(DataError, match=r"cut.flac is (a broken sound file|cut off)"):
        load_audio(tmp_path / "cut.flac", 8_000, "sample 1")


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        (np.zeros(9_999), 0, "sampling rate of 0 Hz"),
        (np.zeros(9_999), -8_000, "sampling rate of -8000 Hz"),
        (np.zeros(9_999), "8000", "must be an integer, got '8000'"),
        (np.zeros(9_999), None, "must be an integer, got None"),
        (np.zeros(10), 8_000, "lasts 0.00 s"),
        (None, 8_000, r"got object \[\]"),
        ("abc", 8_000, "got <U3"),
        ([0.0, "x"] * 999, 8_000, "of floats or signed integers"),
        ([[0.0], [0.0, 1.0]], 8_000, "the audio's array is none of numbers"),
        (np.zeros(9_999, dtype=np.uint8), 8_000, "got uint8"),
        (np.zeros((99, 99, 3)), 8_000, r"got float64 \[99, 99, 3\]"),
        (np.array([0.0, np.nan] * 999), 8_000, "not finite"),
        (np.array([[np.inf, -np.inf]] * 999), 8_000, "not finite"),
        (np.full(999, 1e300), 8_000, "not finite"),
    ],
)
def test_arrays_that_are_no_sound(array: Any, rate: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_audio({"array": array, "sampling_rate": rate}, 16_000, "sample 1")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_sound_files_are_averaged_over_channels(tmp_path: Path, suffix: str) -> None:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([wave, np.zeros_like(wave)], 1), 16_000)
    found = load_audio(tmp_path / f"a.{suffix}", 16_000, "")
    assert found.dtype == np.float32 and len(found) == 16_000
    np.testing.assert_allclose(found, wave / 2, atol=1e-4 if suffix in ("wav", "flac") else 0.05)


def test_long_files_are_read_in_pieces(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, (1 << 20) + 123).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 96_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", 96_000, ""), wave)


def test_arrays_in_memory() -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, 2_000).astype(np.float32)
    forms: list[Any] = [wave, wave.astype(np.float64), wave.tolist(), torch.from_numpy(wave)]
    forms += [np.stack([2 * wave, 0 * wave]), np.stack([2 * wave, 0 * wave], 1), wave[None]]
    for form in forms:
        found = load_audio({"array": form, "sampling_rate": np.int64(16_000)}, 16_000, "")
        np.testing.assert_allclose(found, wave, rtol=1e-6)
    ints = (wave * 32_768).astype(np.int16)
    found = load_audio({"array": ints, "sampling_rate": 16_000}, 16_000, "")
    np.testing.assert_array_equal(found, ints.astype(np.float32) / 32_768)


def tone(frequency: float, rate: int, count: int) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(count, dtype=torch.float64) / rate).float()


RATES = st.one_of(st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000]), st.integers(6_000, 50_000))


@settings(max_examples=15, deadline=None)
@given(RATES, st.sampled_from([8_000, 16_000, 24_000]), st.floats(0.01, 0.9))
def test_resampling_keeps_a_tone(rate: int, new_rate: int, share: float) -> None:
    frequency = share * min(rate, new_rate) / 2  # of the band that both rates can hold
    out = resample(tone(frequency, rate, rate // 5), rate, new_rate)
    assert len(out) == math.ceil(rate // 5 * new_rate / rate)
    inside = slice(len(out) // 4, -(len(out) // 4))  # far enough from the ends, where the signal starts suddenly
    assert float((out - tone(frequency, new_rate, len(out)))[inside].abs().max()) < 1e-3


@settings(max_examples=15, deadline=None)
@given(st.one_of(st.sampled_from([22_050, 44_100, 48_000]), st.integers(17_000, 50_000)), st.floats(0, 1))
def test_resampling_suppresses_aliases(rate: int, share: float) -> None:
    frequency = 8_000 + share * (rate / 2 - 8_000)  # from the new Nyquist frequency to the old one
    out = resample(tone(frequency, rate, rate // 5), rate, 16_000)
    assert float(out[1_000:-1_000].abs().max()) < 1e-3  # -60 dB


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**31))
def test_resampling_is_the_formula(rate: int, new_rate: int, count: int, seed: int) -> None:
    wave = np.random.default_rng(seed).standard_normal(count)
    zeros, rolloff, beta = 8, 0.9, 6.0
    band = rolloff * min(1, new_rate / rate)
    length = math.ceil(count * new_rate / rate)
    expected = np.zeros(length)
    for n in range(length):
        center = n * rate / new_rate
        positions = np.arange(math.floor(center - zeros / band) - 1, math.ceil(center + zeros / band) + 2)
        t = (center - positions) * band
        kernel = np.sinc(t) * np.i0(beta * np.sqrt(np.clip(1 - (t / zeros) ** 2, 0, None))) * (np.abs(t) <= zeros)
        inside = (positions >= 0) & (positions < count)
        expected[n] = kernel[inside] / kernel.sum() @ wave[positions[inside]]
    found = resample(torch.from_numpy(wave), rate, new_rate, zeros=zeros, rolloff=rolloff, beta=beta)
    np.testing.assert_allclose(found.numpy(), expected if rate != new_rate else wave, atol=1e-9)


def test_resampling_keeps_a_constant() -> None:
    rate = 44_101  # no common divisor: as many phases as there are output frames in a second
    out = resample(torch.ones(rate // 5), rate, 16_000)
    assert float((out - 1)[1_000:-1_000].abs().max()) < 1e-5
    assert torch.equal(resample(out, 16_000, 16_000), out)
