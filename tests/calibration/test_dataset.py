# SPDX-License-Identifier: Apache-2.0
"""Samples: every mistake in the data is named before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from masquant.calibration.dataset import Sample, load_samples
from masquant.calibration.media import load_audio, load_image
from masquant.errors import DataError

GOOD = {"id": "1", "task": "t", "prompt": "p", "answer": "a"}


def write(folder: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def picture(folder: Path, name: str = "a.png") -> str:
    Image.new("RGB", (20, 10), (200, 30, 30)).save(folder / name)
    return name


def sound(folder: Path, name: str = "a.wav") -> str:
    soundfile.write(folder / name, np.sin(np.arange(1_600) / 6), 16_000)
    return name


def test_a_folder(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "image": picture(tmp_path), "audio": sound(tmp_path), "video": ["a.png", "a.png"]},
        "",
        {"id": 2, "task": "text", "text": "words", "image": None},
    ]
    first, second = load_samples(write(tmp_path, *rows))
    assert first.image == tmp_path / "a.png" and first.audio == tmp_path / "a.wav"
    assert first.video == [tmp_path / "a.png"] * 2
    assert first.media == ("image", "video", "audio")
    assert second == Sample("2", "text", text="words")
    assert load_samples(tmp_path / "metadata.jsonl") == [first, second]


def test_a_line_is_what_ends_in_a_newline(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"  # separators that str.splitlines knows, and that JSON strings may hold
    line = json.dumps({"id": "1", "task": "t", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert load_samples(tmp_path)[0].text == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "metadata.jsonl, line 2 is no JSON"),
        ("[" * 100_000, "metadata.jsonl, line 2 is no JSON"),
        ('{"id": "2", "id": "3"}', "metadata.jsonl, line 2 is no JSON: a key occurs twice"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ({**GOOD, "id": "2", "colour": None}, "line 2 has unknown keys colour"),
        ({"task": "t", "prompt": "p", "answer": "a"}, "line 2 needs a 'id'"),
        ({**GOOD, "id": True}, "line 2 needs a 'id', a string; got True"),
        ({"id": "2", "prompt": "p", "answer": "a"}, "line 2 needs a 'task'"),
        (GOOD, "sample id '1' occurs twice in "),
        ({"id": "2", "task": "t", "prompt": "p"}, r"line 2 \(2\) has no answer"),
        ({"id": "2", "task": "t", "prompt": "p", "answer": " "}, "has no answer"),
        ({"id": "2", "task": "t", "answer": "a"}, "neither text, prompt nor media"),
        ({"id": "2", "task": "t", "text": ""}, "has an empty text"),
        ({"id": "2", "task": "t", "text": "x", "prompt": "p"}, "has text and also"),
        ({"id": "2", "task": "t", "prompt": 5, "answer": "a"}, "line 2: prompt must be a string, got 5"),
        ('{"id": "2", "task": "t", "text": "a\\ud800"}', "text holds half of a surrogate pair at position 1"),
        ({**GOOD, "id": "2", "audio": "gone.wav"}, "sample 2: audio file .*gone.wav does not exist"),
        ({**GOOD, "id": "2", "image": "gone.png"}, "sample 2: image file .*gone.png does not exist"),
        ({**GOOD, "id": "2", "video": ["gone.png"]}, "sample 2: image file .*gone.png does not exist"),
        ({**GOOD, "id": "2", "video": "gone.gif"}, "sample 2: image file .*gone.gif does not exist"),
        ({**GOOD, "id": "2", "image": "x" * 999}, "sample 2: image file .* is no readable image"),
        ({**GOOD, "id": "2", "audio": "x" * 999}, "sample 2: audio file .* is no readable sound file"),
        ({**GOOD, "id": "2", "image": "a\0.png"}, "line 2: image: .* is no path"),
        ({**GOOD, "id": "2", "image": ""}, "line 2: image: '' is no path"),
        ({**GOOD, "id": "2", "image": "."}, "sample 2: image file .* is no readable image"),
        ({**GOOD, "id": "2", "image": "../a.png"}, "line 2: image: ../a.png leaves the data folder"),
        ({**GOOD, "id": "2", "video": ["b/../../a.png"]}, "line 2: video: .* leaves the data folder"),
        ({**GOOD, "id": "2", "audio": "/etc/passwd"}, "leaves the data folder"),
        ({**GOOD, "id": "2", "image": 5}, "sample 2: an image must be a path or a PIL picture, got int"),
        ({**GOOD, "id": "2", "audio": 5}, "sample 2: audio must be a path or a mapping, got int"),
        ({**GOOD, "id": "2", "video": 5}, "sample 2: a video is a list of pictures.*got int"),
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
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read"):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "must be a folder, a dataset or an iterable, got int"),
        ({"train": [GOOD], "test": [GOOD]}, r"got a mapping \(train, test\); choose one of its splits"),
        ([GOOD, "x"], "sample 1 must be a mapping, got str"),
        ([Sample("1", "t")], "neither text, prompt nor media"),
    ],
)
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_samples(source)


def test_an_iterable(tmp_path: Path) -> None:
    path = tmp_path / picture(tmp_path)
    rows = [{**GOOD, "image": str(path)}, Sample("2", "t", "p", "a", image=str(path)), Sample("3", "t", text="x")]
    one, two, three = load_samples(row for row in rows)
    assert one.image == two.image == path  # absolute, unlike in a metadata file
    assert load_samples([one, two, three]) == [one, two, three]


def test_answers_may_be_left_out_where_only_prompts_are_needed() -> None:
    rows = [{"id": "1", "task": "t", "prompt": "p"}]
    with pytest.raises(DataError, match="has no answer"):
        load_samples(rows)
    assert load_samples(rows, require_answers=False) == [Sample("1", "t", "p")]


def test_media_in_memory() -> None:
    waves = {"array": [0.5] * 1_600, "sampling_rate": 16_000, "path": None}
    (sample,) = load_samples([{**GOOD, "image": Image.new("L", (4, 4)), "audio": waves, "text": None}])
    assert load_image(sample.image, "").mode == "RGB"
    assert load_audio(sample.audio, 16_000, "").tolist() == [0.5] * 1_600
    with pytest.raises(DataError, match="sample 1: audio in memory needs 'array' and 'sampling_rate', got bytes"):
        load_samples([{**GOOD, "audio": {"bytes": b""}}])


class Decoder:
    """As torchcodec's AudioDecoder, which `datasets` 4 puts into audio cells: subscriptable, but no mapping."""

    def get_all_samples(self) -> Any:
        return SimpleNamespace(data=torch.stack([torch.full((1_600,), 0.5), torch.zeros(1_600)]), sample_rate=16_000)


class Dataset:
    """As a Hugging Face dataset: random access, columns; counts the rows that are decoded."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names, self.decoded = rows, list(rows[0]), 0

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]

    def select(self, positions: list[int]) -> Dataset:
        chosen = Dataset([self.rows[i] for i in positions])
        chosen.root = self.root if hasattr(self, "root") else self
        return chosen

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            getattr(self, "root", self).decoded += 1
            yield row


def test_a_dataset_is_read_no_further_than_needed() -> None:
    tasks = "aaaaabb"
    rows = [{**GOOD, "id": str(i), "task": t, "audio": Decoder(), "image": None} for i, t in enumerate(tasks)]
    data = Dataset(rows)
    chosen = load_samples(data, limit=4, seed=3)
    assert data.decoded == 4
    assert [s.id for s in chosen] == [s.id for s in load_samples(rows, limit=4, seed=3)]
    assert load_audio(chosen[0].audio, 16_000, "").tolist() == [0.25] * 1_600
    assert len(load_samples(data)) == 7
    with pytest.raises(DataError, match="sample 0 has unknown keys label"):
        load_samples(Dataset([{**GOOD, "label": 1}]), limit=1)


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


def test_limit_takes_another_choice_for_another_seed() -> None:
    rows = [{"id": str(i), "task": "t", "text": "x"} for i in range(50)]
    assert load_samples(rows, limit=10) != load_samples(rows, limit=10, seed=1)
    with pytest.raises(DataError, match="must be at least 1, got 0"):
        load_samples(rows, limit=0)
