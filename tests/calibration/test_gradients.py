"""Token gradients: equal to plain backpropagation through the whole model, and of the promised mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_processor, tiny_samples
from torch import Tensor

import masquant
from masquant.blocks import ResidentBlocks
from masquant.calibration.block_inputs import capture_block_inputs
from masquant.calibration.encoding import SampleEncoder
from masquant.calibration.gradients import TokenGradients, token_gradients
from masquant.models import (
    core_of,
    decoder_blocks,
    family_of,
    groups_of,
    linearize,
    modality_tokens_of,
    token_rows,
)
from masquant.progress import NoProgress


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_backpropagation_through_the_model(family: str, tmp_path: Path) -> None:
    model = core_of(tiny_model(family))
    samples = masquant.load_samples(tiny_samples(family, tmp_path, count=4))
    batch = next(iter(SampleEncoder(tiny_processor(family)).batches(samples, 4)))
    inputs = capture_block_inputs(model, [batch], modality_tokens_of(model.config))
    description, trainable = family_of(model.config), [p.requires_grad for p in model.parameters()]
    found = token_gradients(
        ResidentBlocks(model), inputs, samples=2, seed=3, device=torch.device("cpu"), progress=NoProgress()
    )

    assert [p.requires_grad for p in model.parameters()] == trainable
    outputs: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}

    def keep(key: tuple[int, str], rows: Callable[[], Tensor | None]) -> Any:
        everything = torch.arange(batch.answer_mask.numel())
        return lambda _m, _a, y: outputs.setdefault(key, []).append((y, everything if rows() is None else rows()))

    for index, block in enumerate(decoder_blocks(model)):
        for group in groups_of(linearize(block, description), description):
            for linear in group.linears:
                hook = keep((index, group.name), token_rows(block, linear))
                block.get_submodule(linear).register_forward_hook(hook)
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1][batch.answer_mask[:, 1:]].float()
    p = logits.detach().softmax(-1)
    generator = torch.Generator().manual_seed(3)
    wanted = {key: torch.zeros(batch.answer_mask.shape) for key in outputs}
    for _ in range(2):
        noise = torch.randn(p.shape, generator=generator) * p.sqrt()
        z = noise - p * noise.sum(-1, keepdim=True)
        flat = [(key, y, rows) for key, ys in outputs.items() for y, rows in ys]
        gradients = torch.autograd.grad((logits * z).sum(), [y for _, y, _ in flat], retain_graph=True)
        for (key, _, rows), g in zip(flat, gradients, strict=True):
            wanted[key].view(-1).index_add_(0, rows, g.square().sum(-1).flatten() / 2)
    config = model.get_decoder().config
    shared = getattr(config, "num_kv_shared_layers", 0)  # keys and values of other blocks count as given
    exact = range(config.num_hidden_layers - shared if shared else 0, config.num_hidden_layers)
    for (index, name), value in ((key, value) for key, value in wanted.items() if key[0] in exact):
        torch.testing.assert_close(found.squared[index][name][0], value, rtol=1e-3, atol=1e-9)


def test_directions_have_the_softmax_covariance() -> None:
    """z = e sqrt(p) - p sum(e sqrt(p)) has covariance diag(p) - p p^T."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    noise = torch.randn(400_000, 4, dtype=torch.float64) * p.sqrt()
    z = noise - p * noise.sum(-1, keepdim=True)
    torch.testing.assert_close(z.t() @ z / len(z), torch.diag(p) - torch.outer(p, p), rtol=0, atol=3e-3)


def test_weights_have_mean_one_and_a_floor() -> None:
    masks = [torch.tensor([[False, True, True]]), torch.tensor([[True, True, True]])]
    squared = [torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[0.0, 1.0, 6.0]])]
    gradients = TokenGradients([{"o": squared, "dead": [torch.zeros(1, 3)] * 2}])
    weights = gradients.weights(0, masks, 0.25)
    chosen = torch.cat([w[m] for w, m in zip(weights["o"], masks, strict=True)])
    assert float(chosen.mean()) == pytest.approx(1.0) and float(chosen.min()) == 0.25
    assert float(chosen[0]) == pytest.approx(0.25 + 0.75 * 3 / 2)
    assert all(bool((w == 1).all()) for w in weights["dead"])
    ids = [torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]])]
    means = gradients.modality_means(0, "o", ids, masks, 3)
    text, vision = (3**0.5 + 0) / 2, (0 + 1 + 6**0.5) / 3
    assert means == pytest.approx([text / vision, 1.0, 1e-3])
