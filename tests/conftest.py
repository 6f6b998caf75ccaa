"""Shared set-up: quiet libraries, fixed seeds, two threads (so that results do not depend on the machine)."""

import os
import signal

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers.utils import logging

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would what tests start
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
