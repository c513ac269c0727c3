"""The code blocks and commands of README and site: how they are found, and what stands in for what they name.

A page is Markdown. A comment on the line above a block says what the block does not show:

    <!-- not run: REASON -->     needs a GPU, several processes, a network or a server; it is only checked to be well formed
    <!-- example: FILE -->       the block is that file; so is one whose first line is the comment `# FILE`

Everything else is run, in the order of the page, in a folder in which the large models' names are those of small ones.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])

# What stands in for what the pages name. Folders of these names hold the small student, the small teacher, or a short run.
STUDENTS = (
    *("STUDENT", "S", "path-or-hub-id", "my-student", "gpt2", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B"),
    # The teacher of a page whose student is the 7B: the two have to differ.
    "Qwen/Qwen2.5-14B",
)
TEACHERS = ("TEACHER", "T", "my-teacher", "gpt2-xl", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B")
RUNS = ("runs/run", "runs/switch", "runs/gkd")
DATA = ("my-prompts.jsonl", "held-out.jsonl", "a.jsonl", "prompts.jsonl")
CHATS = ("chats.jsonl", "my-chats.jsonl")
TABLES = ("qa.csv", "b.csv")
# Each row of it names a teacher, math or chat.
WITH_TEACHERS = "mixed.jsonl"

# What is made smaller: settings of a run, in blocks and behind `switchkd train`; options of commands; numbers in Python.
SMALLER_RUN: dict[str, Any] = {
    "max_steps": 1,
    "max_new_tokens": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
}
SMALLER_COMMANDS: dict[str, tuple[str, ...]] = {
    "train": tuple(part for key, value in SMALLER_RUN.items() for part in ("--set", f"{key}={str(value).lower()}")),
    "eval": ("--limit", "2", "--seeds", "1", "--max-new-tokens", "8", "--force"),
    "rollout": ("--max-new-tokens", "8", "--force"),
    # A threshold of its own spares a calibration.
    "diagnose": ("--limit", "2", "--max-new-tokens", "8", "--threshold", "0.3"),
    "calibrate": ("--limit", "4", "--max-new-tokens", "12"),
    # A study's runs are trained by tests/test_study.py.
    "compare": ("--dry-run",),
}
SMALLER_PYTHON = ((r"max_new_tokens=\d+", "max_new_tokens=8"), (r"max_steps=\d+", "max_steps=1"))
# Options with which a command does not come back: it is parsed.
SERVES = ("--follow",)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language and text, the file that it is, and why it is not run, if so."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None
    not_run: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


_FENCE = re.compile(
    r"(?:^<!-- (not run|example): ([^\n]*) -->\n)?^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE
)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        kind, said, language, body = match.groups()
        first = re.match(r"# ([\w-]+\.(?:py|yaml))\b", body)
        file = said if kind == "example" else first and first[1]
        line = text[: match.start()].count("\n") + 1
        found.append(Block(page, line, language, body, file, said if kind == "not run" else None))
    # A fence that the pattern does not know would not be run.
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), page
    return found


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block as words, without comments."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in block.text.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(part) for line in lines for part in re.split(r";(?=\s)", line)]
    return [command for command in commands if command]


def commands_in_the_text(page: Path) -> list[list[str]]:
    """Commands between backticks in a page's sentences."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [span.split() for span in re.findall(r"`((?:switchkd|make|torchrun|accelerate launch) [^`\n]+)`", text)]
    # What a launcher starts in each process.
    return [span[span.index("-m") + 1 :] if "-m" in span else span for span in spans]
