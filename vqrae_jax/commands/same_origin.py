"""A check of the requests to a local server, which keeps the pages of other sites out."""

import contextlib
import ipaddress
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import urlsplit


class SameOrigin:
    """ASGI middleware that refuses the requests that `is_same_origin` does not accept, with status 403."""

    def __init__(self, app: Callable[..., Any], names: Collection[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        from starlette.responses import PlainTextResponse

        app = self._app
        if scope["type"] in ("http", "websocket") and not is_same_origin(scope["headers"], self._names):
            app = PlainTextResponse("This page is not served to other hosts or origins; see --allow-host.", 403)
        await app(scope, receive, send)


def is_same_origin(headers: Iterable[tuple[bytes, bytes]], names: Collection[str]) -> bool:
    """Returns whether a request has one Host that is an address or one of `names`, and no Origin but that Host.

    A page of another site can point its own name at this machine (DNS rebinding), but it cannot be at an address.
    """
    values = {name: [v.decode("latin-1").lower() for n, v in headers if n == name] for name in (b"host", b"origin")}
    with contextlib.suppress(ValueError):  # malformed addresses
        (host,) = values[b"host"]
        name = urlsplit(f"//{host}").hostname
        if all(urlsplit(origin).netloc == host for origin in values[b"origin"]):
            return name in names or bool(ipaddress.ip_address(name or ""))
    return False
