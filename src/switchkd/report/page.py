"""The report's page: one HTML file that needs no network, from data and the files in assets/report.

Everything that a model or a data file wrote is data in it, never markup: it stands in one block of JSON, without a character
that could end the block, and the page's script writes it as text. A content-security policy allows this script and this style
sheet alone, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

# In this order: each uses what stands before it. The chart library comes first.
_SCRIPTS = ("uplot/uPlot.iife.min.js", "dom.js", "charts.js", "tables.js", "tokens.js", "reader.js", "main.js")
_STYLES = ("uplot/uPlot.min.css", "page.css")


def page(data: Mapping[str, Any]) -> str:
    """The page as HTML. `data` is what `run.gathered` makes; with `follow` in it, the page asks its own server for news."""
    script, style = _joined(_SCRIPTS), _joined(_STYLES)
    return Template(_asset("page.html")).substitute(
        policy=policy(follow=bool(data.get("follow"))),
        title=html.escape(str(data["title"])),
        style=style,
        data=as_json(data),
        script=script,
    )


def policy(*, follow: bool) -> str:
    """The page's content-security policy; only a page that follows a run may connect, and only to where it came from."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(_joined(_SCRIPTS)),
        "style-src": _hash(_joined(_STYLES)),
        "connect-src": "'self'" if follow else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: plain ASCII without <, > and &. Raises ValueError for NaN and infinities."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(map(_asset, names))


@cache
def _asset(name: str) -> str:
    return files("switchkd").joinpath("assets", "report", name).read_text(encoding="utf-8")
