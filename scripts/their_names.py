"""Print docs/their-names.md: what other tools call a setting. `python scripts/their_names.py > docs/their-names.md`."""

from __future__ import annotations

from switchkd.settings.foreign import FOREIGN, Foreign

HEAD = """# Their names and ours

Made by `scripts/their_names.py` from the table that the error messages use; a test holds the two together. On the left what
TRL, ms-swift, axolotl, LLaMA-Factory, DistiLLM, MiniLLM and verl call it (`*` is any ending), on the right what does the same
here. A dot leads into a mapping: `peft.r` is `peft: {r: 16}`. [Settings](settings.md) has them all.
"""


def their_names_page() -> str:
    """A table for each theme, with a row for each setting of other tools."""
    parts = [HEAD]
    for theme, settings in FOREIGN.items():
        parts.append(f"## {theme}\n\n| elsewhere | here | |\n|---|---|---|\n" + "".join(map(_row, settings)))
    return "\n".join(parts)


def _row(setting: Foreign) -> str:
    theirs, ours = (" ".join(f"`{name}`" for name in names.split()) for names in (setting.names, setting.here))
    return f"| {theirs} | {ours or '-'} | {setting.advice.replace('|', chr(92) + '|')} |\n"


if __name__ == "__main__":
    print(their_names_page(), end="")
