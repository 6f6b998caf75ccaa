# SPDX-License-Identifier: Apache-2.0
"""What the parts of a server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from .limits import Limits
from .metrics import Metrics


@dataclass
class ServerState:
    """State of one server.

    Attributes:
        limits: what a client may ask for.
        metrics: what was counted.
        stopping: no new answers are begun.
    """

    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False
