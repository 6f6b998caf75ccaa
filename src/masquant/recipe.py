# SPDX-License-Identifier: Apache-2.0
"""What to do to a model: frozen, strict, versioned configuration, and the named recipes.

Every method is a recipe of the same pipeline. `Recipe.preset(name, scheme, group_size)` gives the named ones;
`Recipe.from_yaml` reads a file that may start from one (`preset: masquant`) and change fields.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import RecipeError
from .modality import Modality
from .rotation import Rotations
from .strict import from_plain, to_plain

RECIPE_VERSION = 1
SCHEMES = ("W8A8", "W4A8", "W4A6", "W4A16")
EncoderScheme = Literal["W8A8", "W8A16"]
ENCODER_SCHEMES: dict[EncoderScheme, int] = {"W8A8": 8, "W8A16": 16}  # bits of the linears' inputs
GROUP_NAMES = ("qkv", "o", "gate_up", "down")
AUTO_GROUP_SIZES = (128, 64, 32)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


@dataclass(frozen=True)
class WeightArgs:
    """Weights: symmetric integers. `group_size` None with strategy "group" means the largest of 128, 64, 32 that
    divides a linear's in_features. `full_range` uses all 2^num_bits integers, with scales of either sign."""

    num_bits: int = 4
    strategy: Literal["channel", "group"] = "group"
    group_size: int | None = None
    full_range: bool = False

    def __post_init__(self) -> None:
        _require(self.num_bits in (4, 8), f"weights.num_bits must be 4 or 8, got {self.num_bits}")
        if self.strategy == "channel":
            _require(self.group_size is None, "weights.group_size needs strategy 'group', not 'channel'")
        elif self.group_size is not None:
            _require(
                self.group_size in AUTO_GROUP_SIZES,
                f"weights.group_size must be 32, 64, 128 or absent, got {self.group_size}",
            )

    def group_size_for(self, in_features: int) -> int | None:
        """Inputs per scale for a linear, None for one scale per row.

        Raises:
            RecipeError: no allowed size divides `in_features`.
        """
        if self.strategy == "channel":
            return None
        for size in (self.group_size,) if self.group_size else AUTO_GROUP_SIZES:
            if in_features % size == 0:
                return size
        raise RecipeError(
            f"group size {self.group_size or 'of 128, 64 or 32'} does not divide {in_features} input features; "
            "choose another --group-size or 'channel'"
        )


@dataclass(frozen=True)
class ActivationArgs:
    """Activations: symmetric integers, one dynamic scale per token; 16 leaves them in floating point."""

    num_bits: int = 8

    def __post_init__(self) -> None:
        _require(self.num_bits in (6, 8, 16), f"input_activations.num_bits must be 6, 8 or 16, got {self.num_bits}")


@dataclass(frozen=True)
class Scheme:
    """Grids of weights and activations."""

    weights: WeightArgs = WeightArgs()
    input_activations: ActivationArgs = ActivationArgs()

    @classmethod
    def parse(cls, name: str, group_size: int | Literal["channel"] | None = None) -> Scheme:
        """Scheme of a name like "W4A8".

        Args:
            name: one of `SCHEMES`.
            group_size: 32, 64, 128 or "channel"; default groups for 4-bit weights, channels for 8.
        """
        match = re.fullmatch(r"W(\d+)A(\d+)", name.upper())
        if match is None or name.upper() not in SCHEMES:
            raise RecipeError(f"unknown scheme {name!r}; choose one of {', '.join(SCHEMES)}")
        bits, activation_bits = int(match[1]), int(match[2])
        if group_size == "channel" or (group_size is None and bits == 8):
            weights = WeightArgs(bits, "channel")
        else:
            weights = WeightArgs(bits, "group", None if group_size is None else int(group_size))
        return cls(weights, ActivationArgs(activation_bits))

    @property
    def name(self) -> str:
        """Like "W4A8"."""
        return f"W{self.weights.num_bits}A{self.input_activations.num_bits}"


@dataclass(frozen=True)
class LearnedArgs:
    """Smoothing learned by gradient on each block's output.

    Attributes:
        steps: optimiser steps per block.
        learning_rate: of theta = log(smooth_scale).
        loss: "mae" (paper) or "mse".
        normalizer: `modality_mean` averages over each modality's tokens, `token_mean` over all tokens.
        target: the float block on the quantized chain's inputs, or on the float chain's (paper).
        patience: evaluations without a better loss until it stops.
        batches_per_step: whose losses one step lowers; of several processes no more than these work at once.
    """

    steps: int = 128
    learning_rate: float = 0.02
    loss: Literal["mae", "mse"] = "mae"
    normalizer: Literal["token_mean", "modality_mean"] = "modality_mean"
    target: Literal["quantized_chain", "float_chain"] = "quantized_chain"
    patience: int = 3
    batches_per_step: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batches_per_step", "patience"):
            _require(getattr(self, name) > 0, f"learned.{name} must be positive, got {getattr(self, name)}")
        _require(0 < self.learning_rate < 1, f"learned.learning_rate must be in (0, 1), got {self.learning_rate}")


@dataclass(frozen=True)
class SmoothingArgs:
    """Smoothing vectors.

    Attributes:
        mode: no smoothing, one vector for all tokens, or one per modality.
        strength: share of an activation's range moved into the weight.
        formula: of the vector: `smoothquant` (absmax of input and weight) or `awq` (mean magnitude of the input).
        groups: the linear groups that are smoothed.
        learned: refine the vectors by gradient.
    """

    mode: Literal["none", "shared", "modality"] = "modality"
    strength: float = 0.5
    formula: Literal["smoothquant", "awq"] = "smoothquant"
    groups: tuple[str, ...] = GROUP_NAMES
    learned: LearnedArgs | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.strength <= 1, f"smoothing.strength must be in 0..1, got {self.strength}")
        unknown = set(self.groups) - set(GROUP_NAMES)
        _require(not unknown, f"smoothing.groups holds {sorted(unknown)}; known: {', '.join(GROUP_NAMES)}")
        _require(self.learned is None or self.mode == "modality", "smoothing.learned needs smoothing.mode 'modality'")


@dataclass(frozen=True)
class RoundingArgs:
    """How weights become integers.

    Attributes:
        method: to nearest, or error-compensated.
        damping: share of the Hessian's mean diagonal added to it.
        clip_search: search each scale's clipping ratio by weighted error.
        balance: in the Hessian, count every token once, every modality's output energy equally, or every token by how
            much the answers depend on it (see `GradientArgs`).
    """

    method: Literal["nearest", "gptq"] = "gptq"
    damping: float = 0.01
    clip_search: bool = True
    balance: Literal["token", "modality", "gradient"] = "modality"

    def __post_init__(self) -> None:
        _require(0 < self.damping <= 1, f"rounding.damping must be in (0, 1], got {self.damping}")


@dataclass(frozen=True)
class GradientArgs:
    """How the answers' dependence on each token is measured (`calibration.gradients`).

    Attributes:
        samples: backward passes per calibration sample.
        floor: share of a token's weight that does not depend on its gradient.
        cap: quantile at which gradients are cut: a few tokens (attention sinks) have gradients thousands of times
            those of all others, far beyond where a quadratic loss holds.
    """

    samples: int = 1
    floor: float = 0.5
    cap: float = 0.995

    def __post_init__(self) -> None:
        _require(self.samples > 0, f"gradient.samples must be positive, got {self.samples}")
        _require(0 <= self.floor <= 1, f"gradient.floor must be in 0..1, got {self.floor}")
        _require(0 < self.cap <= 1, f"gradient.cap is a quantile in (0, 1], got {self.cap}")


@dataclass(frozen=True)
class RefinementArgs:
    """Rounding and scales refined by signed gradient on each block's output (`refinement`).

    Attributes:
        steps: per block, one batch each.
        learning_rate: of the offsets within the rounding cell, falling linearly to zero.
        scale_rate: of the scales' logarithms, relative to it.
        evaluations: how often the loss on the deciding samples is looked at.
    """

    steps: int = 60
    learning_rate: float = 0.01
    scale_rate: float = 0.02
    evaluations: int = 5

    def __post_init__(self) -> None:
        _require(self.steps > 0 and self.evaluations > 0, "refinement.steps and evaluations must be positive")
        _require(0 < self.learning_rate < 1, f"refinement.learning_rate must be in (0, 1), got {self.learning_rate}")
        _require(0 <= self.scale_rate <= 1, f"refinement.scale_rate must be in 0..1, got {self.scale_rate}")


@dataclass(frozen=True)
class BudgetArgs:
    """One byte budget for the whole decoder, spent where it removes most loss (`allocation`): group sizes, more bits
    for the linears that need them, and patches.

    Attributes:
        max_bytes: bytes beyond those of the scheme with its own group size, as a share of them.
        patches: share of all bytes that is kept for patches; what a patch costs must remove more loss than the last
            bytes spent on weights.
    """

    max_bytes: float = 0.0
    patches: float = 0.01

    def __post_init__(self) -> None:
        _require(-0.2 <= self.max_bytes <= 1, f"budget.max_bytes must be in -0.2..1, got {self.max_bytes}")
        _require(0 <= self.patches <= 0.5, f"budget.patches must be in 0..0.5, got {self.patches}")


@dataclass(frozen=True)
class LearnedRotationArgs:
    """The residual stream's rotation learned from the weights (`rotation_learning`).

    Attributes:
        steps: of steepest descent.
        learning_rate: largest turn of a step, in radians.
        rows: sampled of every linear.
    """

    steps: int = 60
    learning_rate: float = 0.05
    rows: int = 32

    def __post_init__(self) -> None:
        _require(self.steps > 0 and self.rows > 0, "rotation.learned.steps and rows must be positive")
        _require(0 < self.learning_rate <= 1, f"rotation.learned.learning_rate is in (0, 1], got {self.learning_rate}")


@dataclass(frozen=True)
class RotationArgs:
    """Rotations that spread outliers over channels (QuaRot).

    Attributes:
        heads: values within each head; folded into the weights, costs nothing.
        online_transforms: also what cannot be folded and runs with the model: the residual stream (once at the
            decoder's entrance and once at its end) and the input of `down`.
        residual: of these, the residual stream.
        seed: of the rotations' signs.
        learned: learn the residual stream's; a matrix that is stored with the checkpoint.
        compare: round the first blocks with and without the rotations, and leave them out where that is better.
    """

    heads: bool = True
    online_transforms: bool = True
    residual: bool = True
    seed: int = 0
    learned: LearnedRotationArgs | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"rotation.seed must not be negative, got {self.seed}")
        _require(self.heads or self.online_transforms, "rotation without heads and online_transforms rotates nothing")
        _require(
            self.learned is None or (self.online_transforms and self.residual),
            "rotation.learned turns the residual stream, which needs online_transforms and residual",
        )


@dataclass(frozen=True)
class CompensationArgs:
    """Low-rank patches; exactly one of rank, rank_ratio, max_bytes.

    Attributes:
        tokens: one patch for each modality other than text, or one for all tokens.
        order: patch what is left after rounding, or take the patch off first and round what is left (SVDQuant).
        rank: the rank itself.
        rank_ratio: share of min(in, out).
        max_bytes: share of the group's packed bytes, over all modalities.
        min_rank: rounds up small ranks (the paper's code never goes below 32).
        groups: the linear groups that are patched.
        factors: how they are stored: bfloat16, or integers of 8 bits with one scale per rank; `auto` takes integers
            unless their rounding costs more than the bytes they save would buy (with a budget; else integers).
    """

    tokens: Literal["modality", "all"] = "modality"
    order: Literal["after", "before"] = "after"
    rank: int | None = None
    rank_ratio: float | None = None
    max_bytes: float | None = None
    min_rank: int = 0
    groups: tuple[str, ...] = GROUP_NAMES
    factors: Literal["bfloat16", "int8", "auto"] = "bfloat16"

    def __post_init__(self) -> None:
        _require(self.order == "after" or self.tokens == "all", "compensation.order 'before' needs tokens 'all'")
        given = [name for name in ("rank", "rank_ratio", "max_bytes") if getattr(self, name) is not None]
        _require(
            len(given) == 1,
            f"compensation needs exactly one of rank, rank_ratio and max_bytes, got {', '.join(given) or 'none'}",
        )
        _require(self.rank is None or self.rank > 0, f"compensation.rank must be positive, got {self.rank}")
        for name in ("rank_ratio", "max_bytes"):
            value = getattr(self, name)
            _require(value is None or 0 < value <= 1, f"compensation.{name} is a share in (0, 1], got {value}")
        unknown = set(self.groups) - set(GROUP_NAMES)
        _require(not unknown, f"compensation.groups holds {sorted(unknown)}; known: {', '.join(GROUP_NAMES)}")


@dataclass(frozen=True)
class SelectionArgs:
    """Choice of the vectors and of the patch per group, by the error left on held-back calibration samples.

    Attributes:
        held_back: share of the calibration samples that only decide.
        strengths: smoothing strengths tried.
        spreads: distances from the shared vector (0) to each modality's own (1) tried.
        margin: relative gain in error below which the simpler choice is kept.
        byte_price: relative gain in error that vectors and patches must bring per relative byte. Halving the group
            size brings about 2: 6 % of bytes, 12 % of the squared error. Patches that brought 2 to 8 changed nothing
            measurable in the loss on other samples.
        activation_share: vectors are tried only where at least this share of some modality's error comes from rounding
            the activations: they move error between activations and weights, and cannot remove what is not there.
        protect: refuse what makes any modality worse than the simplest choice does.
    """

    held_back: float = 0.15
    strengths: tuple[float, ...] = (0.0, 0.35, 0.65)
    spreads: tuple[float, ...] = (0.0, 0.5)
    margin: float = 0.01
    byte_price: float = 8.0
    activation_share: float = 0.1
    protect: bool = True

    def __post_init__(self) -> None:
        _require(0 <= self.activation_share <= 1, "selection.activation_share is a share in 0..1")
        _require(self.byte_price >= 0, f"selection.byte_price must not be negative, got {self.byte_price}")
        _require(0 < self.held_back <= 0.5, f"selection.held_back must be in (0, 0.5], got {self.held_back}")
        _require(bool(self.strengths) and all(0 <= s <= 1 for s in self.strengths), "selection.strengths: 0..1")
        _require(bool(self.spreads) and all(0 <= s <= 1 for s in self.spreads), "selection.spreads: 0..1")
        _require(0 <= self.margin < 1, f"selection.margin must be in [0, 1), got {self.margin}")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        method: name for reports.
        modalities: the modalities that the recipe provides for; a model with others is refused.
        modality_weights: importance of each modality's error, or "gradient": by the mean magnitude of the answers'
            gradient at its tokens, per block (MBQ, arXiv 2412.19509).
        ignore: linears that stay in floating point: names below the decoder, or "re:" and a regular expression.
        encoders: by modality, the scheme of its encoder's linears, W8A8 or W8A16, rounded to nearest with one scale
            per row; encoders that are not named stay in floating point, as does everything else outside of the decoder
            blocks. `ignore` applies to them too, with names from the encoder on.
        quantize_lm_head: embeddings and head get 8-bit rows; a head that is tied to the embeddings stays so.
    """

    scheme: Scheme = Scheme()
    method: str = "masquant"
    smoothing: SmoothingArgs = SmoothingArgs()
    rounding: RoundingArgs = RoundingArgs()
    compensation: CompensationArgs | None = None
    selection: SelectionArgs | None = None
    rotation: RotationArgs | None = None
    gradient: GradientArgs = GradientArgs()
    budget: BudgetArgs | None = None
    refinement: RefinementArgs | None = None
    modalities: tuple[Modality, ...] = tuple(Modality)
    modality_weights: Mapping[Modality, float] | Literal["gradient"] = field(
        default_factory=lambda: dict.fromkeys(Modality, 1.0)
    )
    ignore: tuple[str, ...] = ()
    encoders: Mapping[Modality, EncoderScheme] = field(default_factory=dict)
    quantize_lm_head: bool = False
    seed: int = 0
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        _require(self.version == RECIPE_VERSION, f"recipe version {self.version} is not {RECIPE_VERSION}")
        _require(Modality.TEXT in self.modalities, "recipe.modalities must include text")
        if not isinstance(self.modality_weights, str):
            missing = [m.value for m in self.modalities if m not in self.modality_weights]
            _require(not missing, f"modality_weights lacks {', '.join(missing)}")
            _require(all(w > 0 for w in self.modality_weights.values()), "modality_weights must be positive")
        _require(
            self.budget is None or self.rounding.method == "gptq",
            "budget needs rounding.method 'gptq': the loss it expects is that of error-compensated rounding",
        )
        for modality, scheme in self.encoders.items():
            where = f"encoders.{modality.value}"
            _require(modality is not Modality.TEXT, f"{where}: text has no encoder; choose vision or audio")
            _require(scheme in ENCODER_SCHEMES, f"{where} must be {' or '.join(ENCODER_SCHEMES)}, got {scheme!r}")
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise RecipeError(f"ignore pattern {pattern!r} is no regular expression: {error}") from error

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of the inputs are needed, and not only their ranges."""
        rounding = self.rounding.method == "gptq" or self.rounding.clip_search
        return rounding or self.compensation is not None or self.smoothing.mode == "modality"

    @property
    def needs_gradients(self) -> bool:
        """Whether the answers' gradient is needed."""
        by_gradient = self.rounding.balance == "gradient" or self.modality_weights == "gradient"
        return by_gradient or self.budget is not None

    @property
    def rotations(self) -> Rotations | None:
        """The model's rotations."""
        if self.rotation is None:
            return None
        online = self.rotation.online_transforms
        learned = self.rotation.learned is not None
        residual = online and self.rotation.residual
        return Rotations(self.rotation.seed, residual, self.rotation.heads, ("down",) if online else (), learned)

    def fast(self) -> Recipe:
        """What takes long left out: no candidates are compared, no gradients measured, nothing is refined."""
        if self.selection is None:
            return self
        if self.rounding.method == "nearest":
            return dataclasses.replace(self, selection=None)  # the vector at its fixed strength is all there is
        return dataclasses.replace(
            self,
            smoothing=SmoothingArgs("none"),
            rounding=dataclasses.replace(self.rounding, balance="token"),
            modality_weights=dict.fromkeys(Modality, 1.0),
            compensation=None,
            selection=None,
            budget=None,
            refinement=None,
        )

    def refined(self) -> Recipe:
        """The same with rounding and scales refined by gradient, block by block; takes several times as long."""
        return dataclasses.replace(self, refinement=self.refinement or RefinementArgs())

    def with_effort(self, effort: Literal["default", "fast", "refined"]) -> Recipe:
        """The recipe itself, `fast` or `refined`."""
        return {"default": lambda: self, "fast": self.fast, "refined": self.refined}[effort]()

    @classmethod
    def preset(
        cls, method: str, scheme: str = "W4A8", group_size: int | Literal["channel"] | None = None, **changes: Any
    ) -> Recipe:
        """A named recipe (see `PRESETS`), with fields changed by keyword."""
        if method not in PRESETS:
            raise RecipeError(f"unknown method {method!r}; choose one of {', '.join(PRESETS)}")
        fields = {"method": method, **PRESETS[method], **changes}
        parsed = Scheme.parse(scheme, group_size)
        weights = dataclasses.replace(parsed.weights, full_range=method in FULL_RANGE)
        return cls(scheme=dataclasses.replace(parsed, weights=weights), **fields)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Recipe of a nested mapping; `preset`, `scheme` as a name, and `group_size` are allowed at the top.

        Raises:
            RecipeError: an unknown key, a wrong type, or values that do not fit together.
        """
        rest = dict(data)
        base: dict[str, Any] = {}
        method = rest.pop("preset", None)
        group_size = rest.pop("group_size", None)
        if method is not None:
            base = to_plain(cls.preset(str(method)))
        if isinstance(rest.get("scheme"), str):
            scheme = to_plain(Scheme.parse(rest["scheme"], group_size))
            if base:
                scheme["weights"]["full_range"] = base["scheme"]["weights"]["full_range"]
            rest["scheme"] = scheme
        elif group_size is not None:
            raise RecipeError("group_size at the top of a recipe needs a scheme by name, such as scheme: W4A8")
        return from_plain(cls, _merge(base, rest), "recipe")

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Recipe of a YAML file."""
        try:
            data = yaml.safe_load(path.read_text())
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is no YAML: {error}") from error
        if not isinstance(data, Mapping):
            raise RecipeError(f"{path} must hold a mapping, got {type(data).__name__}")
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict that `from_dict` reads back."""
        return typing.cast(dict[str, Any], to_plain(self))

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


_NEAREST = RoundingArgs("nearest", clip_search=False)
_SEARCHED = tuple(i / 20 for i in range(20))

PRESETS: dict[str, dict[str, Any]] = {
    "rtn": {"smoothing": SmoothingArgs("none"), "rounding": _NEAREST},
    "smoothquant": {
        "smoothing": SmoothingArgs("shared"),
        "rounding": _NEAREST,
        "selection": SelectionArgs(
            strengths=tuple(i / 10 for i in range(10)), margin=0.0, activation_share=0.0, protect=False
        ),
    },
    "awq": {
        "smoothing": SmoothingArgs("shared", formula="awq"),
        "rounding": RoundingArgs("nearest", balance="token"),
        "selection": SelectionArgs(strengths=_SEARCHED, margin=0.0, activation_share=0.0, protect=False),
    },
    "gptq": {"smoothing": SmoothingArgs("none"), "rounding": RoundingArgs("gptq", balance="token")},
    "mbq": {
        "smoothing": SmoothingArgs("shared", formula="awq"),
        "rounding": RoundingArgs("nearest", balance="token"),
        "selection": SelectionArgs(strengths=_SEARCHED, margin=0.0, activation_share=0.0, protect=False),
        "modality_weights": "gradient",
    },
    "quarot": {
        "smoothing": SmoothingArgs("none"),
        "rounding": RoundingArgs("gptq", balance="token"),
        "rotation": RotationArgs(),
    },
    "svdquant": {
        "smoothing": SmoothingArgs("shared"),
        "rounding": RoundingArgs("gptq", balance="token"),
        "compensation": CompensationArgs(tokens="all", order="before", rank=32),
    },
    "masquant-paper": {
        "smoothing": SmoothingArgs(
            "modality",
            groups=("qkv", "o", "gate_up"),
            learned=LearnedArgs(256, 0.02, "mae", "token_mean", "float_chain", patience=8),
        ),
        "rounding": _NEAREST,
        "compensation": CompensationArgs(rank_ratio=0.05, min_rank=32, groups=("qkv", "o", "gate_up")),
    },
    "masquant": {
        "smoothing": SmoothingArgs("modality"),
        "rounding": RoundingArgs("gptq", balance="gradient"),
        "compensation": CompensationArgs(max_bytes=0.05, factors="auto"),
        "selection": SelectionArgs(),
        "rotation": RotationArgs(compare=True),
    },
}
FULL_RANGE = {"masquant"}  # methods whose weights use every integer of their bits


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes`; a changed way to give the patch's rank replaces the preset's."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            inner = dict(merged[key])
            if key == "compensation" and {"rank", "rank_ratio", "max_bytes"} & set(value):
                inner.update(rank=None, rank_ratio=None, max_bytes=None)
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged
