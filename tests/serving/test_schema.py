"""The server against its own OpenAPI description, with what schemathesis makes up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Running, running
from hypothesis import HealthCheck, settings

from masquant.serving.app import create_app
from masquant.serving.limits import Limits

schemathesis = pytest.importorskip("schemathesis")

KEY = "secret"
LIMITS = Limits(new_tokens=4)

schema = schemathesis.openapi.from_dict(create_app([], limits=LIMITS, api_key=KEY).openapi())
schema.config.checks.positive_data_acceptance.expected_statuses = ["200", "400", "404"]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(LIMITS, api_key=KEY) as found:
        yield found


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_openapi(case: Any, guarded: Running) -> None:
    """Valid requests are answered, or refused for what a schema cannot say; others are refused; nothing fails."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # else hardly any would get beyond it
    response = case.call(base_url=guarded.url, headers={"Authorization": f"Bearer {KEY}"})
    case.validate_response(response)
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        assert response.json()["error"]["code"] != "invalid_request"  # what the schema does say
