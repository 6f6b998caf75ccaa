# SPDX-License-Identifier: Apache-2.0
"""The model card written with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from transformers import PreTrainedModel

from .pipeline import QuantizationReport
from .version import __version__

# ruff: noqa: E501  the card is Markdown, whose lines are paragraphs and table rows
_TEMPLATE = """\
---
library_name: transformers
{% if base %}base_model: {{ base }}
base_model_relation: quantized
{% endif %}tags: [masquant, {{ scheme }}, quantized, multimodal]
---

# {{ title }} in {{ scheme }}

Quantized with masquant {{ version }} (method `{{ report.method }}`). The decoder's linears are packed in {{ weight_bits }}
bits{% if activation_bits < 16 %}, their inputs are rounded to {{ activation_bits }} bits per token{% endif %}{% if report.bytes.smooth_scale %};
where it paid, each token is smoothed by its modality's own vector{% endif %}.

```python
import masquant  # before loading: registers the method with transformers

model = masquant.load("THIS_FOLDER")
```

Without `import masquant` transformers only warns, and fills the packed weights with random numbers.

## Size

| part | bytes |
|---|---|
| packed weights, scales, biases | {{ report.bytes.packed }} |
| smoothing vectors | {{ report.bytes.smooth_scale }} |
| low-rank patches | {{ report.bytes.compensation }} |
| the same linears before | {{ report.bytes.float_before }} |

Not quantized: {{ ignored }}, embeddings, norms.

## Calibration

{{ report.calibration.num_samples }} samples; tokens:{% for name, count in report.calibration.tokens.items() %} {{ name }} {{ count }}{{ "," if not loop.last }}{% endfor %}.
{% for note in report.notes %}
- {{ note }}
{% endfor %}
{% if evaluation %}
## Loss against the float model

| task | nll | change |
|---|---|---|
{% for name, task in evaluation.tasks.items() %}| {{ name }} | {{ "%.3f"|format(task.nll) }} | {% if "delta_nll" in task %}{{ "%+.3f ± %.3f"|format(task.delta_nll, task.delta_nll_stderr) }}{% endif %} |
{% endfor %}{% endif %}
Made with torch {{ torch }}, transformers {{ transformers }}. The whole recipe is in `recipe.yaml`, all numbers in
`report.json`.
"""


def model_card(
    model: PreTrainedModel,
    report: QuantizationReport,
    source: Path | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a checkpoint."""
    scheme = report.recipe.scheme
    environment = jinja2.Environment(trim_blocks=False, undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(_TEMPLATE).render(
        base=source.name if source else model.config.name_or_path.rsplit("/", 1)[-1],
        title=source.name if source else type(model).__name__,
        scheme=scheme.name,
        weight_bits=scheme.weights.num_bits,
        activation_bits=scheme.input_activations.num_bits,
        version=__version__,
        report=report.to_dict(),
        ignored=", ".join(f"`{name}`" for name in report.format.ignore),
        evaluation=evaluation,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
