# SPDX-License-Identifier: Apache-2.0
"""What each decoder block is called with on the calibration samples, and how to run one block on it.

The model runs on every batch with its decoder blocks replaced by recorders that pass the hidden states on: encoders,
embeddings, masks and position embeddings are the model's own, and each block's keyword arguments (which may differ
between blocks, as masks of sliding windows do) are kept as they came. No tracing. The recorders pass on zeros, so that
what the decoder itself adds to the stream between two blocks is what the second one gets.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError, ModelError
from ..modality import ModalityTokens, modality_ids
from ..models import core_of, decoder_blocks
from ..rotation import Rotation
from .encoding import EncodedBatch

Call = tuple[tuple[Any, ...], dict[str, Any]]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class Addition:
    """What the decoder adds to the residual stream before a block: `values` float32 [n, features] at the tokens `rows`
    bool [batch, tokens], zero elsewhere."""

    rows: Tensor
    values: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> Addition | None:
        """Of a tensor [batch, tokens, features]; None of zeros."""
        rows = (dense != 0).any(-1)
        return cls(rows, dense[rows].float()) if bool(rows.any()) else None


@dataclass(frozen=True)
class BlockBatch:
    """One calibration batch, as the decoder blocks see it.

    Attributes:
        calls: per block, positional arguments after the hidden states, and keyword arguments; tensors on CPU.
        added: per block, what is added to the stream before it; on CPU.
        ids: uint8 [batch, tokens], modality ids.
        mask: bool [batch, tokens], False for padding.
        samples: the samples' ids.
        answers: bool [batch, tokens], tokens whose likelihood counts.
    """

    calls: tuple[Call, ...]
    added: tuple[Addition | None, ...]
    ids: Tensor
    mask: Tensor
    samples: tuple[str, ...]
    answers: Tensor


class HiddenStates(Sequence[Tensor]):
    """The hidden states of every batch between two blocks: the first in memory, what goes beyond its bound in a
    temporary folder."""

    def __init__(self, memory: int | None = None, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            memory: bytes kept in memory; None for all.
            folder: where the temporary folder for the rest is made; default the system's.
        """
        self.memory, self.folder = memory, folder
        self._spilled: Path | None = None
        self._states: list[Tensor | Path] = []
        self._resident = 0

    def __len__(self) -> int:
        return len(self._states)

    def append(self, hidden: Tensor) -> None:
        """Add the next batch's hidden states."""
        self._states.append(torch.empty(0))
        self[len(self) - 1] = hidden

    def __getitem__(self, i: int) -> Tensor:  # type: ignore[override]
        state = self._states[i]
        return state if isinstance(state, Tensor) else load_file(state)["hidden"]

    def __setitem__(self, i: int, hidden: Tensor) -> None:
        hidden = hidden.detach().cpu().contiguous()
        previous = self._states[i]
        self._resident -= previous.nbytes if isinstance(previous, Tensor) else 0
        if self.memory is None or self._resident + hidden.nbytes <= self.memory:
            self._states[i] = hidden
            self._resident += hidden.nbytes
            return
        if self._spilled is None:
            self._spilled = Path(tempfile.mkdtemp(prefix="hidden-", dir=self.folder))
            weakref.finalize(self, shutil.rmtree, self._spilled, ignore_errors=True)
        path = self._spilled / f"{i}.safetensors"
        try:
            save_file({"hidden": hidden}, path.with_suffix(".writing"))
            path.with_suffix(".writing").replace(path)  # who still reads the old states keeps them
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write hidden states to {path}: {error}; free some space") from error
        self._states[i] = path

    def empty(self, sharing: int = 1) -> HiddenStates:
        """Another store with the same bounds, which it shares with `sharing` - 1 others."""
        return HiddenStates(None if self.memory is None else self.memory // sharing, self.folder)

    def copy(self) -> HiddenStates:
        """An independent store with the same states."""
        other = self.empty()
        for i in range(len(self)):
            other.append(self[i])
        return other


@dataclass(frozen=True)
class BlockInputs:
    """Everything needed to run the decoder block by block on the calibration samples, in float32.

    Attributes:
        batches: of this process.
        hidden: per batch, what the last block gave (before the first one, what it gets).
        returns_tuple: whether blocks return tuples.
        rotation: of the residual stream.
        first: number of the first batch among those of all processes.
    """

    batches: tuple[BlockBatch, ...]
    hidden: HiddenStates
    returns_tuple: bool
    rotation: Rotation | None = None
    first: int = 0

    def copy(self) -> BlockInputs:
        """The same with hidden states of its own."""
        return replace(self, hidden=self.hidden.copy())

    @property
    def tokens(self) -> int:
        """Tokens of all batches, padding included."""
        return sum(batch.ids.numel() for batch in self.batches)

    def run(self, block: nn.Module, index: int, i: int, hidden: Tensor, device: torch.device) -> Tensor:
        """Output hidden states [batch, tokens, features] of block number `index` on batch `i`, in hidden's dtype.

        Args:
            block: the block.
            index: its number.
            i: the batch's.
            hidden: what the block before gave.
            device: where to run.
        """

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device, hidden.dtype) if tensor.is_floating_point() else tensor.to(device)

        args, kwargs = map_tensors(self.batches[i].calls[index], place)
        hidden, added = hidden.to(device), self.batches[i].added[index]
        if added is not None:
            values = added.values if self.rotation is None else self.rotation.apply(added.values)
            hidden = hidden.clone()
            hidden[added.rows.to(device)] += place(values)
        output = block(hidden, *args, **kwargs)
        return output[0] if self.returns_tuple else output


@contextmanager
def _recording(
    blocks: list[nn.Module],
    first: nn.Module,
    calls: list[Call],
    added: list[Addition | None],
    outputs: dict[str, Any],
) -> Iterator[None]:
    """Replace the blocks' forward by recorders. `first` really runs once, to see what a block returns."""

    run = first.forward

    def recorder(index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if "returns_tuple" not in outputs:
                outputs["returns_tuple"] = isinstance(run(hidden_states, *args, **kwargs), tuple)
            if index == 0:
                outputs["hidden"] = hidden_states.detach().cpu().float()
            added.append(Addition.of(hidden_states.detach().cpu()) if index else None)
            calls.append(map_tensors((args, kwargs), lambda t: t.detach().cpu()))
            nothing = torch.zeros_like(hidden_states)
            return (nothing,) if outputs["returns_tuple"] else nothing

        return forward

    for index, block in enumerate(blocks):
        block.forward = recorder(index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _share(calls: list[Call]) -> tuple[Call, ...]:
    """The calls with equal tensors of different blocks stored once."""
    kept: list[Tensor] = []

    def one(tensor: Tensor) -> Tensor:
        for other in kept:
            if other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor):
                return other
        kept.append(tensor)
        return tensor

    return tuple(map_tensors(call, one) for call in calls)


@torch.no_grad()
def capture_block_inputs(
    model: PreTrainedModel,
    batches: Iterable[EncodedBatch],
    tokens: ModalityTokens,
    *,
    first: nn.Module | None = None,
    hidden: HiddenStates | None = None,
) -> BlockInputs:
    """Run the model on every batch and keep what its decoder blocks are called with.

    Args:
        model: unquantized, in evaluation mode.
        batches: encoded samples.
        tokens: the model's placeholder tokens.
        first: a copy of the first block that can run, where the model's own blocks are on the meta device.
        hidden: empty store for the hidden states; default one in memory.

    Raises:
        DataError: no batch, or inputs without input_ids.
        ModelError: the decoder did not call its blocks once each.
    """
    model, blocks = core_of(model), decoder_blocks(model)
    outputs: dict[str, Any] = {}
    captured: list[BlockBatch] = []
    hidden = HiddenStates() if hidden is None else hidden
    for batch in batches:
        inputs = batch.inputs
        if "input_ids" not in inputs:
            raise DataError(f"a calibration batch has no input_ids, only {', '.join(inputs)}")
        calls: list[Call] = []
        added: list[Addition | None] = []
        with _recording(blocks, first or blocks[0], calls, added, outputs):
            model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False)
        if len(calls) != len(blocks):
            raise ModelError(f"the decoder made {len(calls)} block calls for its {len(blocks)} blocks")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        names = tuple(sample.id for sample in batch.samples)
        routes = modality_ids(ids, tokens)
        captured.append(BlockBatch(_share(calls), tuple(added), routes, mask, names, batch.answer_mask))
        hidden.append(outputs["hidden"])
    if not captured:
        raise DataError("no samples: calibration needs at least one")
    return BlockInputs(tuple(captured), hidden, outputs["returns_tuple"])
