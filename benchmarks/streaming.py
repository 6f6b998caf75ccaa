# SPDX-License-Identifier: Apache-2.0
"""Quantize a model that is larger than the memory it may take: random weights in the shapes of a 14B.

    python benchmarks/streaming.py FOLDER --json streaming.json                      # all 48 blocks; 40 GB of disk
    python benchmarks/streaming.py FOLDER --layers 4 --method gptq --memory 12       # a few blocks of the same width

The model is a Qwen2.5-Omni thinker with the decoder of Qwen2.5-14B, the encoders of Qwen2.5-Omni-7B, and the
tokenizer, media and samples of omni-135m. `masquant quantize` runs in a control group whose memory is bounded (Linux,
as root): beyond the bound the kernel ends it. Its resident memory is read every second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from linear import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

from masquant.demo import demo_directory, obtain_model

DECODER = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 8,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}  # fmt: skip
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 5120}
AUDIO = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "output_dim": 5120
}  # fmt: skip
SHARD_BYTES = 4 * 10**9
CONTROL = Path("/sys/fs/cgroup")


def write_model(folder: Path, layers: int) -> int:
    """A checkpoint with random weights, shard by shard; returns its bytes."""
    source = obtain_model(on_progress=print)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy2(file, folder)
    config = AutoConfig.from_pretrained(source).to_dict()
    config["text_config"] |= {**DECODER, "num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    config["vision_config"] |= {**VISION, "fullatt_block_indexes": [7, 15, 23, 31]}
    config["audio_config"] |= AUDIO
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    changed = AutoConfig.for_model(**config)
    changed.save_pretrained(folder)
    with torch.device("meta"):
        shapes = Qwen2_5OmniThinkerForConditionalGeneration(changed).state_dict()
    pool = torch.randn(2**24 + 997, generator=torch.Generator().manual_seed(0)).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for number, (name, tensor) in enumerate(shapes.items()):
        start = number % 997
        values = pool[start : start + 2**24].repeat(-(-tensor.numel() // 2**24))[: tensor.numel()].view(tensor.shape)
        # norms are about one; what is added to the residual stream stays small
        scale = 0.1 if tensor.dim() == 1 else 0.0002 if "down_proj" in name else 0.02
        shard[name] = values * scale + (1 if tensor.dim() == 1 and name.endswith("weight") else 0)
        total += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@contextmanager
def bounded(size: int) -> Iterator[Path]:
    """A control group with so many bytes of memory, of version 2 or 1; what a process writes its id to to join it."""
    new = (CONTROL / "cgroup.controllers").exists()
    group = (CONTROL if new else CONTROL / "memory") / f"masquant-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if new else "memory.limit_in_bytes")).write_text(str(size))
    except OSError as error:
        raise SystemExit(f"cannot bound memory: {error}; run as root on Linux with control groups") from error
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def quantize(model: Path, output: Path, arguments: argparse.Namespace) -> tuple[int, list[tuple[float, int]]]:
    """Run the command under its limit; its exit status, and seconds with resident bytes."""
    command = [
        sys.executable, "-m", "masquant.cli", "quantize", str(model), "-o", str(output), "--overwrite",
        "--calibration", str(demo_directory() / "data/calibration"), "--limit", str(arguments.samples),
        "--method", arguments.method, "--preset", arguments.preset, "--group-size", "128", "--memory",
        str(arguments.memory), "--batch-size", "4",
    ]  # fmt: skip
    start, curve = time.monotonic(), []
    with bounded(int(arguments.memory * 2**30)) as members:
        child = subprocess.Popen(command, preexec_fn=lambda: members.write_text(str(os.getpid())) and None)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            curve.append((time.monotonic() - start, int(process.memory_info().rss)))
            time.sleep(1)
    return child.returncode, curve


def drawn(curve: list[tuple[float, int]], width: int = 72) -> str:
    """Resident memory over time in one line of characters."""
    sizes = [size for _, size in curve]
    width = min(width, len(sizes))
    bounds = [i * len(sizes) // width for i in range(width + 1)]
    picked, most = [max(sizes[a:b]) for a, b in itertools.pairwise(bounds)], max(sizes)
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * size / most)] for size in picked)


def main() -> None:
    """Write, quantize, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model (kept) and the result (removed) go")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--memory", type=float, default=12, help="GiB that the process may take")
    parser.add_argument("--method", default="masquant")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = arguments.folder / f"model-{arguments.layers}"
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        write_model(model, arguments.layers)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    output = arguments.folder / "quantized"
    status, curve = quantize(model, output, arguments)
    if status != 0:
        raise SystemExit(f"masquant quantize ended with {status}")
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    shutil.rmtree(output)
    seconds = [block["seconds"] for block in report["blocks"]]
    found = {
        "layers": arguments.layers, "method": arguments.method, "preset": arguments.preset, "limit": arguments.memory,
        "model_bytes": size, "written_bytes": written, "seconds": curve[-1][0], "block_seconds": seconds,
        "peak_resident": max(size for _, size in curve), "resident": curve,
    }  # fmt: skip
    table = Table("layers", "model, GiB", "written, GiB", "limit, GiB", "peak resident, GiB", "minutes", "s a block")
    table.add_row(
        str(arguments.layers), f"{size / 2**30:.1f}", f"{written / 2**30:.1f}", f"{arguments.memory:g}",
        f"{found['peak_resident'] / 2**30:.2f}", f"{curve[-1][0] / 60:.1f}", f"{sum(seconds) / len(seconds):.1f}",
    )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"resident memory over time: [{drawn(curve)}]", highlight=False, markup=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), **found}))


if __name__ == "__main__":
    main()
