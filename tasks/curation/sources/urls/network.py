"""Connects only to public addresses, at every hop.

This module resolves a name, checks its addresses, and connects to a checked address without resolving the name again,
so that it cannot point elsewhere meanwhile. TLS still verifies the name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpcore
    import httpx

MAX_URL_CHARS = 8 * 2**10
PORTS = frozenset({80, 443})
# Allowed in addition to public addresses; only tests set it.
EXTRA_NETWORKS: tuple[ipaddress.IPv4Network, ...] = ()
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")
ADDRESSES_TRIED = 3


class ForbiddenError(Exception):
    """A URL that must not be fetched; the text says why."""


class InvalidUrlError(ForbiddenError):
    """Not a valid URL of the web."""


def is_public(address: str) -> bool:
    """Whether an IP address is public. For addresses that contain an IPv4 address, that must be public too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip.version == network.version and ip in network for network in EXTRA_NETWORKS):
        return True
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64_LOCAL or any(not is_public(str(one)) for one in inner if one is not None):
            return False
        if ip in _NAT64:
            return True
        if ip.is_site_local:  # fec0::/10, which ipaddress treats as global
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def check_url(url: str, allow_http: bool) -> httpx.URL:
    """Checks and parses a URL.

    Raises:
        InvalidUrlError: not https (or http, where allowed), a login, or no host.
        ForbiddenError: a port other than 80 and 443, or an address that is not public.
    """
    import httpx

    if len(url) > MAX_URL_CHARS:  # a redirect may be longer than URLs of a table
        raise InvalidUrlError(f"longer than {MAX_URL_CHARS:,} characters")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode()
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise InvalidUrlError(f"no URL: {error}") from None
    if parsed.scheme not in ("https", "http"):
        raise InvalidUrlError(f"the scheme {parsed.scheme!r}")
    if parsed.scheme == "http" and not allow_http:
        raise InvalidUrlError("http without TLS; source.urls.allow_http allows it")
    if not host:
        raise InvalidUrlError("no host")
    if parsed.userinfo:
        raise InvalidUrlError("a login inside the URL")
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    if port not in PORTS:
        raise ForbiddenError(f"port {port}")
    try:
        literal = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return parsed
    if not is_public(str(literal)):
        raise ForbiddenError(f"the address {literal} is not public")
    return parsed


def make_pool(connections: int) -> httpcore.AsyncConnectionPool:
    """A pool of connections to public addresses; ignores proxies and other settings of the environment."""
    import httpcore

    return httpcore.AsyncConnectionPool(
        max_connections=connections,
        max_keepalive_connections=connections // 2,
        keepalive_expiry=15.0,
        network_backend=_backend(),
    )


def _backend() -> httpcore.AsyncNetworkBackend:
    import httpcore

    class PublicAddresses(httpcore.AsyncNetworkBackend):
        def __init__(self) -> None:
            self._backend = httpcore.AnyIOBackend()

        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[Any] | None = None,
        ) -> httpcore.AsyncNetworkStream:
            failed: Exception | None = None
            for address in await resolve(host, port):
                try:
                    return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    failed = error
            assert failed is not None
            raise failed

        async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
            raise ForbiddenError("a socket of this machine")

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    return PublicAddresses()


async def resolve(host: str, port: int) -> list[str]:
    """A few public addresses of a name.

    Raises:
        ForbiddenError: it has an address that is not public.
        httpcore.ConnectError: there is no public address.
    """
    import httpcore

    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"{host} has no address: {error}") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    for address in addresses:
        if not is_public(address):
            raise ForbiddenError(f"{host} has the address {address}, which is not public")
    if not addresses:
        raise httpcore.ConnectError(f"{host} has no address")
    return addresses[:ADDRESSES_TRIED]
