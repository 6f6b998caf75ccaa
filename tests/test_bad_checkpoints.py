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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import quantize_folder
from masquant.errors import MasquantError
from masquant.integrations.loading import load_streamed, meta_model
from masquant.plan import make_plan
from masquant.recipe import CompensationArgs, Recipe

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


class World:
    """A float model, a checkpoint of it, a recipe and a data folder, that are copied for every case."""

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
        self.wanted = masquant.load(self.out).state_dict()
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
        """The same without checksums: loading alone refuses what is no checkpoint, and gives no random weights."""
        shutil.copytree(self.out, folder)
        target = r.choice(("config.json", "model.safetensors"))
        (mutate_json if target.endswith("json") else mutate_weights)(folder / target, r)
        found = masquant.load(folder).state_dict()
        assert set(found) == set(self.wanted)
        for name, tensor in found.items():
            if name.endswith(("weight_scale", "smooth_scale")):
                assert bool(tensor.isfinite().all()) and bool((tensor != 0).all())

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
    World.float_model,
    World.recipe_file,
    World.metadata,
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

    class Boom:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "boom",))

    model = tmp_path / "model"
    tiny_model(FAMILY).save_pretrained(model)
    tiny_processor(FAMILY).save_pretrained(model)
    (model / "model.safetensors").unlink()
    torch.save({"x": Boom()}, model / "pytorch_model.bin")
    samples = masquant.load_samples(tiny_samples(FAMILY, tmp_path / "data", count=4))
    with pytest.raises(MasquantError, match="safetensors"):
        quantize_folder(model, tmp_path / "out", samples, Recipe.preset("rtn", "W4A8", 32))
    with pytest.raises(MasquantError):
        masquant.load(model)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out.partial").exists()


if __name__ == "__main__":
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        logging.disable_progress_bar()
        print(json.dumps(run_cases(World(Path(root)), range(int(sys.argv[1]))), indent=1))
