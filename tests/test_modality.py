"""Routing: every token has one modality, hooks publish it, and nothing falls back to text."""

import pytest
import torch
from torch import Tensor, nn

from masquant.errors import ModelError
from masquant.modality import Modality, ModalityState, ModalityTokens, attach_routing, modality_ids, override_ids

TOKENS = ModalityTokens(tuple(Modality), {Modality.VISION: (90, 92), Modality.AUDIO: (91,)})


class Decoder(nn.Module):
    def __init__(self, state: ModalityState) -> None:
        super().__init__()
        self.seen: list[Tensor | None] = []
        self.state = state

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        self.seen.append(self.state.ids)
        if inputs_embeds is None:
            raise ValueError("no embeddings")
        return inputs_embeds


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = ModalityState(TOKENS)
        self.decoder = Decoder(self.state)
        attach_routing(self, self.decoder, self.state)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = torch.zeros(*input_ids.shape, 4)
        return self.decoder(inputs_embeds=inputs_embeds)


def test_tokens_are_partitioned() -> None:
    input_ids = torch.tensor([[1, 90, 91, 92, 0], [5, 5, 5, 91, 91]])
    ids = modality_ids(input_ids, TOKENS)
    assert ids.dtype == torch.uint8
    assert ids.tolist() == [[0, 1, 2, 1, 0], [0, 0, 0, 2, 2]]


def test_rows_are_positions_in_the_models_own_modalities() -> None:
    tokens = ModalityTokens((Modality.TEXT, Modality.AUDIO), {Modality.AUDIO: (91,)})
    assert modality_ids(torch.tensor([[90, 91]]), tokens).tolist() == [[0, 1]]


def test_one_token_for_two_modalities_is_refused() -> None:
    with pytest.raises(ModelError, match="token id 7 is declared for both vision and audio"):
        ModalityTokens(tuple(Modality), {Modality.VISION: (7,), Modality.AUDIO: (7,)})


def test_float_input_ids_are_refused() -> None:
    with pytest.raises(ModelError, match="must be integers"):
        modality_ids(torch.zeros(1, 2), TOKENS)


@pytest.mark.parametrize("positional", [True, False])
def test_hooks_publish_and_clear(positional: bool) -> None:
    model = Model()
    input_ids = torch.tensor([[1, 90, 91]])
    model(input_ids) if positional else model(input_ids=input_ids)
    seen = model.decoder.seen[0]
    assert seen is not None and seen.tolist() == [[0, 1, 2]]
    assert model.state.ids is None


def test_state_is_cleared_after_an_error() -> None:
    model = Model()
    with pytest.raises(ModelError, match="inputs_embeds and no input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 4))
    model(torch.tensor([[1, 90]]))
    assert model.state.depth == 0 and model.state.ids is None


def test_embeddings_need_explicit_ids() -> None:
    model = Model()
    with override_ids(model.state, torch.tensor([[0, 2, 1]], dtype=torch.uint8)):
        model(inputs_embeds=torch.zeros(1, 3, 4))
    assert model.decoder.seen[-1].tolist() == [[0, 2, 1]]  # type: ignore[union-attr]
    model(inputs_embeds=torch.zeros(1, 4, 4), mm_token_type_ids=torch.tensor([[0, 1, 2, 3]]))
    assert model.decoder.seen[-1].tolist() == [[0, 1, 1, 2]]  # type: ignore[union-attr]


def test_unknown_ids_are_refused() -> None:
    state = ModalityState(TOKENS)
    with (
        pytest.raises(ModelError, match="modality id 3 is unknown"),
        override_ids(state, torch.tensor([[3]], dtype=torch.uint8)),
    ):
        pass
    with pytest.raises(ModelError, match="must be uint8"), override_ids(state, torch.tensor([[1]])):
        pass


def test_rows_for() -> None:
    state = ModalityState(TOKENS)
    with pytest.raises(ModelError, match="outside of the model's forward pass"):
        state.rows_for(torch.zeros(1, 2, 4))
    state.set(torch.zeros(1, 2, dtype=torch.uint8))
    assert state.rows_for(torch.zeros(1, 2, 4)) is None  # text only
    state.set(torch.tensor([[0, 1]], dtype=torch.uint8))
    for shape in ((1, 2, 4), (2, 4), (2, 1, 4)):
        rows = state.rows_for(torch.zeros(shape))
        assert rows is not None and rows.tolist() == [0, 1]
    with pytest.raises(ModelError, match="cannot route"):
        state.rows_for(torch.zeros(1, 3, 4))
