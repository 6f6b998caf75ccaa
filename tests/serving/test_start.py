"""`masquant serve` before it serves: addresses, missing packages, options."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILY
from tiny_models import talking_model, tiny_processor
from typer.testing import CliRunner

from masquant import serving
from masquant.cli import app
from masquant.errors import ModelError
from masquant.serving import Limits, ServeError, server


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False)],
)
def test_which_hosts_only_this_machine_reaches(host: str, local: bool) -> None:
    assert server.is_local(host) is local


def test_an_address_that_cannot_be_had_is_refused_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot serve at 127.0.0.1, port {port}: .* choose another --host or"):
            serving.serve("no such model", port=port)
    with pytest.raises(ServeError, match="cannot serve at 203.0.113.1"):
        serving.serve("no such model", host="203.0.113.1", port=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for name in ("app", "gate", "state", "metrics"):
        monkeypatch.delitem(sys.modules, f"masquant.serving.{name}", raising=False)
    with pytest.raises(ServeError, match=r'prometheus_client is missing; pip install "masquant\[serve\]"'):
        serving.serve("no such model", port=0)


def test_what_is_served_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options reach the application; one name for two models is told apart; what is risky is said."""
    for folder in ("a/omni", "b/omni"):
        talking_model(FAMILY).save_pretrained(tmp_path / folder)
        tiny_processor(FAMILY).save_pretrained(tmp_path / folder)
    found: dict[str, Any] = {}
    monkeypatch.setattr(server, "run", lambda app, listener, **options: found.update(options, app=app, at=listener))
    options = ["--host", "0.0.0.0", "--port", "0", "--max-new-tokens", "7", "--max-requests", "3"]
    options += ["--max-megapixels", "1", "--max-context", "99", "--grace", "5"]
    models = [f"{tmp_path}/a/omni", "--baseline", f"{tmp_path}/b/omni"]
    done = CliRunner().invoke(app, ["serve", *models, *options])
    assert done.exit_code == 0, done.output
    assert "warning: 0.0.0.0 can be reached from other machines, and no --api-key is set" in done.stderr
    assert "serving omni and omni-baseline at http://0.0.0.0:" in done.stderr
    limits = Limits(requests=3, new_tokens=7, context_tokens=99, pixels=1_000_000)
    assert found["app"].state.server.limits == limits and found["grace_seconds"] == 5


def test_a_model_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["serve", "no-such-model", "--port", "0"])
    assert isinstance(done.exception, ModelError) and "no-such-model" in str(done.exception)
    assert CliRunner().invoke(app, ["serve", "x", "--port", "99999"]).exit_code == 2


def test_the_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from masquant.serving.app import create_app

    application = create_app([])
    found = server.Server(application, grace_seconds=30)
    found.handle_exit(signal.SIGTERM, None)
    assert application.state.server.stopping and found.should_exit and not found.force_exit
    found.handle_exit(signal.SIGTERM, None)
    assert found.force_exit
