# SPDX-License-Identifier: Apache-2.0
"""The model card written with every checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2

from .pipeline import QuantizationReport

# ruff: noqa: E501  the card is Markdown, whose lines are paragraphs and table rows
_TEMPLATE = """\
---
library_name: transformers
{% if model %}
base_model: {{ model }}
base_model_relation: quantized
{% endif %}
tags:
- masquant
- {{ scheme }}
- quantized
- multimodal
---

# {{ model or "Model" }} in {{ scheme }}

{{ "[" ~ model ~ "](https://huggingface.co/" ~ model ~ ")" if "/" in model else "`" ~ model ~ "`" if model else "A model" }} quantized with masquant {{ version }}, method `{{ method }}`. The linears of the decoder are packed in {{ recipe.scheme.weights.num_bits }} bits{% if recipe.scheme.input_activations.num_bits < 16 %}; their inputs are rounded to {{ recipe.scheme.input_activations.num_bits }} bits per token when the model runs{% endif %}{% for modality, scheme in recipe.encoders.items() %}. The {{ modality }} encoder's linears are {{ scheme }}{% endfor %}{% if bytes.smooth_scale %}. Where it paid, each token is smoothed by the vector of its own modality{% endif %}{% if bytes.compensation %}. Low-rank patches give modalities back what the shared weight misses{% endif %}.

## Load it

```
pip install masquant
```

```python
import masquant  # before loading: registers the method with transformers
from transformers import AutoProcessor

model = masquant.load("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

Without `import masquant` transformers only warns, and fills the packed weights with random numbers.
`masquant check THIS_FOLDER` tells whether a copy is whole.

## Size

| part | MiB |
|---|---|
| packed weights, scales, biases | {{ mib(bytes.packed) }} |
| smoothing vectors | {{ mib(bytes.smooth_scale) }} |
| low-rank patches | {{ mib(bytes.compensation) }} |
| the same linears before | {{ mib(bytes.float_before) }} |
{% if bytes.encoders %}
| linears of encoders in 8 bits | {{ mib(bytes.encoders) }} |
| the same before | {{ mib(bytes.encoders_before) }} |
{% endif %}
{% if bytes.lm_head %}
| embeddings and head in 8 bits | {{ mib(bytes.lm_head) }} |
| the same before | {{ mib(bytes.lm_head_before) }} |
{% endif %}
| in floating point as before | {{ mib(bytes.kept) }} |

Not quantized: {% for name in not_quantized %}`{{ name }}`{{ ", " if not loop.last }}{% endfor %}.

## Calibration

{{ calibration.num_samples }} samples.

| modality | tokens |
|---|---|
{% for name, count in calibration.tokens.items() %}
| {{ name }} | {{ "{:,}".format(count) }} |
{% endfor %}

{% for note in notes %}
- {{ note }}
{% endfor %}

## Loss against the float model

<!-- loss -->
<!-- end of loss -->

Made with torch {{ versions.torch }}, transformers {{ versions.transformers }}. The whole recipe is in `recipe.yaml`, all numbers are in `report.json`; `masquant report THIS_FOLDER` draws them.
"""

_LOSS = """\
{% if evaluation is none %}
Not measured yet.
{% else %}
| modality | tasks | samples | nll per answer token | change | KL |
|---|---|---|---|---|---|
{% for entry in evaluation.modalities %}
{% set m = entry.models[name] %}
| {{ entry.modality }} | {{ entry.tasks|join(", ") }} | {{ entry.num_samples }} | {{ "%.3f"|format(m.nll) }} | {% if m.delta_nll is defined %}{{ "%+.3f"|format(m.delta_nll) }}{% if m.delta_nll_stderr is not none %} ± {{ "%.3f"|format(m.delta_nll_stderr) }}{% endif %}{% endif %} | {% if m.kl is defined and m.kl is not none %}{{ "%.3f"|format(m.kl) }}{% endif %} |
{% endfor %}

The change is paired by sample, ± its standard error.
{% endif %}
"""

_SECTION = re.compile(r"(?<=<!-- loss -->\n).*?(?=<!-- end of loss -->)", re.DOTALL)


def model_card(report: QuantizationReport, evaluation: Mapping[str, Any] | None = None) -> str:
    """README.md of a checkpoint.

    Args:
        report: of the run.
        evaluation: see `with_loss`.
    """
    card = _render(_TEMPLATE, **report.to_dict(), mib=lambda size: f"{size / 2**20:.1f}")
    return with_loss(card, report.recipe.method, evaluation)


def with_loss(card: str, method: str, evaluation: Mapping[str, Any] | None) -> str:
    """A card with its table of losses filled in anew; the rest stays as it is, also what people wrote.

    Args:
        card: README.md of a checkpoint.
        method: of the checkpoint; its results are shown, or the last ones if none have its name.
        evaluation: `modalities`, each with its name, tasks, number of samples and the models' metrics; None if it was
            not measured.
    """
    name = ""
    if evaluation is not None:
        models = list(evaluation["modalities"][0]["models"])
        name = method if method in models else models[-1]
    table = _render(_LOSS, evaluation=evaluation, name=name)
    return _SECTION.sub(lambda _: table, card, count=1)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(template).render(**values)
