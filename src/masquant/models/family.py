# SPDX-License-Identifier: Apache-2.0
"""What is special about a model family, as data: which linears share an input and what folds where, which tokens are
media, and what cannot be done exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..modality import Modality


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that are fed by one input and so share `smooth_scale` and the patch's `a`.

    Attributes:
        name: `qkv`, `o`, `gate_up` or `down`; before it, with a dot, its expert or kind of layer.
        linears: module names inside the block, in the order in which the block calls them.
        fold_into: module whose output feeds the group and takes text's smoothing vector, so that text pays nothing.
        fold_kind: `norm` divides the norm's weight; `rows` divides the rows (and bias) of a linear; `heads` likewise
            where each of its heads feeds several query heads (grouped-query attention); `none` where nothing can be
            divided exactly.
        writes_residual: whether its outputs are added to the residual stream (which `norm` groups read).
        folds_text: whether text's vector can be folded there; if not, the group has none for text.
        readers: modules with a weight [.., hidden] that stay in floating point and read what the norm `fold_into`
            gives, such as the router of experts.
        optional: those of `linears` that some blocks lack; a block that has none of a group's linears lacks the group.
        rotates_heads: whether the values of a `heads` group can be rotated within each head: nothing but the attention
            lies between.
        fused: `fold_into` is one linear for several things, of which only the last rows feed the group.
    """

    name: str
    linears: tuple[str, ...]
    fold_into: str
    fold_kind: Literal["norm", "rows", "heads", "none"]
    writes_residual: bool = False
    folds_text: bool = True
    readers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rotates_heads: bool = True
    fused: bool = False

    @property
    def role(self) -> str:
        """`qkv`, `o`, `gate_up` or `down`."""
        return self.name.rpartition(".")[2]


LLAMA_GROUPS = (
    LinearGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"),
    LinearGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads", writes_residual=True),
    LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm"),
    LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows", writes_residual=True),
)

EXPERT_GROUPS = (  # one norm feeds all experts and the router, so it cannot take each expert's vector
    LinearGroup(
        "experts.{}.gate_up",
        ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        "post_attention_layernorm",
        "norm",
        folds_text=False,
        readers=("mlp.gate",),
    ),
    LinearGroup(
        "experts.{}.down", ("mlp.experts.{}.down_proj",), "mlp.experts.{}.up_proj", "rows", writes_residual=True
    ),
)

GEMMA_GROUPS = (  # norms follow attention and MLP, so what these write is not what the stream gets
    LinearGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"),
    LinearGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"),
    LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", "norm"),
    LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj", "rows"),
)


@dataclass(frozen=True)
class ModelFamily:
    """A model family.

    Attributes:
        model_types: `config.model_type` of the models it covers.
        title: name for people.
        modality_tokens: per modality other than text, the config fields that hold its placeholder token ids; a dot
            goes into a part of the config.
        encoders: module names (below the language model or its inner model) of the encoders with their projectors, and
            whose tokens they make. They stay in floating point unless a recipe says otherwise.
        others: names of modules that always stay in floating point, in an encoder (from its name on) or beside all.
        example: a hub id for the documentation.
        groups: the decoder block's linear groups.
        experts: the module of a block that holds its experts, if blocks have any.
        expert_groups: the groups of one expert, `{}` for its number. A block that has experts may lack the linears of
            other groups.
        kept: linears of a block that stay unquantized.
        core: the submodule that is the multimodal language model, where the whole model is more; what its config is
            called is this and `_config`. The rest stays unquantized.
        norm_offset: what the norms before linears add to their weight before they multiply with it.
        unrotated: why the residual stream cannot be rotated exactly, if it cannot.
        stream_inputs: keyword arguments of the decoder's forward that it adds to the residual stream between blocks.
        mixes_media: whether samples with different media may share a batch without changing each other.
        last_tokens: whether some blocks get only the last tokens of each sample when text is generated.
        side_file: a method of the model and the file that it must read after the weights; the class's own
            from_pretrained does so too, but cannot say what it loaded.
        remark: what a user should know.
    """

    model_types: tuple[str, ...]
    title: str
    modality_tokens: Mapping[Modality, tuple[str, ...]]
    encoders: Mapping[str, Modality]
    example: str
    others: tuple[str, ...] = ()
    groups: tuple[LinearGroup, ...] = field(default=LLAMA_GROUPS)
    experts: str = ""
    expert_groups: tuple[LinearGroup, ...] = ()
    kept: tuple[str, ...] = ()
    core: str = ""
    norm_offset: float = 0.0
    unrotated: str = ""
    stream_inputs: tuple[str, ...] = ()
    mixes_media: bool = True
    last_tokens: bool = False
    side_file: tuple[str, str] | None = None
    remark: str = ""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Text first, then in the order of `Modality`."""
        return tuple(m for m in Modality if m is Modality.TEXT or m in self.modality_tokens)

    def encoder_of(self, name: str) -> tuple[str, str] | None:
        """The encoder that a module or tensor belongs to, and its name from that encoder on; None outside of all.

        Args:
            name: in a model or a checkpoint, which differ in what comes before the encoder's name.
        """
        for encoder in self.encoders:
            _, found, rest = f".{name}.".partition(f".{encoder}.")
            if found:
                return encoder, f"{encoder}.{rest}".rstrip(".")
        return None
