# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: their configuration and tensors, finished blocks of a run, checks."""
