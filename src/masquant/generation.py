# SPDX-License-Identifier: Apache-2.0
"""Answers token by token: transformers' encoders, positions and head around the kernels' decoder.

`stream` gives the tokens that `model.generate` would give, without its cost per token. Models that the kernels cannot
run as a whole are refused with the reason.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList

from .errors import KernelError, ModelError
from .integrations.transformers import quantized_linears, state_of
from .models import core_of, decoder_of, family_of
from .runtime.decoder import NativeDecoder, unsupported
from .runtime.transforms import residual_rotation_of

_PROBE_TOKENS = 7
_PROBE_TOLERANCE = 0.05  # of what a block adds; another formula is off by about all of it
_HALF = 2.0**-7  # rounding of a bfloat16 model's own forward, of the size of its hidden states

_logger = logging.getLogger("masquant")
_refused: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_decoders: weakref.WeakKeyDictionary[PreTrainedModel, NativeDecoder] = weakref.WeakKeyDictionary()


def native_decoder(model: PreTrainedModel) -> NativeDecoder:
    """The model's decoder in the kernels, made and compared with the model's own forward at the first call.

    Raises:
        KernelError: why the kernels cannot run it.
    """
    decoder = decoder_of(model)
    found = _decoders.get(model)
    if found is not None and found.is_current:
        return found
    problem = unsupported(decoder)
    if family_of(model.config).stream_inputs:
        problem = "features of pictures are added to its hidden states between blocks"
    if problem is not None:
        raise KernelError(f"{type(model).__name__} cannot decode in the kernels: {problem}")
    native = NativeDecoder(decoder, state_of(model))
    _compare(core_of(model), native)
    _decoders[model] = native
    return native


def decodes_natively(model: PreTrainedModel) -> bool:
    """Whether `stream` runs this model; says once why it does not where the model is quantized."""
    if model in _refused:
        return False
    try:
        native_decoder(model)
    except KernelError as error:
        _refused.add(model)
        if quantized_linears(model):
            _logger.warning("%s; its answers come from transformers' generate, token by token slower", error)
        return False
    return True


@torch.inference_mode()
def _compare(model: PreTrainedModel, native: NativeDecoder) -> None:
    """Run a few tokens through the model's own forward, and every part again on the input that it saw there, so that
    rounding does not add up over blocks.

    Raises:
        KernelError: naming what differs.
    """
    decoder = cast(Any, decoder_of(model))
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    ids = (torch.arange(_PROBE_TOKENS) * 37 + 5) % max(embeddings.num_embeddings // 2, 1)
    seen: list[Tensor] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0].float())

    def after(_: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].float())

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in decoder.layers]
    hooks.append(decoder.layers[-1].register_forward_hook(after))
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -1:].float()
    finally:
        for hook in hooks:
            hook.remove()
    cosine, sine = native.rotary(torch.arange(_PROBE_TOKENS)[None])

    def differ(found: Tensor, wanted: Tensor, added: Tensor, base: Tensor) -> bool:
        slack = 0.0 if dtype == torch.float32 else float(base.norm()) * _HALF
        return not float((found - wanted).norm()) <= _PROBE_TOLERANCE * float(added.norm()) + slack  # also NaN

    rotation = residual_rotation_of(decoder)
    embedded = embeddings(ids)
    dtype = embedded.dtype
    embedded = embedded.float()
    embedded = rotation.apply(embedded) if rotation else embedded
    head = cast(Any, model).lm_head(native.run_norm(seen[-1], cosine, sine)[-1:].to(dtype)).float()
    problems = [
        f"its block {index} computes something else"
        for index, (x, y) in enumerate(pairwise(seen))
        if differ(native.run_block(index, x, cosine, sine), y, y - x, x)
    ]
    if differ(embedded, seen[0], seen[0], seen[0]):
        problems.insert(0, "something is done to its embeddings before the first block")
    if differ(head, logits, logits - logits.mean(), logits):
        problems.append("its last norm or head computes something else")
    native.reset()
    if problems:
        raise KernelError(f"{type(model).__name__} cannot decode in the kernels: {problems[0]}")


def _step(model: PreTrainedModel, native: NativeDecoder, token: int, cosine: Tensor, sine: Tensor) -> Tensor:
    """Logits [1, vocabulary] after one more token."""
    embedding = cast(Any, model.get_input_embeddings())(torch.tensor([token]))
    last = native.forward(embedding, native.row_of(token), cosine, sine)
    return cast(Any, model).lm_head(last.to(embedding.dtype)).float()


def _settings(model: PreTrainedModel, max_new_tokens: int, options: Mapping[str, Any]) -> GenerationConfig:
    """The model's generation config with changes.

    Raises:
        ModelError: an option that `stream` does not know.
    """
    settings = copy.deepcopy(model.generation_config) or GenerationConfig()
    unknown = settings.update(**options, max_new_tokens=max_new_tokens)
    if unknown:
        raise ModelError(f"generation knows no option {', '.join(sorted(unknown))}")
    if (settings.num_beams or 1) != 1:
        raise ModelError("answers are streamed token by token: num_beams must be 1")
    return settings


def _processors(model: PreTrainedModel, settings: GenerationConfig, inputs: Mapping[str, Any]) -> LogitsProcessorList:
    """What is done to the logits: transformers' own list, so that every option means what it does in `generate`."""
    ids = inputs["input_ids"]
    settings = cast(Any, model)._prepare_generation_config(settings)[0]
    cast(Any, model)._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=ids.device)
    return cast(Any, model)._get_logits_processor(
        generation_config=settings,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        logits_processor=LogitsProcessorList(),
        device=str(ids.device),
        model_kwargs={},
    )


def _ends(settings: GenerationConfig) -> set[int]:
    end = settings.eos_token_id
    return set(end) if isinstance(end, list) else set() if end is None else {int(end)}


def stream(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 256,
    seed: int | None = None,
    **options: Any,
) -> Iterator[int]:
    """Token ids of the answer, one by one, with the end token if there is one.

    Args:
        model: quantized, in memory of the CPU.
        inputs: of the processor, one conversation without padding.
        max_new_tokens: at most so many.
        seed: of sampling.
        options: of `GenerationConfig` on top of the model's own, such as do_sample, temperature, top_p.

    Raises:
        KernelError: the kernels cannot run this model.
        ModelError: an unknown option, or more than one conversation.
    """
    settings = _settings(core_of(model), max_new_tokens, options)
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ModelError(f"one conversation at a time, got {ids.shape[0]}")
    return _tokens(core_of(model), native_decoder(model), dict(inputs), settings, max_new_tokens, seed)


def _tokens(
    model: PreTrainedModel,
    native: NativeDecoder,
    inputs: dict[str, Any],
    settings: GenerationConfig,
    max_new_tokens: int,
    seed: int | None,
) -> Iterator[int]:
    processors, ends = _processors(model, settings, inputs), _ends(settings)
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    sequence = inputs["input_ids"]
    with torch.inference_mode():
        native.reset()
        native.reserve(sequence.shape[1] + max_new_tokens)
        with native.in_place():
            logits = model(**inputs).logits[:, -1].float()
        cosine, sine = native.rotary(native.next_position + torch.arange(max_new_tokens)[None])
        sequence_number = native.sequence
    for i in range(max_new_tokens):
        with torch.inference_mode():
            scores = processors(sequence, logits)
            if settings.do_sample:
                token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            else:
                token = int(scores.argmax(-1))
        yield token
        if token in ends:
            return
        if native.sequence != sequence_number:
            raise ModelError("another answer was begun on this model; it writes one at a time")
        if i + 1 < max_new_tokens:
            with torch.inference_mode():
                if processors:
                    sequence = torch.cat((sequence, torch.tensor([[token]])), dim=1)
                logits = _step(model, native, token, cosine[i : i + 1], sine[i : i + 1])
