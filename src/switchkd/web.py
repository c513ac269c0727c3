"""What every client of a server has to be careful with: keys, redirects, and who is this machine."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from typing import Any

from switchkd.errors import UserError

_HIDDEN = "[key]"


def key_in(variable: str) -> str:
    """The key in an environment variable, "" where there is none. Raises UserError for one that no request could carry."""
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


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever place it names."""

    def redirect_request(self, *args: Any) -> None:
        """None: the redirect comes back as an error."""
        return None
