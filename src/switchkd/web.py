"""What every client of a server has to be careful with: keys, redirects, and who is this machine."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from switchkd.errors import UserError

_HIDDEN = "[key]"


def key_in(variable: str) -> str:
    """The key in an environment variable, or "" if it is not set. Raises UserError if no header can carry the key."""
    key = os.environ.get(variable, "").strip() if variable else ""
    # Python's own message for a header that cannot be sent shows the header.
    if not (key.isascii() and (key.isprintable() or not key)):
        raise UserError(f"${variable} holds characters that no key has, such as a line end; set it again")
    return key


def without_key(text: str, key: str) -> str:
    """The text without the key: some servers repeat it when they refuse it."""
    return text.replace(key, _HIDDEN) if key else text


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_encrypted(url: str, variable: str, remedy: str) -> None:
    """Raise UserError, which ends with `remedy`, if the key in `variable` would travel to another machine over plain http.

    Raises UserError too for a key that no header can carry, whatever the address.
    """
    key, parts = key_in(variable), urlsplit(url)
    if key and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise UserError(f"{url} is not encrypted, and ${variable} would go over the network as plain text; {remedy}")


def opener(url: str) -> urllib.request.OpenerDirector:
    """What opens the URL without following a redirect, and this machine's own servers without a proxy.

    A proxy of the environment would see a key on its way to this machine in plain text, and reach another machine than meant.
    """
    own = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    return urllib.request.build_opener(NoRedirect, *own)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever place it names."""

    def redirect_request(self, *args: Any) -> None:
        """None: the redirect comes back as an error."""
        return None
