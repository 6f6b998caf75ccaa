# SPDX-License-Identifier: Apache-2.0
"""masquant: multimodal LLMs in 4 to 8 bits that still see, hear and read.

Importing it registers the quantization method "masquant" with transformers.
"""

from .api import check, load, routed, save
from .cache import Int8Cache
from .calibration.dataset import Sample, load_samples
from .errors import CheckpointError, DataError, KernelError, MasquantError, ModelError, RecipeError
from .generation import stream
from .integrations.transformers import register
from .modality import Modality
from .pipeline import QuantizationReport, quantize
from .recipe import Recipe
from .version import __version__

register()

__all__ = [
    "CheckpointError",
    "DataError",
    "Int8Cache",
    "KernelError",
    "MasquantError",
    "Modality",
    "ModelError",
    "QuantizationReport",
    "Recipe",
    "RecipeError",
    "Sample",
    "__version__",
    "check",
    "load",
    "load_samples",
    "quantize",
    "routed",
    "save",
    "stream",
]
