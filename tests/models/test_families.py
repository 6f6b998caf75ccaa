# SPDX-License-Identifier: Apache-2.0
"""What the families' descriptions promise, on tiny models: vectors for text fold exactly, whole models speak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_files, tiny_model, tiny_processor, tiny_samples
from torch import Tensor
from typer.testing import CliRunner

import masquant
from masquant.api import save
from masquant.block import fold_vector, text_realizer
from masquant.calibration.encoding import SampleEncoder
from masquant.cli import app
from masquant.integrations.transformers import quantized_linears
from masquant.models import core_of, decoder_blocks, decoder_of, linearize
from masquant.models.table import family_rows, family_table
from masquant.plan import folds_text, make_plan
from masquant.recipe import Recipe
from masquant.smoothing.scales import exact_norm_fold


def inputs_of(family: str, folder: Path, *, with_answer: bool = True, count: int = 4) -> dict[str, Tensor]:
    samples = [s for s in tiny_samples(family, folder, count=2 * count) if "text" not in s][:count]
    return SampleEncoder(tiny_processor(family)).encode(masquant.load_samples(samples), with_answer=with_answer).inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_text_vectors_fold_exactly(family: str, tmp_path: Path) -> None:
    """Dividing where the description says and multiplying the group's columns leaves the model as it was."""
    model = tiny_model(family)
    inputs, core, config = inputs_of(family, tmp_path), core_of(model), decoder_of(model).config
    plan = make_plan(model, Recipe.preset("rtn", group_size="channel"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        wanted = core(**inputs).logits
        for block, groups in zip(decoder_blocks(model), plan.blocks, strict=True):
            linearize(block, plan.family)
            for group in (g for g in groups if folds_text(g, None)):
                scale = 2 ** torch.randn(group.in_features, generator=generator).clamp(-1, 1)
                realized = text_realizer(block, plan.family, group, config, model.dtype)(scale)
                assert float((realized - 1).abs().mean()) > 0.1
                source = block.get_submodule(group.group.fold_into)
                if group.group.fold_kind == "norm":
                    source.weight.copy_(exact_norm_fold(source.weight, scale, plan.family.norm_offset)[0])
                else:
                    factor = fold_vector(block, group, realized, config)
                    source.weight.mul_(factor[:, None])
                    if source.bias is not None:
                        source.bias.mul_(factor)
                for name in (*(linear.name for linear in group.linears), *group.group.readers):
                    block.get_submodule(name).weight.mul_(realized)
        torch.testing.assert_close(core(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


# Per whole model: its parts that stay, and how it is asked to speak
SPEAKERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "qwen2_5_omni_full": (("talker", "token2wav"), {"talker_eos_token_id": [32, 34]}),
    "qwen3_omni_moe_full": (("talker", "code2wav"), {"speaker": "chelsie"}),
}


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # by a talker
@pytest.mark.parametrize("family", SPEAKERS)
def test_the_whole_model_speaks(family: str, tmp_path: Path) -> None:
    """Talker and vocoder stay as they were, and get from a quantized thinker what they get from a float one."""
    model, reference, processor = tiny_model(family), tiny_model(family), tiny_processor(family)
    samples = tiny_samples(family, tmp_path, count=4)
    report = masquant.quantize(model, processor, samples, recipe=Recipe.preset("quarot", "W8A8", 32))
    save(model, processor, tmp_path / "out", report, source=tiny_files(family, tmp_path / "float"))
    loaded: Any = masquant.load(tmp_path / "out")
    parts, options = SPEAKERS[family]
    assert type(loaded) is type(reference)
    assert all(name.startswith("thinker.") for name in quantized_linears(loaded))
    for part in parts:
        ours, theirs = getattr(loaded, part).state_dict(), getattr(reference, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)
    spoken = masquant.load_samples([s for s in samples if "audio" in s and "image" not in s][:1])
    inputs = SampleEncoder(processor).encode(spoken, with_answer=False).inputs  # speech about pictures fails upstream
    with torch.no_grad():
        ours, theirs = (core_of(m)(**inputs, output_hidden_states=True).hidden_states for m in (loaded, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.2
    options = {"thinker_max_new_tokens": 4, "talker_do_sample": False, "talker_max_new_tokens": 6, **options}
    text, sound = loaded.generate(**inputs, **options)
    text = getattr(text, "sequences", text)
    assert torch.equal(
        text, core_of(loaded).generate(**inputs, max_new_tokens=4, eos_token_id=None)[:, : text.shape[1]]
    )
    sound = sound[0] if isinstance(sound, list) else sound
    assert sound.numel() > 0 and bool(sound.isfinite().all())


def test_the_readme_has_the_table_of_families() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"<!-- printed by `masquant families` -->\n{family_table()}\n<!-- end -->" in readme
    shown = CliRunner().invoke(app, ["families", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout) == family_rows()
    assert CliRunner().invoke(app, ["families"]).stdout.strip() == family_table()


def test_every_description_is_short() -> None:
    folder = Path(masquant.__file__).parent / "models"
    for module in folder.glob("*.py"):
        if module.name not in ("__init__.py", "family.py", "experts.py", "table.py"):
            assert len(module.read_text().splitlines()) < 40, module.name
