"""Write the golden checkpoint of the current format version: `python tests/checkpoint/make_golden.py`.

Run once per format version; the result is committed and never changed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent.parent / "golden"


def main() -> None:
    sys.path.insert(0, str(GOLDEN.parent))
    from tiny_models import tiny_model, tiny_processor, tiny_samples

    import masquant
    from masquant.calibration.encoding import SampleEncoder
    from masquant.checkpoint.format import FORMAT_VERSION
    from masquant.recipe import BudgetArgs, Recipe

    folder = GOLDEN / f"format-{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} exists; golden checkpoints are never changed")
    with tempfile.TemporaryDirectory() as media:
        samples = masquant.load_samples(tiny_samples("qwen2_5_omni", Path(media), count=8))
        model, processor = tiny_model("qwen2_5_omni"), tiny_processor("qwen2_5_omni")
        recipe = Recipe.preset(
            "masquant",
            "W4A8",
            32,
            selection=None,
            budget=BudgetArgs(0.3, patches=0.05),
            ignore=("layers.1.mlp.down_proj",),
        )
        masquant.quantize(model, processor, samples, recipe=recipe)
        model.to(torch.bfloat16).save_pretrained(folder)
        batch = SampleEncoder(processor).encode([s for s in samples if s.media][:2]).inputs
        loaded = masquant.load(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = loaded(**batch).logits
        save_file({**{k: v.contiguous() for k, v in batch.items()}, "logits": logits}, folder / "expected.bin")


if __name__ == "__main__":
    main()
