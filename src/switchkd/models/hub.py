"""The hub where it cannot be reached: known at once, and said in a sentence."""

from __future__ import annotations

import logging
import socket
import sys
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

_SECONDS = 5.0
UNREACHABLE = "the hub cannot be reached from here (offline), and it is not among what was downloaded before"


def offline_at_once() -> bool:
    """Whether the hub is out of reach; then its client is told, so that it reads its cache and does not try again.

    One connection is tried, once for each process.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    if _reachable(constants.ENDPOINT):
        return False
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = True
    # It keeps a copy of its own, if it has been imported.
    datasets: Any = sys.modules.get("datasets.config")
    if datasets is not None:
        datasets.HF_HUB_OFFLINE = True
    return True


@cache
def _reachable(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    if proxy:
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_SECONDS):
            return True
    except OSError:
        return False
