"""Recipes: strict, versioned, and the named ones read back as they were."""

import re
from pathlib import Path
from typing import Any

import pytest

from masquant.errors import RecipeError
from masquant.modality import Modality
from masquant.recipe import (
    PRESETS,
    SCHEMES,
    BudgetArgs,
    CompensationArgs,
    Recipe,
    RotationArgs,
    Scheme,
    WeightArgs,
)


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_presets_round_trip(method: str, scheme: str, tmp_path: Path) -> None:
    recipe = Recipe.preset(method, scheme)
    assert recipe.scheme.name == scheme
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(file) == recipe


def test_a_file_can_start_from_a_preset() -> None:
    recipe = Recipe.from_dict({"preset": "masquant", "scheme": "W4A6", "group_size": 32, "compensation": {"rank": 4}})
    assert recipe.scheme.name == "W4A6"
    assert recipe.scheme.weights.group_size == 32
    assert recipe.compensation == CompensationArgs(rank=4, factors="auto")
    assert recipe.selection == Recipe.preset("masquant").selection


def test_encoders_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({"preset": "rtn", "encoders": {"vision": "W8A8", "audio": "W8A16"}})
    assert recipe.encoders == {Modality.VISION: "W8A8", Modality.AUDIO: "W8A16"}
    assert Recipe.preset("rtn").encoders == {}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match="encoders.audio must be W8A8 or W8A16, got 'W4A16'"):
        Recipe.preset("rtn", encoders={Modality.AUDIO: "W4A16"})


def test_default_groups() -> None:
    assert Scheme.parse("W4A8").weights.group_size_for(1536) == 128
    assert Scheme.parse("W4A8").weights.group_size_for(576) == 64
    assert Scheme.parse("W4A8").weights.group_size_for(96) == 32
    assert Scheme.parse("W4A8", "channel").weights.group_size_for(577) is None
    assert Scheme.parse("W8A8").weights.strategy == "channel"
    with pytest.raises(RecipeError, match="group size 128 does not divide 576"):
        Scheme.parse("W4A8", 128).weights.group_size_for(576)
    with pytest.raises(RecipeError, match="of 128, 64 or 32 does not divide 100"):
        WeightArgs().group_size_for(100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nonsense": 1}, "recipe has unknown keys nonsense"),
        ({"smoothing": {"strenght": 0.5}}, "recipe.smoothing has unknown keys strenght"),
        ({"smoothing": {"strength": 2.0}}, "must be in 0..1"),
        ({"smoothing": {"strength": "much"}}, "recipe.smoothing.strength must be float"),
        ({"smoothing": {"mode": "some"}}, "must be one of 'none', 'shared', 'modality'"),
        ({"smoothing": {"groups": ["qkv", "kvq"]}}, r"holds \['kvq'\]"),
        ({"compensation": {}}, "exactly one of rank"),
        ({"compensation": {"rank": 4, "rank_ratio": 0.1}}, "exactly one of rank"),
        ({"compensation": {"rank": 0}}, "must be positive"),
        ({"compensation": {"max_bytes": 1.5}}, r"a share in \(0, 1\]"),
        ({"version": 2}, "recipe version 2 is not 1"),
        ({"scheme": "W3A8"}, "unknown scheme 'W3A8'"),
        ({"scheme": {"weights": {"num_bits": 5}}}, "must be 4 or 8"),
        ({"group_size": 64}, "needs a scheme by name"),
        ({"modalities": ["vision"]}, "must include text"),
        ({"modalities": ["text", "smell"]}, "unknown modality 'smell'"),
        ({"modality_weights": {"text": 0, "vision": 1, "audio": 1}}, "must be positive"),
        ({"ignore": ["re:("]}, "is no regular expression"),
        ({"seed": True}, "recipe.seed must be int"),
        ({"encoders": {"smell": "W8A8"}}, "recipe.encoders: unknown modality 'smell'"),
        ({"encoders": {"text": "W8A8"}}, "encoders.text: text has no encoder"),
        ({"encoders": {"vision": "W4A8"}}, "recipe.encoders.vision must be one of 'W8A8', 'W8A16', got 'W4A8'"),
        ({"encoders": ["vision"]}, "recipe.encoders must be a mapping"),
        ({"preset": "best"}, "unknown method 'best'"),
        ({"smoothing": {"mode": "shared", "learned": {}}}, "learned needs smoothing.mode 'modality'"),
    ],
)
def test_mistakes_are_named(data: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


@pytest.mark.parametrize(("content", "message"), [("a: [", "is no YAML"), ("- 1", "must hold a mapping")])
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(file)
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_the_readmes_recipe_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(example)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.rotation == RotationArgs(online_transforms=False, compare=True)
    assert recipe.budget == BudgetArgs(0.05) and recipe.scheme.weights.full_range
    assert recipe.scheme.name == "W4A6" and recipe.scheme.weights.group_size == 64


def test_efforts() -> None:
    """Fast leaves out what takes long and keeps the grid and the rotations; refined adds to the rest."""
    default = Recipe.preset("masquant")
    fast, refined = default.with_effort("fast"), default.with_effort("refined")
    assert default.with_effort("default") == default
    assert not fast.needs_gradients and fast.selection is None and fast.rotation is not None
    assert fast.scheme.weights.full_range and fast.rounding.method == "gptq"
    assert refined.refinement is not None and refined.selection == default.selection
    assert Recipe.preset("gptq").fast() == Recipe.preset("gptq")
    assert Recipe.preset("awq").fast().smoothing == Recipe.preset("awq").smoothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"max_bytes": 3.0}}, "budget.max_bytes"),
        ({"rotation": {"heads": False, "online_transforms": False}}, "rotates nothing"),
        ({"rotation": {"online_transforms": False, "learned": {"steps": 3}}}, "needs online_transforms"),
        ({"gradient": {"cap": 0.0}}, "gradient.cap"),
        ({"refinement": {"steps": 0}}, "refinement.steps"),
        ({"modality_weights": "loudness"}, "modality_weights must be one of"),
        ({"compensation": {"order": "before"}}, "needs tokens 'all'"),
        ({"rounding": {"method": "nearest"}, "budget": {}}, "budget needs rounding.method 'gptq'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_dict({"preset": "masquant", **change})
