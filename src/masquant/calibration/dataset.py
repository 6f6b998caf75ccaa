# SPDX-License-Identifier: Apache-2.0
"""Samples: from a folder with metadata.jsonl, a Hugging Face dataset, or any iterable of mappings.

All that can be known without decoding media is checked up front, before a model does any work.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .media import check_audio, check_image, check_video

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One conversation, or one plain text.

    Attributes:
        id: unique among the samples.
        task: what it measures; samples of one task are reported together.
        prompt, answer: what the user says and what the model should answer.
        text: plain text instead of prompt and answer.
        image: path or PIL picture.
        video: list of paths or pictures, or path of an animated GIF or WebP.
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


_FIELDS = tuple(field.name for field in dataclasses.fields(Sample))


def load_samples(
    source: str | Path | Iterable[Mapping[str, Any] | Sample],
    *,
    limit: int | None = None,
    seed: int = 0,
    require_answers: bool = True,
) -> list[Sample]:
    """Samples of a source, checked: their form, and the headers of their media.

    Args:
        source: a folder with metadata.jsonl (or that file), a dataset, or an iterable of mappings or samples.
        limit: take this many, balanced over tasks; the choice depends on the samples' order and `seed` alone. Of a
            dataset with random access only these are read.
        seed: of that choice.
        require_answers: refuse conversations without an answer.

    Raises:
        DataError: naming the sample, file and line that is wrong.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the number of samples must be at least 1, got {limit}")
    where = f" in {source}" if isinstance(source, str | Path) else ""
    if isinstance(source, str | Path):
        samples = _from_folder(Path(source), require_answers)
    else:
        rows = _rows(source, limit, seed)
        samples = [_sample(row, f"sample {i}", None, require_answers) for i, row in enumerate(rows)]
    if not samples:
        raise DataError(f"no samples{where}: at least one is needed")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"sample id {sample.id!r} occurs twice{where}; ids must be unique")
        seen.add(sample.id)
    chosen = [samples[i] for i in _balanced([s.task for s in samples], limit, seed)]
    for sample in chosen:
        _check_media(sample)
    return chosen


def _rows(source: Any, limit: int | None, seed: int) -> Iterable[Any]:
    """Rows of a dataset or iterable; of a dataset with random access no more than needed, as reading decodes media."""
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, source))
        raise DataError(f"samples must be a dataset or an iterable, got a mapping ({keys}); choose one of its splits")
    if not isinstance(source, Iterable):
        raise DataError(f"samples must be a folder, a dataset or an iterable, got {type(source).__name__}")
    if limit is not None and hasattr(source, "select") and "task" in (getattr(source, "column_names", None) or ()):
        return source.select(_balanced(list(source["task"]), limit, seed))  # type: ignore[attr-defined,index]
    return source


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(key for key, _ in pairs)}")
    return found


def _from_folder(path: Path, require_answers: bool) -> list[Sample]:
    file = path / METADATA if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path} holds no {METADATA}; a data folder needs one, with a JSON object per line")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split inside of JSON strings
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}; write one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} must be a JSON object, got {type(row).__name__}")
        samples.append(_sample(row, where, file.parent, require_answers))
    return samples


def _sample(row: Any, where: str, folder: Path | None, require_answers: bool) -> Sample:
    """Check one row. Paths in a metadata file are relative to its folder and stay inside of it."""
    if isinstance(row, Sample):
        row = {name: getattr(row, name) for name in _FIELDS}
    if not isinstance(row, Mapping):
        raise DataError(f"{where} must be a mapping, got {type(row).__name__}")
    values = {key: value for key, value in row.items() if value is not None}
    unknown = sorted(str(key) for key in set(row) - set(_FIELDS))
    if unknown:
        raise DataError(
            f"{where} has unknown keys {', '.join(unknown)}; remove them, known are {', '.join(sorted(_FIELDS))}"
        )
    for name in ("id", "task"):
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), str | int) or values[name] == "":
            raise DataError(f"{where} needs a {name!r}, a string; got {values.get(name)!r}")
        values[name] = str(values[name])
    for name in ("id", "task", "prompt", "answer", "text"):
        _check_string(values.get(name, ""), f"{where}: {name}")
    for name in ("image", "audio", "video"):
        if name in values:
            values[name] = _medium(name, values[name], folder, f"{where}: {name}")
    sample = Sample(**values)
    _check_content(sample, f"{where} ({sample.id})", require_answers)
    return sample


def _check_string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair at position {error.start}: {value!r}") from error


def _medium(name: str, value: Any, folder: Path | None, where: str) -> Any:
    """A cell with its paths resolved and a dataset's lazy audio decoded."""
    if isinstance(value, str | Path):
        return _media_path(value, folder, where)
    if name == "video" and isinstance(value, Sequence):
        return [_media_path(v, folder, where) if isinstance(v, str | Path) else v for v in value]
    if name == "audio" and hasattr(value, "get_all_samples"):  # torchcodec's decoder, as datasets 4 gives it
        decoded = value.get_all_samples()
        return {"array": decoded.data.numpy(), "sampling_rate": decoded.sample_rate}
    return value


def _media_path(value: str | Path, folder: Path | None, where: str) -> Path:
    path = Path(value)
    if not str(value) or "\0" in str(value):
        raise DataError(f"{where}: {str(value)!r} is no path; name a file, or leave the key out")
    if folder is None:
        return path
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: {value} leaves the data folder; use a path below it, relative to {METADATA}")
    return folder / path


def _check_content(sample: Sample, where: str, require_answers: bool) -> None:
    if sample.text is not None:
        if sample.prompt or sample.answer is not None or sample.media:
            raise DataError(f"{where} has text and also a prompt, answer or media; give one or the other")
        if not sample.text.strip():
            raise DataError(f"{where} has an empty text; leave the sample out")
        return
    if not sample.prompt and not sample.media:
        raise DataError(f"{where} has neither text, prompt nor media; give a prompt and an answer, or a text")
    if require_answers and not (sample.answer or "").strip():
        raise DataError(f"{where} has no answer; every sample needs one, or a text")


def _check_media(sample: Sample) -> None:
    where = f"sample {sample.id}"
    if sample.image is not None:
        check_image(sample.image, where)
    if sample.video is not None:
        check_video(sample.video, where)
    if sample.audio is not None:
        check_audio(sample.audio, where)


def _balanced(tasks: Sequence[Any], limit: int | None, seed: int) -> list[int]:
    """Positions of `limit` samples, as evenly over tasks as there are samples, in order."""
    if limit is None or limit >= len(tasks):
        return list(range(len(tasks)))
    generator = random.Random(seed)
    by_task: dict[Any, list[int]] = {}
    for position, task in enumerate(tasks):
        by_task.setdefault(task, []).append(position)
    for positions in by_task.values():
        generator.shuffle(positions)
    chosen: list[int] = []
    while len(chosen) < limit:
        for positions in by_task.values():
            if positions and len(chosen) < limit:
                chosen.append(positions.pop())
    return sorted(chosen)
