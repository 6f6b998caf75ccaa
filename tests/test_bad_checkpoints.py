"""Damaged checkpoints, models, recipes and metadata: a clear error, or what was there before the damage.

Every case is one mutation by a seeded generator. `python tests/test_bad_checkpoints.py 1000` runs more of them.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import load_processor, quantize_folder
from masquant.calibration.encoding import SampleEncoder
from masquant.calibration.media import (
    MAX_FRAMES,
    MAX_PIXELS,
    MAX_SECONDS,
    MAX_VIDEO_PIXELS,
    load_audio,
    load_image,
    load_video,
)
from masquant.checking import write_checksums
from masquant.errors import MasquantError
from masquant.evaluation import comparison_dict, evaluate, evaluation_table
from masquant.integrations.loading import load_streamed, meta_model
from masquant.plan import make_plan
from masquant.recipe import CompensationArgs, Recipe
from masquant.report import read_results, report_run

FAMILY = "qwen2_5_omni"
CASES = 200
SECONDS = 60  # in which a case must end

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**70, -(2**63), 1e308, float("nan"), float("inf"), "", "x", "re:(", "../../x",
    "\0", [], [None], [[]], {}, {"a": 1}, "9" * 5000,
)  # fmt: skip


def mutate_bytes(data: bytes, r: random.Random) -> bytes:
    """Cut, flip a bit, or overwrite some bytes."""
    kind = r.randrange(4)
    if kind == 0 or not data:
        return data[: r.randrange(len(data) + 1)]
    changed = bytearray(data)
    if kind == 1:
        return data + r.randbytes(r.randrange(1, 64))
    for _ in range(1 if kind == 2 else 16):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def nodes(value: Any) -> list[Any]:
    """All containers in nested data."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) and value else []
    return own + [node for child in inner for node in nodes(child)]


def mutate_data(value: Any, r: random.Random) -> Any:
    """Remove, rename, replace or add one thing in nested data."""
    found = nodes(value)
    if not found:
        return r.choice(STRANGE)
    node = r.choice(found)
    key = r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node))
    kind = r.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[f"{key}{r.choice(('x', '_', ' ', 'é'))}"] = node.pop(key)
    elif kind == 2 and isinstance(node, dict):
        node[r.choice(("unknown", "quant_method", "dtype", "__class__"))] = r.choice(STRANGE)
    else:
        node[key] = r.choice(STRANGE)
    return value


def mutate_json(path: Path, r: random.Random) -> None:
    if r.randrange(4) == 0:
        path.write_bytes(mutate_bytes(path.read_bytes(), r))
    else:
        path.write_text(json.dumps(mutate_data(json.loads(path.read_text()), r)))


def mutate_header(path: Path, r: random.Random) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(mutate_data(json.loads(data[8 : 8 + length]), r)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def mutate_tensors(path: Path, r: random.Random) -> None:
    """A well-formed file with a tensor removed, renamed, reshaped, cast, or with a value that is none."""
    tensors = load_file(path)
    name = r.choice(sorted(tensors))
    tensor = tensors[name]
    kind = r.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + r.choice(("x", ".weight", "_packed"))] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensor.flatten()[: r.randrange(tensor.numel() + 1)].clone()
    elif kind == 3:
        tensors[name] = tensor.to(r.choice((torch.float64, torch.int8, torch.float16, torch.bool)))
    elif kind == 4:
        tensors[r.choice(("stray", "model.layers.9.mlp.up_proj.weight_packed"))] = torch.zeros(2)
    elif tensor.is_floating_point():
        tensor.view(-1)[r.randrange(tensor.numel())] = r.choice((float("nan"), float("inf"), 0.0, -1.0))
    save_file(tensors, path, metadata={"format": "pt"})


def mutate_weights(path: Path, r: random.Random) -> None:
    r.choice((mutate_header, mutate_tensors, lambda p, r: p.write_bytes(mutate_bytes(p.read_bytes(), r))))(path, r)


def mutate_start(data: bytes, r: random.Random) -> bytes:
    """Change some of the first bytes, where a file says what it holds."""
    changed = bytearray(data)
    for _ in range(r.randrange(1, 5)):
        changed[r.randrange(min(64, len(changed)))] = r.choice((0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)))
    return bytes(changed)


def enlarge(data: bytes, r: random.Random) -> bytes:
    """The same file with a header that promises vastly more pixels or sound, its checksums in order."""
    large = r.choice((20_000, 60_000))
    if data.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", large, large) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data.startswith(b"GIF"):
        return data[:6] + struct.pack("<HH", large, large) + data[10:]
    if data.startswith(b"\xff\xd8"):
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        return data[: start + 5] + struct.pack(">HH", large, large) + data[start + 9 :]
    if data.startswith(b"RIFF"):  # a slow rate, or many bytes that are not there
        if r.randrange(2):
            return data[:24] + struct.pack("<I", r.choice((0, 1, 2**32 - 1))) + data[28:]
        return data[:4] + struct.pack("<I", 2**32 - 1) + data[8:40] + struct.pack("<I", 2**31 - 2) + data[44:]
    if data.startswith(b"fLaC"):  # 36 bits of frames, and a rate of 20
        changed = bytearray(data)
        if r.randrange(2):
            changed[21] |= 0x0F
            changed[22:26] = b"\xff\xff\xff\xff"
        else:
            changed[18:20] = b"\0\0"
        return bytes(changed)
    raise AssertionError("a file of another kind")


class Boom:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def split(folder: Path, target: Path, count: int) -> None:
    """A copy of a checkpoint with its weights in several files and an index."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, target / file, metadata={"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    write_checksums(target)


def write_media(folder: Path) -> None:
    """A small file of every kind."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(pixels).save(folder / name)
    frames = [Image.fromarray(noise.integers(0, 255, (16, 20, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    for name in ("a.wav", "a.flac"):
        soundfile.write(folder / name, noise.uniform(-0.5, 0.5, 8_000), 16_000, subtype="PCM_16")


class World:
    """A float model, checkpoints of it, recipe, data, results and media, that are copied for every case."""

    weights = ("model.safetensors", "config.json")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.out, self.data = root / "model", root / "out", root / "data"
        tiny_model(FAMILY).to(torch.bfloat16).save_pretrained(self.model)
        tiny_processor(FAMILY).save_pretrained(self.model)
        samples = tiny_samples(FAMILY, self.data, count=4)
        rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in s.items()} for s in samples]
        (self.data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.recipe = Recipe.preset("masquant", "W4A8", 32, selection=None, compensation=CompensationArgs(rank=2))
        quantize_folder(self.model, self.out, masquant.load_samples(self.data), self.recipe, batch_size=4)
        loaded = masquant.load(self.out)
        self.wanted = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        self.samples = masquant.load_samples(self.data)
        self.sharded, self.files = root / "sharded", root / "media"
        split(self.out, self.sharded, 3)
        write_media(self.files)
        found = evaluate(loaded, load_processor(self.out), self.samples, baseline=tiny_model(FAMILY), batch_size=4)
        self.evaluation = found.to_dict(samples=True)
        self.comparison = comparison_dict({"float": found, "rtn": found.with_cost(seconds=1.0, peak_memory=1)},
                                          samples=True)  # fmt: skip
        self.float_config = json.loads((self.model / "config.json").read_text())

    def checkpoint(self, folder: Path, r: random.Random) -> None:
        """A damaged checkpoint is refused by `check`, or loads as it was."""
        shutil.copytree(self.out, folder)
        target = r.choice(("config.json", "model.safetensors", "model.safetensors"))
        (mutate_json if target.endswith("json") else mutate_weights)(folder / target, r)
        masquant.check(folder)
        found = masquant.load(folder).state_dict()
        assert set(found) == set(self.wanted)
        assert all(torch.equal(found[n], self.wanted[n]) for n in self.wanted), "check let altered tensors pass"

    def unguarded(self, folder: Path, r: random.Random) -> None:
        """The same without checksums: loading alone refuses what is no checkpoint, and gives no random weights; what
        it refuses `check` refuses too, without loading."""
        shutil.copytree(self.out, folder)
        (folder / "checksums.json").unlink()
        target = r.choice(("config.json", "model.safetensors"))
        (mutate_json if target.endswith("json") else mutate_weights)(folder / target, r)
        found = self.checked_and_loaded(folder)
        assert set(found) == set(self.wanted)
        for name, tensor in found.items():
            if name.endswith(("weight_scale", "smooth_scale")):
                assert bool(tensor.isfinite().all()) and bool((tensor != 0).all())

    def checked_and_loaded(self, folder: Path) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint; an error of loading that `check` did not foresee is none of masquant's."""
        masquant.check(folder)
        try:
            return masquant.load(folder).state_dict()
        except MasquantError as error:
            raise AssertionError(f"check let pass what load refuses: {error}") from error

    def shards(self, folder: Path, r: random.Random) -> None:
        """A checkpoint in several files: one is damaged, gone, swapped with another or doubled, or the index is."""
        shutil.copytree(self.sharded, folder)
        if r.randrange(2):
            (folder / "checksums.json").unlink()
        files = sorted(folder.glob("*.safetensors"))
        file, other = r.sample(files, 2)
        kind = r.randrange(8)
        if kind < 3:
            mutate_json(folder / "model.safetensors.index.json", r)
        elif kind == 3:
            mutate_weights(file, r)
        elif kind == 4:
            file.unlink()
        elif kind == 5:
            file.rename(folder / r.choice(("model.safetensors", "model-00009-of-00003.safetensors", "x.safetensors")))
        elif kind == 6:
            content = file.read_bytes()
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            shutil.copy(file, folder / r.choice(("model.safetensors", "copy.safetensors", other.name)))
        found = self.checked_and_loaded(folder)
        assert set(found) == set(self.wanted)
        if (folder / "checksums.json").exists() or kind not in (3,):
            assert all(torch.equal(found[n], self.wanted[n]) for n in self.wanted), "altered tensors were let pass"

    def side_files(self, folder: Path, r: random.Random) -> None:
        """Processor, tokenizer, template, generation config, record and recipe: `check` refuses what was changed;
        without checksums each is refused when it is used, or works."""
        shutil.copytree(self.out, folder)
        name = r.choice(sorted(f.name for f in folder.iterdir() if f.name not in self.weights))
        path, before = folder / name, (folder / name).read_bytes()
        if name.endswith(".json"):
            mutate_json(path, r)
        else:
            path.write_bytes(mutate_bytes(before, r))
        if r.randrange(3) == 0:
            masquant.check(folder)
            assert path.read_bytes() == before or name in ("README.md", "report.json", "checksums.json"), name
        (folder / "checksums.json").unlink()
        encoder = SampleEncoder(load_processor(folder))
        encoder.encode(self.samples)
        masquant.load(folder)
        Recipe.from_yaml(folder / "recipe.yaml")
        report_run(folder, output=folder / "page.html")

    def results(self, folder: Path, r: random.Random) -> None:
        """What `evaluate` or `compare` wrote is refused, or makes a page and a table."""
        folder.mkdir()
        path = folder / "result.json"
        path.write_text(json.dumps(r.choice((self.evaluation, self.comparison))))
        mutate_json(path, r)
        results = read_results(path)
        report_run(self.out, results=results, samples=self.samples, output=folder / "page.html")
        evaluation_table(results)

    def media(self, folder: Path, r: random.Random) -> None:
        """A damaged picture or sound is refused, or decodes to something within bounds."""
        shutil.copytree(self.files, folder)
        path = folder / r.choice(sorted(f.name for f in folder.iterdir()))
        data = path.read_bytes()
        change = r.choice((mutate_bytes, mutate_start, enlarge))
        path.write_bytes(change(data, r))
        if path.suffix in (".wav", ".flac"):
            row = {"audio": path}
        else:
            row = {"video" if path.suffix == ".gif" and r.randrange(2) else "image": path}
        sample = masquant.load_samples([{"id": "a", "task": "t", "prompt": "p", "answer": "a", **row}])[0]
        if sample.audio is not None:
            assert len(load_audio(sample.audio, 16_000, "a")) <= MAX_SECONDS * 16_000 + 1
        elif sample.video is not None:
            frames = load_video(sample.video, "a")
            assert len(frames) <= MAX_FRAMES and sum(f.width * f.height for f in frames) <= MAX_VIDEO_PIXELS
        else:
            picture = load_image(sample.image, "a")
            assert picture.width * picture.height <= MAX_PIXELS and picture.mode == "RGB"

    def pickles(self, folder: Path, r: random.Random) -> None:
        """Pickled weights, under any name and beside any others, are refused or passed over, never loaded."""
        boom = folder.parent / "boom"
        source = r.choice((self.out, self.model))
        shutil.copytree(source, folder)
        name = r.choice(
            ("pytorch_model.bin", "model.pt", "model.pth", "model.safetensors", "adapter_model.bin", "model.ckpt",
             "spk_dict.pt", "training_args.bin", "pytorch_model-00001-of-00001.bin", "tokenizer.pkl")
        )  # fmt: skip
        if r.randrange(2):
            (folder / "model.safetensors").unlink()
        torch.save({"x": Boom(boom)}, folder / name)
        if r.randrange(2):
            index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
            target = r.choice(("pytorch_model.bin.index.json", "model.safetensors.index.json"))
            (folder / target).write_text(json.dumps(index))
        if name.startswith("adapter"):
            (folder / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]})
            )
        try:
            if source is self.out:
                masquant.check(folder)
                found = masquant.load(folder).state_dict()
                assert all(torch.equal(found[n], self.wanted[n]) for n in self.wanted)
            load_processor(folder)
            load_streamed(folder, dtype="auto", device=torch.device("cpu"))
        finally:
            assert not boom.exists(), f"{name} was unpickled"

    def float_model(self, folder: Path, r: random.Random) -> None:
        """A damaged float model is refused before a block is read, or is a model."""
        shutil.copytree(self.model, folder)
        target = r.choice(("config.json", "model.safetensors"))
        (mutate_json if target.endswith("json") else mutate_weights)(folder / target, r)
        plan = make_plan(meta_model(folder), self.recipe)
        blocks = load_streamed(folder, dtype="auto", device=torch.device("cpu"))
        assert len(blocks) == len(plan.blocks)
        assert not any(t.is_meta for t in blocks.copy(0).parameters())

    def recipe_file(self, folder: Path, r: random.Random) -> None:
        """A damaged recipe is refused, or is a recipe that survives a round trip."""
        folder.mkdir()
        path = folder / "recipe.yaml"
        text = self.recipe.to_yaml()
        if r.randrange(4) == 0:
            path.write_bytes(mutate_bytes(text.encode(), r))
        else:
            path.write_text(yaml.safe_dump(mutate_data(yaml.safe_load(text), r), allow_unicode=True))
        found = Recipe.from_yaml(path)
        assert Recipe.from_dict(yaml.safe_load(found.to_yaml())).to_dict() == found.to_dict()

    def metadata(self, folder: Path, r: random.Random) -> None:
        """Damaged metadata is refused, or every sample is one."""
        shutil.copytree(self.data, folder)
        path = folder / "metadata.jsonl"
        lines = path.read_text().split("\n")
        number = r.randrange(len(lines))
        if r.randrange(4) == 0:
            path.write_bytes(mutate_bytes(path.read_bytes(), r))
        else:
            lines[number] = json.dumps(mutate_data(json.loads(lines[number]), r))
            path.write_text("\n".join(lines))
        for sample in masquant.load_samples(folder):
            assert sample.id and (sample.text or sample.prompt or sample.media)


KINDS: tuple[Callable[[World, Path, random.Random], None], ...] = (
    World.checkpoint,
    World.unguarded,
    World.shards,
    World.side_files,
    World.float_model,
    World.recipe_file,
    World.metadata,
    World.results,
    World.media,
    World.pickles,
)


def run_case(world: World, number: int) -> str:
    """Name of the kind and how it ended; any other error than the documented ones is raised."""
    r = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            kind(world, Path(folder) / "case", r)
        except MasquantError:
            return f"{kind.__name__}: refused"
        return f"{kind.__name__}: right"


def timed_out(*_: Any) -> None:
    raise TimeoutError(f"a case took more than {SECONDS} s")


def run_cases(world: World, numbers: range) -> dict[str, int]:
    """How often each kind ended how; a case that ended as none may is named with its error."""
    counts: dict[str, int] = {}
    previous = signal.signal(signal.SIGALRM, timed_out)
    try:
        for number in numbers:
            signal.alarm(SECONDS)
            try:
                outcome = run_case(world, number)
            except Exception as error:
                outcome = f"case {number}: {error!r}"
            counts[outcome] = counts.get(outcome, 0) + 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return counts


@pytest.mark.filterwarnings("ignore")  # of libraries, about what they are fed
def test_every_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    counts = run_cases(World(tmp_path), range(CASES))
    assert not [outcome for outcome in counts if outcome.startswith("case ")]
    assert all(counts[f"{kind.__name__}: refused"] >= CASES // len(KINDS) // 4 for kind in KINDS), counts


@pytest.mark.filterwarnings("ignore")
def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    """A folder with pickled weights alone is refused without opening them."""
    model = tmp_path / "model"
    tiny_model(FAMILY).save_pretrained(model)
    tiny_processor(FAMILY).save_pretrained(model)
    (model / "model.safetensors").unlink()
    torch.save({"x": Boom(tmp_path / "boom")}, model / "pytorch_model.bin")
    samples = masquant.load_samples(tiny_samples(FAMILY, tmp_path / "data", count=4))
    with pytest.raises(MasquantError, match="safetensors"):
        quantize_folder(model, tmp_path / "out", samples, Recipe.preset("rtn", "W4A8", 32))
    with pytest.raises(MasquantError):
        masquant.load(model)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.filterwarnings("ignore")
def test_no_code_of_a_model_folder_is_ever_run(tmp_path: Path) -> None:
    """Nor is anybody asked whether it should be."""
    model = tmp_path / "model"
    tiny_model(FAMILY).save_pretrained(model)
    tiny_processor(FAMILY).save_pretrained(model)
    (model / "own.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\nclass Own: pass\n")
    for name, kind in (("config.json", "AutoConfig"), ("processor_config.json", "AutoProcessor")):
        content = json.loads((model / name).read_text())
        changes = {"model_type": "own"} if kind == "AutoConfig" else {"processor_class": "Own"}
        (model / name).write_text(json.dumps({**content, **changes, "auto_map": {kind: "own.Own"}}))
    with pytest.raises(MasquantError, match="cannot read a model config"):
        meta_model(model)
    with pytest.raises(MasquantError, match="cannot read a processor"):
        load_processor(model)
    assert not (tmp_path / "boom").exists()


if __name__ == "__main__":
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        logging.disable_progress_bar()
        print(json.dumps(run_cases(World(Path(root)), range(int(sys.argv[1]))), indent=1))
