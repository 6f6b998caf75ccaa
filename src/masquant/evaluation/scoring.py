# SPDX-License-Identifier: Apache-2.0
"""Run a model on batches: the logits of the answers' tokens, what they say of each sample, and decoded answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache import KvCache, cache_arguments
from ..calibration.encoding import EncodedBatch, SampleEncoder
from ..errors import DataError, ModelError
from ..models import core_of
from .metrics import answer_rows, token_agreement, token_kl, token_nll

# Logits that are handled in float32 at a time: 256 MiB, whatever the vocabulary and the batch
_FLOATS_AT_A_TIME = 2**26

# Plain greedy decoding, whatever the model's generation config asks for; sampling's settings get their default values,
# as some versions of transformers warn that others are ignored.
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
}


@dataclass(frozen=True)
class AnswerLogits:
    """What a model says of the n answer tokens of a batch.

    Attributes:
        logits: [n, vocabulary], in the model's precision and on its device.
        targets: integer [n], the answers' tokens; on CPU.
        samples: integer [n], each one's sample in the batch; on CPU.
    """

    logits: Tensor
    targets: Tensor
    samples: Tensor


@dataclass(frozen=True)
class TokenScores:
    """Of n answer tokens, on CPU: float64 `nll` [n]; against a reference float64 `kl` [n] and bool `agreed` [n]."""

    nll: Tensor
    kl: Tensor | None
    agreed: Tensor | None


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode; afterwards all its modules have the modes that they had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def projecting(model: PreTrainedModel, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the model's output head see only what `choose` takes of the hidden states [batch, tokens, features].

    The vocabulary is so large that logits of all tokens may take more time than several decoder blocks, and more
    memory than all of them. The model's own `logits_to_keep`, where it has one, knows nothing of masks.
    """
    head: nn.Module | None = core_of(model).get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (choose(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def answer_logits(model: PreTrainedModel, batch: EncodedBatch, kv_cache: KvCache = "float") -> AnswerLogits:
    """Teacher-forced logits of a batch's answer tokens; those of all other tokens are not computed.

    With an int8 cache every key and value is rounded before it is read, those of the latest tokens too, which decoding
    would still have in full precision.

    Raises:
        ModelError: the model returns logits of other positions, or cannot use the cache.
    """
    shape = batch.answer_mask.shape
    samples, tokens = answer_rows(batch.answer_mask)

    def choose(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != shape:
            return hidden
        return hidden[samples.to(hidden.device), tokens.to(hidden.device) - 1][None]

    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.inputs.items()}
    with projecting(model, choose):
        cache = cache_arguments(model, kv_cache, residual_length=0)
        logits: Tensor = core_of(model)(**inputs, **cache, use_cache=bool(cache)).logits
    if logits.shape[:2] == (1, len(tokens)):
        logits = logits[0]
    elif logits.shape[:2] == shape:
        logits = logits[samples.to(logits.device), tokens.to(logits.device) - 1]
    else:
        raise ModelError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for input_ids of shape "
            f"{tuple(shape)}; they cannot be matched with the answers' tokens"
        )
    return AnswerLogits(logits, batch.inputs["input_ids"][samples, tokens].cpu(), samples)


@torch.no_grad()
def token_scores(answers: AnswerLogits, reference: Tensor | None) -> TokenScores:
    """Likelihood of every answer token, and its distance from a reference model.

    Args:
        answers: what the model says.
        reference: the other model's logits [n, vocabulary] of the same tokens.
    """
    device, (count, vocabulary) = answers.logits.device, answers.logits.shape
    nll, kl, agreed = [], [], []
    rows = max(1, _FLOATS_AT_A_TIME // vocabulary)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        own = torch.log_softmax(answers.logits[part].float(), dim=-1)
        nll.append(token_nll(own, answers.targets[part].to(device)).double().cpu())
        if reference is not None:
            other = torch.log_softmax(reference[part].to(device).float(), dim=-1)
            kl.append(token_kl(other, own).double().cpu())
            agreed.append(token_agreement(other, own).cpu())

    def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)

    if reference is None:
        return TokenScores(joined(nll, torch.float64), None, None)
    return TokenScores(joined(nll, torch.float64), joined(kl, torch.float64), joined(agreed, torch.bool))


def sample_scores(batch: EncodedBatch, answers: AnswerLogits, scores: TokenScores) -> list[dict[str, Any]]:
    """Sums over each sample's answer tokens: `nll`, `tokens` and, with a reference, `kl` and `agreed`.

    Raises:
        DataError: the likelihood of a sample's answer is not finite.
    """
    entries: list[dict[str, Any]] = []
    for i, sample in enumerate(batch.samples):
        own = answers.samples == i
        total = float(scores.nll[own].sum())
        if not math.isfinite(total):
            raise DataError(
                f"sample {sample.id}: the model's likelihood of the answer is {total}; its weights or activations "
                "overflow, or the sample is broken"
            )
        entry: dict[str, Any] = {"nll": total, "tokens": int(own.sum())}
        if scores.kl is not None and scores.agreed is not None:
            entry.update(kl=float(scores.kl[own].sum()), agreed=int(scores.agreed[own].sum()))
        entries.append(entry)
    return entries


@torch.no_grad()
def decode_answers(
    model: PreTrainedModel,
    encoder: SampleEncoder,
    batch: EncodedBatch,
    max_new_tokens: int,
    kv_cache: KvCache = "float",
) -> dict[str, str]:
    """Greedy answers by sample id to a batch that was encoded without answers."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    options = {**GREEDY, **cache_arguments(model, kv_cache), "max_new_tokens": max_new_tokens}
    with projecting(model, lambda hidden: hidden[:, -1:]):
        output = core_of(model).generate(**inputs, **options, pad_token_id=encoder.tokenizer.pad_token_id)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
    return {sample.id: text.strip() for sample, text in zip(batch.samples, texts, strict=True)}
