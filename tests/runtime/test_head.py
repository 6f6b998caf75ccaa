"""Embeddings and head with 8-bit rows: rounding, ties, checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_processor, tiny_samples
from torch import nn

import masquant
from masquant.api import check, quantize_folder, resident_bytes, save
from masquant.errors import ModelError
from masquant.integrations.transformers import quantized_linears, state_of
from masquant.recipe import Recipe
from masquant.runtime.head import MasquantEmbedding, MasquantHead, TiedHead, is_tied, quantize_head

UNTIED = "llava"


def recipe() -> Recipe:
    return dataclasses.replace(Recipe.preset("rtn", "W4A8", 32), quantize_lm_head=True)


def tie(model: Any, tied: bool) -> Any:
    """A tiny model with or without tied embeddings."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = embeddings.weight if tied else nn.Parameter(torch.randn_like(embeddings.weight))
    return model


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_rows_are_within_half_a_step(tied: bool) -> None:
    model = tie(tiny_model(UNTIED), tied)
    assert is_tied(model) is tied
    embedded, head = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
    assert quantize_head(model) is tied
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, MasquantEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead if tied else MasquantHead)
    ids = torch.arange(len(embedded))[None]
    step = embedded.abs().amax(1) / 127
    for _ in range(2):  # from the checkpoint's tensors, and from the kernels' layout
        assert bool(((embedding(ids)[0] - embedded).abs().amax(1) <= 0.51 * step + 0.5 * 2**-8 * 127 * step).all())
        x = torch.randn(1, 3, embedded.shape[1])
        y = model.get_output_embeddings()(x)
        wanted = x @ head.t()
        assert y.shape == wanted.shape and float((y - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tied: bool, tmp_path: Path) -> None:
    family = UNTIED
    model, processor = tie(tiny_model(family), tied), tiny_processor(family)
    model.save_pretrained(tmp_path / "float")
    processor.save_pretrained(tmp_path / "float")
    samples = tiny_samples(family, tmp_path, count=4)
    quantize_folder(tmp_path / "float", tmp_path / "streamed", masquant.load_samples(samples), recipe())
    save(model, processor, tmp_path / "whole", masquant.quantize(model, processor, samples, recipe=recipe()))
    ids = {"input_ids": torch.tensor([[65, 66, 67]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        wanted = model(**ids).logits
        for folder in ("whole", "streamed"):
            loaded = masquant.load(tmp_path / folder)
            assert torch.equal(loaded(**ids).logits, wanted), folder
            assert check(tmp_path / folder)["lm_head"] > 0
    again = {name: tuple(t.shape) for name, t in loaded.state_dict().items() if "layers" not in name}
    packed = [name for name in again if name.endswith("weight_packed")]
    assert len(packed) == (1 if tied else 2)
    sizes = resident_bytes(loaded)
    vocabulary, width = loaded.get_input_embeddings().num_embeddings, loaded.get_input_embeddings().embedding_dim
    assert 0 <= sizes["lm_head"] - len(packed) * vocabulary * (width + 2) <= 16 * (width + 2) + 32
    assert state_of(loaded).tokens.modalities != ("text",)
    assert all("layers" in name for name in quantized_linears(loaded))


def test_other_heads_are_refused() -> None:
    model = tiny_model(UNTIED)
    model.set_output_embeddings(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="plain embeddings and a linear head"):
        quantize_head(model)
