"""Images by address, which a client chooses: from where, how much of it and for how long."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import time
import urllib.request
from typing import Any

from dynllava_plugin.errors import UserError

PUBLIC, ANY, NONE = "public", "any", "none"
MOST_BYTES, MOST_SECONDS = 64 << 20, 60.0


class Fetch:
    """Reads image URLs of one request, all of them within `MOST_SECONDS`.

    Parameters
    ----------
    allowed : str
        `PUBLIC`: no address of this machine or its network, whatever name or redirection leads there, and no proxy; `ANY`; `NONE`.
    """

    def __init__(self, allowed: str) -> None:
        self.allowed, self._until = allowed, time.monotonic() + MOST_SECONDS
        self._opener = urllib.request.OpenerDirector()  # without handlers of files and FTP
        kinds = (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
        for kind in (
            *(kinds if allowed == ANY else (_PublicHandler, _PublicTLSHandler)),
            urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
            urllib.request.HTTPRedirectHandler, urllib.request.UnknownHandler,
        ):  # fmt: skip
            self._opener.add_handler(kind())

    def __call__(self, url: str) -> bytes:
        """Return what is at an http or https URL; `UserError` for what may not be fetched, is too large or takes too long."""
        if self.allowed == NONE:
            raise UserError("this server fetches no image URLs; send the image as a data: URL")
        found = bytearray()
        with self._opener.open(url, timeout=max(self._until - time.monotonic(), 0.01)) as response:
            while piece := response.read1(1 << 16):
                found += piece
                if len(found) > MOST_BYTES:
                    raise UserError(f"more than {MOST_BYTES} bytes; send a smaller one")
                if time.monotonic() > self._until:
                    raise UserError(f"more than {MOST_SECONDS:g} s; send the image as a data: URL")
        return bytes(found)


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        """Look where a name leads before the first packet, and behind it, as it may lead elsewhere the second time."""
        for found in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            _check(str(found[4][0]))
        super().connect()
        _check(self.sock.getpeername()[0])


class _PublicTLSConnection(http.client.HTTPSConnection, _PublicConnection):
    """The same, before TLS begins."""


class _PublicHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PublicConnection, request)


class _PublicTLSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PublicTLSConnection, request)


def _check(address: str) -> None:
    if not ipaddress.ip_address(address.partition("%")[0]).is_global:
        raise UserError(
            f"{address} is a private address, which this server doesn't fetch from without --image_urls any"
        )
