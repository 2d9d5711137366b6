# SPDX-License-Identifier: Apache-2.0
"""The metrics of all devices over HTTP: prometheus_client's application, which chooses the format and packs
the answer as the client asks.

It runs in wsgiref's server, one request after the other. prometheus_client's own start_http_server() takes a
thread for each, and a read of a device that may hang needs a process of one thread (host/bounded.py). The
answer for ten devices takes about as long as their daemons take.
"""
from __future__ import annotations

import ipaddress
import socket
import socketserver
import sys
from collections.abc import Callable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from .gathered import Gatherer, Source

# For a client that sends no request, or takes no answer: meanwhile nobody else gets one. Prometheus gives up
# after 10 s.
CLIENT_TIMEOUT = 2.0


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT

    def log_message(self, format: str, *words: object) -> None:
        """Nothing: a line for each scrape is no news."""


class MetricsServer(WSGIServer):
    """address: an IP address and a port, 0 for any that is free. Raises OSError."""

    timeout = 0.5  # seconds until it looks whether it is over

    def __init__(self, address: tuple[str, int], sources: Callable[[], Sequence[Source]]) -> None:
        self.address_family = (
            socket.AF_INET6 if ipaddress.ip_address(address[0]).version == 6 else socket.AF_INET)
        self._host = address[0]
        self._is_over = False
        self._gatherer = Gatherer(sources, lambda _words: None)
        super().__init__(address, _Handler)
        registry = CollectorRegistry()
        registry.register(self._gatherer)
        self.set_app(make_wsgi_app(registry))

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if self.address_family == socket.AF_INET6 else self._host
        return f"http://{host}:{self.server_port}/metrics"

    def end(self) -> None:
        """serve() returns after the present request, if there is one. For a signal handler: an exception in
        the middle of a request would be caught by wsgiref, which answers 500 and goes on."""
        self._is_over = True

    def serve(self) -> None:
        """Answers until end()."""
        while not self._is_over:
            self.handle_request()

    def server_bind(self) -> None:
        # Not HTTPServer's own, which asks a name server for the name of this machine.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that is silent, or has gone, is no fault of the server. All else is shown with its trace.
        if not isinstance(sys.exception(), (TimeoutError, ConnectionError)):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        self._gatherer.close()
