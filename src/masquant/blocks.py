# SPDX-License-Identifier: Apache-2.0
"""Where the decoder blocks of a float model come from while it is being quantized: its own modules, or its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from .models import decoder_blocks, decoder_of, family_of, linearize


class AbstractBlocks(ABC):
    """The decoder blocks of one float model, one at a time; their experts, if any, as linears.

    Attributes:
        model: may be more than the language model that has the blocks, and fuse experts.
        family: of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.family = model, family_of(model.config)
        decoder = decoder_of(model)
        self._path = next(name for name, module in model.named_modules() if module is decoder) + ".layers"
        self._path = self._path.removeprefix(".")

    def __len__(self) -> int:
        return len(decoder_blocks(self.model))

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""
        return int(cast(Any, decoder_of(self.model)).config.hidden_size)

    def prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with in the whole model."""
        return f"{self._path}.{index}."

    @abstractmethod
    def copy(self, index: int) -> nn.Module:
        """A float block of one's own, to read or to try things on, in the model's dtype."""

    @abstractmethod
    def take(self, index: int) -> nn.Module:
        """The float block that will be quantized; `finish` gets it back."""

    @abstractmethod
    def finish(self, block: nn.Module) -> None:
        """A block is quantized and, where the run has a store, stored."""

    @abstractmethod
    def leave_rest(self) -> None:
        """All that is not in the blocks has been used and may go to the store."""

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """A buffer of the decoder that the float model does not have."""


class ResidentBlocks(AbstractBlocks):
    """Blocks of a model that is in memory; they are quantized in place."""

    def copy(self, index: int) -> nn.Module:
        return linearize(deepcopy(decoder_blocks(self.model)[index]), self.family)

    def take(self, index: int) -> nn.Module:
        return linearize(decoder_blocks(self.model)[index], self.family)

    def finish(self, block: nn.Module) -> None:
        block.to(self.model.device)

    def leave_rest(self) -> None:
        pass

    def add(self, name: str, tensor: Tensor) -> None:
        decoder_of(self.model).register_buffer(name, tensor)
