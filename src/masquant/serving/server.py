# SPDX-License-Identifier: Apache-2.0
"""Run the application: a socket that is bound before models are loaded, and an end that lets answers finish."""

from __future__ import annotations

import ipaddress
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from . import ServeError

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")


def is_local(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet.

    Raises:
        ServeError: the address is taken, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise ServeError(f"cannot serve at {host}, port {port}: {error}; choose another --host or --port") from error
    return found


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: nothing new is begun, answers in progress may end; a second signal ends them."""

    def __init__(self, app: FastAPI, *, grace_seconds: int) -> None:
        self._state = app.state.server
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=grace_seconds,
                limit_concurrency=self._state.limits.connections,
                ws="none",
                lifespan="off",
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        self._state.stopping = True
        self.force_exit = self.should_exit
        self.should_exit = True


def run(app: FastAPI, listener: socket.socket, *, grace_seconds: int) -> None:
    """Serve until a signal comes, then let answers in progress end for `grace_seconds`."""
    Server(app, grace_seconds=grace_seconds).run(sockets=[listener])
