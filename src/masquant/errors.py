# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong. Each message says which rule was broken, by what, where, and what to do."""


class MasquantError(Exception):
    """Base of every error that a user can cause."""


class RecipeError(MasquantError):
    """A recipe, scheme or command line option that cannot be carried out."""


class ModelError(MasquantError):
    """A model that masquant does not know, or an input that it cannot route by modality."""


class DataError(MasquantError):
    """A calibration or evaluation sample that is missing, broken or out of bounds."""


class CheckpointError(MasquantError):
    """A checkpoint that is incomplete, altered, of another version, or in the way."""


class KernelError(MasquantError):
    """A CPU kernel that was asked for and is not there, or ran out of memory."""
