# SPDX-License-Identifier: Apache-2.0
"""Running a model on batches: only the answers' logits, plain greedy decoding, nothing left behind on the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_processor, tiny_samples
from torch import Tensor
from transformers import GenerationConfig

import masquant
from masquant.calibration.dataset import Sample
from masquant.calibration.encoding import EncodedBatch, SampleEncoder, group_batches
from masquant.errors import DataError, ModelError
from masquant.evaluation import scoring
from masquant.evaluation.scoring import (
    AnswerLogits,
    answer_logits,
    decode_answers,
    evaluating,
    sample_scores,
    token_scores,
)
from masquant.models import core_of

FAMILY = "qwen2_5_omni"


def loaded(family: str, folder: Path, count: int = 8) -> tuple[Any, SampleEncoder, list[Sample]]:
    samples = masquant.load_samples(tiny_samples(family, folder, count=count))
    return tiny_model(family), SampleEncoder(tiny_processor(family)), samples


def wanted_logits(model: Any, batch: EncodedBatch) -> Tensor:
    """All logits, and then those one before each answer token, position by position."""
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    rows = [logits[b, t - 1] for b, t in batch.answer_mask.nonzero().tolist()]
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answers_are_projected(family: str, tmp_path: Path) -> None:
    model, encoder, samples = loaded(family, tmp_path)
    shapes: list[tuple[int, ...]] = []
    hook = core_of(model).get_output_embeddings().register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape)))
    _, batches = group_batches(encoder, samples, 3)
    for batch in batches:
        found = answer_logits(model, batch)
        count = int(batch.answer_mask.sum())
        assert shapes[-1][:2] == (1, count)
        torch.testing.assert_close(found.logits, wanted_logits(core_of(model), batch), rtol=1e-4, atol=1e-4)
        assert found.targets.tolist() == batch.inputs["input_ids"][batch.answer_mask].tolist()
        assert found.samples.tolist() == batch.answer_mask.nonzero()[:, 0].tolist()
    hook.remove()
    assert not core_of(model).get_output_embeddings()._forward_pre_hooks


def test_a_model_that_hides_its_head_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder, samples = loaded(FAMILY, tmp_path)
    batch = encoder.encode(samples[:1])
    wanted = answer_logits(model, batch).logits
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    torch.testing.assert_close(answer_logits(model, batch).logits, wanted, rtol=1e-4, atol=1e-4)


def test_logits_of_other_positions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder, samples = loaded(FAMILY, tmp_path)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: torch.cat([output, output], dim=1))
    with pytest.raises(ModelError, match="cannot be matched with the answers' tokens"):
        answer_logits(model, encoder.encode(samples[:2]))
    assert not head._forward_pre_hooks


def test_batches_hold_one_kind_of_media_and_every_sample_once(tmp_path: Path) -> None:
    _, encoder, samples = loaded(FAMILY, tmp_path, count=13)
    total, batches = group_batches(encoder, samples, 3)
    found = [batch.samples for batch in batches]
    assert len(found) == total
    assert sorted(s.id for batch in found for s in batch) == sorted(s.id for s in samples)
    assert all(len({(s.media, s.text is None) for s in batch}) == 1 for batch in found)
    _, again = group_batches(encoder, list(reversed(samples)), 3)
    assert [batch.samples for batch in again] == found


def test_scores_do_not_depend_on_how_many_rows_are_handled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(7, 30, generator=g).bfloat16() for _ in range(2))
    answers = AnswerLogits(logits, torch.randint(0, 30, (7,), generator=g), torch.tensor([0, 0, 0, 1, 1, 2, 2]))
    whole = token_scores(answers, reference)
    monkeypatch.setattr(scoring, "_FLOATS_AT_A_TIME", 60)
    parts = token_scores(answers, reference)
    assert torch.equal(whole.nll, parts.nll)
    assert whole.kl is not None and parts.kl is not None and torch.equal(whole.kl, parts.kl)
    assert whole.agreed is not None and parts.agreed is not None and torch.equal(whole.agreed, parts.agreed)
    wanted = torch.nn.functional.cross_entropy(logits.float(), answers.targets, reduction="none")
    torch.testing.assert_close(whole.nll.float(), wanted)
    alone = token_scores(answers, None)
    assert torch.equal(alone.nll, whole.nll) and alone.kl is None and alone.agreed is None


def test_the_sample_whose_likelihood_is_not_finite_is_named() -> None:
    samples = (Sample("fine", "a", prompt="p", answer="x"), Sample("broken", "a", prompt="p", answer="x"))
    logits = torch.zeros(2, 5)
    logits[1, 3] = float("nan")
    answers = AnswerLogits(logits, torch.tensor([0, 1]), torch.tensor([0, 1]))
    batch = EncodedBatch(samples, {}, torch.tensor([[False, True], [False, True]]))
    with pytest.raises(DataError, match="sample broken: the model's likelihood of the answer is nan"):
        sample_scores(batch, answers, token_scores(answers, None))


def greedy(model: Any, encoder: SampleEncoder, sample: Sample, steps: int, stop: Sequence[int]) -> str:
    """By repeated whole forward passes of one sample."""
    batch = encoder.encode([sample], with_answer=False)
    inputs = dict(batch.inputs)
    tokens: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(**inputs, use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        tokens.append(token)
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], dim=1)
    return str(encoder.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def test_decoding_is_greedy_whatever_the_generation_config_says(tmp_path: Path) -> None:
    model, encoder, samples = loaded(FAMILY, tmp_path, count=12)
    # samples, repeats with a penalty, and has no padding token, as on the hub
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_p=0.001,
        top_k=1,
        repetition_penalty=1.5,
        eos_token_id=model.generation_config.eos_token_id,
    )
    asked = [s for s in samples if s.text is None]
    stop = model.generation_config.eos_token_id
    wanted = {s.id: greedy(model, encoder, s, 5, stop if isinstance(stop, list) else [stop]) for s in asked}
    found: dict[str, str] = {}
    for batch in group_batches(encoder, asked, 2, with_answer=False)[1]:
        found.update(decode_answers(model, encoder, batch, 5))
    assert found == wanted
    assert len(set(found.values())) > 1


def test_modules_get_their_modes_back() -> None:
    model = tiny_model(FAMILY)
    model.train()
    model.get_output_embeddings().eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.get_output_embeddings().training
