# SPDX-License-Identifier: Apache-2.0
"""`masquant serve`: models behind an OpenAI-compatible interface, and a page to talk to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..api import load_processor
from ..conversation import Responder
from ..errors import MasquantError
from ..inspection import scheme_of
from ..integrations.loading import load_any
from .limits import Limits

__all__ = ["Limits", "ServeError", "serve"]


class ServeError(MasquantError):
    """The server cannot start."""


def serve(
    model: str,
    baseline: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    grace_seconds: int = 30,
    device: str = "cpu",
    dtype: str = "auto",
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve a model, and a second one to compare it with, until SIGTERM or SIGINT.

    Args:
        model: folder or hub id.
        baseline: the same of the float model.
        host, port: where to listen; port 0 is any that is free.
        api_key: that clients must send.
        limits: bounds of requests.
        grace_seconds: that answers in progress may go on after the signal.
        device, dtype: of the models.
        note: is told where it listens, and what is risky.

    Raises:
        ServeError: fastapi, uvicorn or prometheus-client is missing, or the address cannot be had.
        MasquantError: a model cannot be loaded.
    """
    try:
        from .app import ServedModel, create_app
        from .server import LOCAL_HOSTS, bind, is_local, run
    except ImportError as error:
        raise ServeError(f'{error.name} is missing; pip install "masquant[serve]"') from error
    limits = limits or Limits()
    with bind(host, port) as listener:
        if not is_local(host) and not api_key:
            note(f"warning: {host} can be reached from other machines, and no --api-key is set")
        served: list[ServedModel] = []
        for path in [model, *([baseline] if baseline else [])]:
            loaded = load_any(path, dtype=dtype).to(device)
            responder = Responder(loaded, load_processor(path), max_tokens=limits.context_tokens)
            name = Path(path).resolve().name if Path(path).is_dir() else path
            if any(name == other.name for other in served):
                name += "-baseline"
            served.append(ServedModel(name, responder, scheme_of(loaded)))
        app = create_app(served, limits=limits, api_key=api_key, hosts=LOCAL_HOSTS if is_local(host) else ("*",))
        address = listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        note(f"serving {' and '.join(m.name for m in served)} at http://{shown}:{address[1]}; Ctrl-C ends it")
        run(app, listener, grace_seconds=grace_seconds)
