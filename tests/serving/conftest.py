"""A server on a free port with two tiny models, `tiny` and `base`, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tiny_models import talking_model, tiny_processor

pytest.importorskip("fastapi")

from masquant.conversation import Responder
from masquant.serving.app import ServedModel, create_app
from masquant.serving.limits import Limits
from masquant.serving.server import LOCAL_HOSTS, Server, bind

FAMILY = "qwen2_5_omni"


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    address: tuple[str, int]
    models: dict[str, ServedModel]
    app: Any
    server: Server

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def metric(self, name: str, **labels: str) -> float:
        """Value of a metric; 0 if nothing was counted."""
        return self.app.state.server.metrics.registry.get_sample_value(name, labels) or 0.0


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


@contextmanager
def running(limits: Limits | None = None, api_key: str | None = None, grace_seconds: int = 10) -> Iterator[Running]:
    """Serve until the end of the block."""
    models = {}
    for name, ngram in (("tiny", 4), ("base", 3)):
        model = talking_model(FAMILY)
        model.generation_config.no_repeat_ngram_size = ngram
        responder = Responder(model, tiny_processor(FAMILY), max_tokens=(limits or Limits()).context_tokens)
        models[name] = ServedModel(name, responder, "W4A8" if name == "tiny" else "float")
    app = create_app(list(models.values()), limits=limits, api_key=api_key, hosts=LOCAL_HOSTS)
    listener = bind("127.0.0.1", 0)
    server = Server(app, grace_seconds=grace_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Running(listener.getsockname(), models, app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        for served in models.values():
            served.responder.close()
        assert not thread.is_alive()


@pytest.fixture(scope="package")
def server() -> Iterator[Running]:
    with running() as found:
        yield found
