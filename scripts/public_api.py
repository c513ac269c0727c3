"""Print docs/public.md: what is public, and so kept by semantic versioning. `python scripts/public_api.py > docs/public.md`."""

from __future__ import annotations

import inspect

from transformers import TrainingArguments

import switchkd

HEAD = """# What is public

From 1.0 on, these names change as semantic versioning has it: what is taken away or takes other arguments comes with
a new major version. Before 1.0 it may come with a new minor version, and the changelog says so. Public besides: the
commands and their options, the keys of a run file (docs/settings.md), and the names of files and JSON keys in a run's
folder. Everything else may change at any time.

An argument with `=` has a default; those behind `*` are given by name.

"""


def public_page() -> str:
    """A line for each public name, with its arguments."""
    lines = [f"- `{name}{_arguments(getattr(switchkd, name))}`" for name in sorted(switchkd.__all__)]
    return HEAD + "\n".join(lines) + "\n"


def _arguments(public: object) -> str:
    # An error is raised by name, and the fields of settings have a page of their own.
    if not callable(public) or (isinstance(public, type) and issubclass(public, (BaseException, TrainingArguments))):
        return ""
    found, named = [], False
    for each in inspect.signature(public).parameters.values():
        if each.kind is each.KEYWORD_ONLY and not named:
            found.append("*")
            named = True
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        named = named or each.kind is each.VAR_POSITIONAL
        found.append(f"{stars}{each.name}{'' if each.default is each.empty else '='}")
    return f"({', '.join(found)})"


if __name__ == "__main__":
    print(public_page(), end="")
