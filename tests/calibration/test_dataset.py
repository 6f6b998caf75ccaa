"""Samples: every mistake in the data is named before any work, and media are bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from masquant.calibration.dataset import Sample, load_samples
from masquant.calibration.media import load_audio, load_image, load_video, resample
from masquant.errors import DataError


def write(folder: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def picture(folder: Path, size: tuple[int, int] = (20, 10), name: str = "a.png") -> str:
    Image.new("RGB", size, (200, 30, 30)).save(folder / name)
    return name


def sound(folder: Path, rate: int = 16_000, seconds: float = 0.1, name: str = "a.wav") -> str:
    t = np.arange(int(rate * seconds)) / rate
    soundfile.write(folder / name, np.stack([np.sin(440 * t), np.zeros_like(t)], 1), rate)
    return name


GOOD = {"id": "1", "task": "t", "prompt": "p", "answer": "a"}


def test_a_folder(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "image": picture(tmp_path), "audio": sound(tmp_path)},
        "",
        {"id": 2, "task": "text", "text": "words"},
    ]
    first, second = load_samples(write(tmp_path, *rows))
    assert first.image == tmp_path / "a.png" and first.media == ("image", "audio")
    assert second == Sample("2", "text", text="words")
    assert load_samples(tmp_path / "metadata.jsonl") == [first, second]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "metadata.jsonl, line 2 is no JSON"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ({**GOOD, "id": "2", "colour": 1}, "line 2 has unknown keys colour"),
        ({"task": "t", "prompt": "p", "answer": "a"}, "line 2 needs a 'id'"),
        ({"id": "2", "prompt": "p", "answer": "a"}, "line 2 needs a 'task'"),
        (GOOD, "sample id '1' occurs twice"),
        ({"id": "2", "task": "t", "prompt": "p"}, "line 2 .2. has no answer"),
        ({"id": "2", "task": "t", "prompt": "p", "answer": " "}, "has no answer"),
        ({"id": "2", "task": "t", "answer": "a"}, "neither text, prompt nor media"),
        ({"id": "2", "task": "t", "text": ""}, "has an empty text"),
        ({"id": "2", "task": "t", "text": "x", "prompt": "p"}, "has text and also"),
        ({"id": "2", "task": "t", "prompt": 5, "answer": "a"}, "prompt must be a string"),
        ({**GOOD, "id": "2", "audio": "gone.wav"}, "sample 2: audio file .*gone.wav does not exist"),
        ({**GOOD, "id": "2", "image": "gone.png"}, "sample 2: image file .*gone.png does not exist"),
        ({**GOOD, "id": "2", "image": "../a.png"}, "leaves the data folder"),
        ({**GOOD, "id": "2", "image": "/etc/passwd"}, "leaves the data folder"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_samples(write(tmp_path, GOOD, row))


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples in"):
        load_samples(write(tmp_path, ""))
    with pytest.raises(DataError, match="no samples"):
        load_samples([])
    with pytest.raises(DataError, match=r"holds no metadata.jsonl"):
        load_samples(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"RIFF0000WAVE"])
def test_broken_media(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(DataError, match="sample 1: .*bad is no readable sound file"):
        load_samples(write(tmp_path, {**GOOD, "audio": "bad"}))
    with pytest.raises(DataError, match="sample 1: .*bad is no readable image"):
        load_samples(write(tmp_path, {**GOOD, "image": "bad"}))


def test_truncated_image_is_found_when_decoded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="broken image"):
        load_image(tmp_path / "a.png", "sample 1")


@pytest.mark.parametrize(
    ("size", "message"),
    [((1, 1), "1 x 1 pixels is too small"), ((20_000, 20_000), "20000 x 20000 pixels is too large")],
)
def test_image_bounds(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    Image.new("1", size).save(tmp_path / "a.png")  # one bit a pixel: a small file that would decode to 1.2 GB
    with pytest.raises(DataError, match=message):
        load_samples(write(tmp_path, {**GOOD, "image": "a.png"}))


def test_audio_bounds(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(8_000 * 301, dtype=np.float32), 8_000)
    with pytest.raises(DataError, match=r"audio of 301.0 s"):
        load_samples(write(tmp_path, {**GOOD, "audio": "long.flac"}))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 8_000)
    with pytest.raises(DataError, match=r"audio of 0.0 s"):
        load_samples(write(tmp_path, {**GOOD, "audio": "empty.wav"}))
    with pytest.raises(DataError, match="not finite"):
        load_audio({"array": np.array([0.0, np.nan]), "sampling_rate": 8000}, 8000, "sample 1")


def test_media_in_memory(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "image": Image.new("L", (4, 4)),
        "audio": {"array": np.ones(10), "sampling_rate": 16_000},
        "text": None,
    }
    (sample,) = load_samples([row])
    assert load_image(sample.image, "").mode == "RGB"
    assert load_audio(sample.audio, 16_000, "").tolist() == [1.0] * 10
    with pytest.raises(DataError, match="needs 'array' and 'sampling_rate'"):
        load_samples([{**GOOD, "audio": {"bytes": b""}}])


def test_stereo_is_averaged_and_orientation_applied(tmp_path: Path) -> None:
    sound(tmp_path)
    left, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", 16_000, ""), left[:, 0] / 2, atol=1e-6)
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", "").size == (4, 8)


def test_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    assert len(load_video(tmp_path / "v.gif", "")) == 3
    assert [f.size for f in load_video(frames, "")] == [(8, 8)] * 3
    with pytest.raises(DataError, match="animated GIF or WebP"):
        load_video(tmp_path / "v.mp4", "")


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000]), st.floats(200, 3_000))
def test_resampling_keeps_a_tone(rate: int, frequency: float) -> None:
    t = torch.arange(rate) / rate
    out = resample(torch.sin(2 * torch.pi * frequency * t), rate, 16_000)
    assert len(out) == 16_000
    wanted = torch.sin(2 * torch.pi * frequency * torch.arange(16_000) / 16_000)
    middle = slice(2_000, 14_000)
    assert float((out - wanted)[middle].abs().max()) < 0.01


def test_resampling_suppresses_aliases() -> None:
    tone = torch.sin(2 * torch.pi * 12_000 * torch.arange(48_000) / 48_000)  # above the new Nyquist frequency
    assert float(resample(tone, 48_000, 16_000)[1_000:-1_000].abs().max()) < 1e-3  # -60 dB


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 5))
def test_limit_is_balanced_ordered_and_reproducible(tasks: list[str], limit: int, seed: int) -> None:
    rows = [{"id": str(i), "task": task, "text": "x"} for i, task in enumerate(tasks)]
    chosen = load_samples(rows, limit=limit, seed=seed)
    assert chosen == load_samples(rows, limit=limit, seed=seed)
    assert len(chosen) == min(limit, len(tasks))
    assert [int(s.id) for s in chosen] == sorted(int(s.id) for s in chosen)
    counts = {t: sum(s.task == t for s in chosen) for t in set(tasks)}
    for task, count in counts.items():  # no task could have one more without another having had fewer
        assert count == tasks.count(task) or count >= max(counts.values()) - 1
