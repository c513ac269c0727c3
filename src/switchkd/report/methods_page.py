"""The method table as a Markdown page: docs/methods.md is what `switchkd methods --markdown` prints."""

from __future__ import annotations

from collections.abc import Mapping

from switchkd.methods.table import Method
from switchkd.report.terminal import settings_of

_HEAD = """# Methods

Made by `switchkd methods --markdown` from the table in `src/switchkd/methods.py`; a test holds the two together. A method is
**policy x divergence x data schedule x start**, and each can be replaced: `--set divergence=reverse_kl` under any that has one.

"""


def methods_page(methods: Mapping[str, Method]) -> str:
    """All methods in one table, then each with its source, its departures from it and its settings."""
    lines = [
        "| method | who writes | rolled out | compared | cross-entropy | start |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, method in methods.items():
        both = dict.fromkeys((method.divergence, method.value_of("teacher_text_divergence")))
        compared = ", ".join(each for each in both if each) or "-"
        cells = (
            f"[{name}](#{name})",
            _writer(method),
            _schedule(method),
            compared,
            f"{method.cross_entropy_weight:g}",
            method.start,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return _HEAD + "\n".join(lines) + "\n" + "".join(_section(name, method) for name, method in methods.items())


def _writer(method: Method) -> str:
    if method.teacher_writes_data:
        return "Teacher, once"
    return method.policy.__name__ if method.rollout_share or method.value_of("share_rise") else "data set"


def _schedule(method: Method) -> str:
    rises = f", rising by {rise:g}" if (rise := method.value_of("share_rise")) else ""
    return f"{method.rollout_share:.0%}{rises}"


def _section(name: str, method: Method) -> str:
    settings = ", ".join(
        f"`{key}`" + ("" if value is None else f" {value}") for key, value in settings_of(name, method).items()
    )
    return (
        f"\n## {name}\n\n{method.summary[0].upper()}{method.summary[1:]}.\n\n- source: {method.source}\n"
        f"- departs: {method.departs}\n- settings: {settings}\n"
    )
