# SPDX-License-Identifier: Apache-2.0
"""What 8-bit encoders and an int8 KV cache cost on omni-135m.

    python benchmarks/encoders.py --json encoders.json                                      # all evaluation samples
    python benchmarks/encoders.py --method float                                            # decoder in floating point
    python benchmarks/encoders.py --method masquant --scheme W4A8 --calibration 96          # another decoder

By default the decoder is rounded to nearest in W8A8: its weights are then the same in all rows, whatever its encoders
give, so that what changes is theirs. It still rounds its inputs, and the least change of them moves the loss a little;
a decoder in floating point shows what encoders cost without that. The first row is compared with the float model, all
others with the first, sample by sample.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from linear import machine
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from masquant.api import load_processor, resident_bytes
from masquant.cache import Int8Cache, cache_arguments
from masquant.calibration.dataset import Sample, load_samples
from masquant.calibration.encoding import SampleEncoder
from masquant.compare import measure
from masquant.demo import demo_directory, obtain_model
from masquant.evaluation import BaselineScores, Evaluation, ModelDescription, evaluate, score_baseline
from masquant.integrations.loading import load_any
from masquant.modality import Modality
from masquant.models import core_of
from masquant.pipeline import Calibration
from masquant.plan import make_plan
from masquant.recipe import Recipe
from masquant.runtime.outer import quantize_encoders

FLOAT, BASE, CACHE = "float", "decoder only", "int8 KV cache"
ENCODERS: dict[str, dict[Modality, Any]] = {
    "vision W8A8": {Modality.VISION: "W8A8"},
    "audio W8A16": {Modality.AUDIO: "W8A16"},
    "audio W8A8": {Modality.AUDIO: "W8A8"},
    "vision W8A8, audio W8A16": {Modality.VISION: "W8A8", Modality.AUDIO: "W8A16"},
}
QUALITY = {"wer": "WER", "exact_match": "exact"}


def row(result: Evaluation, sizes: dict[str, int]) -> dict[str, Any]:
    """What is kept of an evaluation."""
    return {"tasks": result.tasks, "bytes": sizes}


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, processor: Any, sample: Sample) -> dict[str, float]:
    """Bytes per token of the model's own cache and of the int8 one, after one conversation."""
    batch = SampleEncoder(processor).encode([sample])
    tokens = batch.inputs["input_ids"].shape[1]
    arguments = cache_arguments(model, "int8")
    ((name, rounded),) = arguments.items()
    plain = DynamicCache(config=model.config.get_text_config())
    for cache in (rounded, plain):
        core_of(model)(**batch.inputs, use_cache=True, **{name: cache})
    assert isinstance(rounded, Int8Cache)
    own = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    return {"float": own / tokens, "int8": rounded.nbytes / tokens}


def run(args: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """All rows by name, and the caches' bytes per token."""
    source, data = obtain_model(on_progress=print), demo_directory() / "data"
    calibration = Calibration(load_samples(data / "calibration", limit=args.calibration))
    samples, processor = load_samples(data / "evaluation", limit=args.limit), load_processor(source)
    method = "rtn" if args.method == FLOAT else args.method
    base = Recipe.preset(method, args.scheme, 64 if args.scheme.startswith("W4") else None).fast()
    generate = not args.no_generate
    rows: dict[str, Any] = {}

    def quantized(name: str, recipe: Recipe, baseline: BaselineScores) -> PreTrainedModel:
        if args.method == FLOAT:
            model = load_any(source)
            quantize_encoders(model, make_plan(model, recipe).encoders)
            result = evaluate(model, processor, samples, baseline=baseline, generate=generate)
        else:
            options = {"processor": processor, "generate": generate}
            model, _, result = measure(source, recipe, calibration, samples, baseline, **options)
        rows[name] = row(result, resident_bytes(model))
        progress(name)
        return model

    float_model = load_any(source)
    with score_baseline(float_model, processor, samples, generate=generate) as scores:
        rows[FLOAT] = row(scores.evaluation(ModelDescription.of(float_model)), resident_bytes(float_model))
        decoder = quantized(BASE, base, scores)
    del float_model
    with score_baseline(decoder, processor, samples, generate=False) as scores:
        result = evaluate(decoder, processor, samples, baseline=scores, generate=generate, kv_cache="int8")
        rows[CACHE] = row(result, resident_bytes(decoder))
        progress(CACHE)
        for name, encoders in ENCODERS.items():
            quantized(name, replace(base, encoders=encoders), scores)
    media = next(sample for sample in samples if sample.media)
    return {"rows": rows, "cache_bytes_per_token": cache_bytes(decoder, processor, media)}


def table(rows: dict[str, Any]) -> Table:
    """Change of the nll per task, quality of the decoded answers, and MiB by part."""
    tasks = list(rows[BASE]["tasks"])
    found = Table(title="change of nll per answer token; the first row against the float model, the others against it")
    for column in ("", *tasks, "encoders, MiB", "all, MiB"):
        found.add_column(column, justify="right")
    for name, entry in rows.items():
        cells = []
        for task in tasks:
            metrics = entry["tasks"][task]
            change = f"{metrics['delta_nll']:+.4f} ± {metrics['delta_nll_stderr']:.4f}" if name != FLOAT else ""
            divergence = f"KL {metrics['kl']:.4f}" if name != FLOAT else ""
            quality = [f"{word} {metrics[key]:.3f}" for key, word in QUALITY.items() if key in metrics]
            cells.append("\n".join(filter(None, [change, divergence, *quality])))
        sizes = entry["bytes"]
        mib = [f"{size / 2**20:.1f}" for size in (sizes["encoders"], sum(sizes.values()))]
        found.add_row(name, *cells, *mib)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="rtn", help="recipe of the decoder, without what takes long, or float")
    parser.add_argument("--scheme", default="W8A8", help="of the decoder")
    parser.add_argument("--calibration", type=int, default=10, help="calibration samples")
    parser.add_argument("--limit", type=int, help="evaluation samples")
    parser.add_argument("--no-generate", action="store_true", help="likelihoods only")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    console = Console(width=160)
    found = run(args, lambda name: console.print(f"{name}: done", highlight=False))
    console.print(table(found["rows"]))
    per_token = found["cache_bytes_per_token"]
    versions = (
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    console.print(f"KV cache: {per_token['float']:.0f} bytes per token, int8 {per_token['int8']:.0f}; {versions}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **found}, indent=1))


if __name__ == "__main__":
    main()
