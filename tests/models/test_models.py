"""Families are data: complete, without overlap, and they fit the real classes' configurations."""

import pytest
from tiny_models import FAMILIES as TINY
from tiny_models import tiny_model
from torch import nn
from transformers import PretrainedConfig

from masquant.errors import ModelError
from masquant.modality import Modality
from masquant.models import (
    FAMILIES,
    decoder_blocks,
    decoder_of,
    encoder_linears,
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


def paths_of(modules: dict[str, nn.Module], block: nn.Module) -> list[str]:
    (path,) = (path for path, module in modules.items() if module is block)
    return [other for other in modules if other == path or other.startswith(f"{path}.")]


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
    for name in (*family.encoders, *family.others):
        assert any(f".{path}".endswith(f".{name}") for path in modules), name
    assert set(family.encoders.values()) == set(family.modalities[1:])
    linears = list(encoder_linears(model, family))
    assert all(path in modules and path.endswith(local) for local, path, _ in linears)
    found = {encoder for local, _, _ in linears if (encoder := (family.encoder_of(local) or ("", ""))[0])}
    without = {"multi_modal_projector"} if family.title == "Gemma 3" else set()  # a bare parameter
    assert found == set(family.encoders) - without
    outside = set(modules) - {path for block in blocks for path in paths_of(modules, block)}
    left = [path for path in outside if type(modules[path]) is nn.Linear and path not in {p for _, p, _ in linears}]
    known = (*family.others, "language_model.per_layer_model_projection")
    assert all(path.endswith("lm_head") or any(f".{name}." in f".{path}." for name in known) for path in left), left


def test_missing_placeholder_is_said() -> None:
    config = PretrainedConfig()
    config.model_type = "qwen2_audio"
    with pytest.raises(ModelError, match="sets none of audio_token_id"):
        modality_tokens_of(config)
