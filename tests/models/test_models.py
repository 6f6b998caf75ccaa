"""Families are data: complete, without overlap, and they fit the real classes' configurations."""

import pytest
from tiny_models import FAMILIES as TINY
from tiny_models import tiny_model
from transformers import PretrainedConfig

from masquant.errors import ModelError
from masquant.modality import Modality
from masquant.models import (
    FAMILIES,
    decoder_blocks,
    decoder_of,
    family_of,
    groups_of,
    linear_of,
    linearize,
    modality_tokens_of,
)


def test_every_family_has_a_tiny_model_and_types_do_not_overlap() -> None:
    types = [t for family in FAMILIES for t in family.model_types]
    assert len(types) == len(set(types))
    assert {family_of(tiny_model(name).config).title for name in TINY} == {family.title for family in FAMILIES}


@pytest.mark.parametrize("name", TINY)
def test_description_fits_the_model(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model.config)
    tokens = modality_tokens_of(model.config)
    assert tokens.modalities[0] is Modality.TEXT and set(tokens.modalities[1:]) == set(family.modality_tokens)
    blocks = decoder_blocks(model)
    assert len(blocks) == decoder_of(model).config.num_hidden_layers
    for block in blocks:
        groups = groups_of(linearize(block, family), family)
        assert {group.role for group in groups} == {"qkv", "o", "gate_up", "down"}
        assert len({group.name for group in groups}) == len(groups)
        for group in groups:
            features = {linear_of(block, linear).in_features for linear in group.linears}
            assert len(features) == 1
            block.get_submodule(group.fold_into)
            assert all(block.get_submodule(name).weight.shape[-1] in features for name in group.readers)
    modules = dict(model.named_modules())
    for encoder in family.encoders:
        assert any(path.endswith(encoder) for path in modules), encoder


def test_missing_placeholder_is_said() -> None:
    config = PretrainedConfig()
    config.model_type = "qwen2_audio"
    with pytest.raises(ModelError, match="sets none of audio_token_id"):
        modality_tokens_of(config)
