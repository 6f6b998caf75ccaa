# SPDX-License-Identifier: Apache-2.0
"""Samples: from a folder with metadata.jsonl, a Hugging Face dataset, or any iterable of mappings.

All that can be known without decoding media is checked up front, before a model does any work.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from .media import check_audio, check_image

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One conversation, or one plain text.

    Attributes:
        id: unique among the samples.
        task: what it measures; samples of one task are reported together.
        prompt, answer: what the user says and what the model should answer.
        text: plain text instead of prompt and answer.
        image: path or picture.
        video: list of pictures, or path of an animated GIF or WebP.
        audio: path, or mapping with `array` and `sampling_rate`.
    """

    id: str
    task: str
    prompt: str = ""
    answer: str | None = None
    text: str | None = None
    image: Any = None
    video: Any = None
    audio: Any = None

    @property
    def media(self) -> tuple[str, ...]:
        """Kinds of media that it has, in the order in which they are shown to the model."""
        return tuple(name for name in ("image", "video", "audio") if getattr(self, name) is not None)


_FIELDS = {field.name for field in dataclasses.fields(Sample)}


def load_samples(
    source: str | Path | Iterable[Mapping[str, Any] | Sample], *, limit: int | None = None, seed: int = 0
) -> list[Sample]:
    """Samples of a source, checked.

    Args:
        source: a folder with metadata.jsonl (or that file), a dataset, or an iterable.
        limit: take this many, balanced over tasks; the choice depends on `seed` alone.
        seed: of that choice.

    Raises:
        DataError: naming the sample, file and line that is wrong.
    """
    if isinstance(source, str | Path):
        samples = _from_folder(Path(source))
    else:
        samples = [_sample(row, f"sample {i}", None) for i, row in enumerate(source)]
    where = f" in {source}" if isinstance(source, str | Path) else ""
    if not samples:
        raise DataError(f"no samples{where}: at least one is needed")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"sample id {sample.id!r} occurs twice{where}")
        seen.add(sample.id)
    chosen = samples if limit is None or limit >= len(samples) else _balanced(samples, limit, seed)
    for sample in chosen:
        _check_media(sample)
    return chosen


def _from_folder(path: Path) -> list[Sample]:
    file = path / METADATA if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path} holds no {METADATA}; a data folder needs one, with a JSON object per line")
    samples = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} must be a JSON object, got {type(row).__name__}")
        samples.append(_sample(row, where, file.parent))
    return samples


def _sample(row: Mapping[str, Any] | Sample, where: str, folder: Path | None) -> Sample:
    """Check one row. Paths in a metadata file are relative to its folder and stay inside of it."""
    if isinstance(row, Sample):
        return _checked(row, where)
    if not isinstance(row, Mapping):
        raise DataError(f"{where} must be a mapping, got {type(row).__name__}")
    values = {key: value for key, value in row.items() if value is not None}
    unknown = sorted(set(values) - _FIELDS)
    if unknown:
        raise DataError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(_FIELDS))}")
    for name in ("id", "task"):
        if not isinstance(values.get(name), str | int) or values[name] == "":
            raise DataError(f"{where} needs a {name!r}")
        values[name] = str(values[name])
    for name in ("prompt", "answer", "text"):
        if name in values and not isinstance(values[name], str):
            raise DataError(f"{where}: {name} must be a string, got {values[name]!r}")
    for name in ("image", "audio", "video"):
        if isinstance(values.get(name), str | Path):
            values[name] = _media_path(values[name], folder, f"{where}: {name}")
        elif name == "video" and name in values:
            values[name] = [
                _media_path(f, folder, f"{where}: video") if isinstance(f, str | Path) else f for f in values[name]
            ]
    return _checked(Sample(**values), where)


def _media_path(value: str | Path, folder: Path | None, where: str) -> Path:
    path = Path(value)
    if folder is None:
        return path
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: {value} leaves the data folder; use a path relative to {METADATA}")
    return folder / path


def _checked(sample: Sample, where: str) -> Sample:
    if sample.text is not None:
        if sample.prompt or sample.answer or sample.media:
            raise DataError(
                f"{where} ({sample.id}) has text and also a prompt, answer or media; give one or the other"
            )
        if not sample.text.strip():
            raise DataError(f"{where} ({sample.id}) has an empty text")
        return sample
    if not sample.prompt and not sample.media:
        raise DataError(f"{where} ({sample.id}) has neither text, prompt nor media")
    if sample.answer is None or not sample.answer.strip():
        raise DataError(f"{where} ({sample.id}) has no answer; every sample needs one, or a text")
    return sample


def _check_media(sample: Sample) -> None:
    where = f"sample {sample.id}"
    if isinstance(sample.image, Path | Image.Image):
        check_image(sample.image, where)
    elif sample.image is not None:
        raise DataError(f"{where}: image must be a path or a picture, got {type(sample.image).__name__}")
    if isinstance(sample.audio, Path | Mapping):
        check_audio(sample.audio, where)
    elif sample.audio is not None:
        raise DataError(f"{where}: audio must be a path or a mapping, got {type(sample.audio).__name__}")
    if isinstance(sample.video, Path) and not sample.video.exists():
        raise DataError(f"{where}: video file {sample.video} does not exist")


def _balanced(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """`limit` samples, as evenly over tasks as they allow, in their original order."""
    generator = random.Random(seed)
    by_task: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_task.setdefault(sample.task, []).append(i)
    for indices in by_task.values():
        generator.shuffle(indices)
    chosen: list[int] = []
    while len(chosen) < limit:
        for indices in by_task.values():
            if indices and len(chosen) < limit:
                chosen.append(indices.pop())
    return [samples[i] for i in sorted(chosen)]
