"""Scored answers: what is kept of each, and the files that hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from switchkd.errors import UserError
from switchkd.files import json_text, write_atomically
from switchkd.records import FinishReason

# The temporary name of a file is longer than its own, and a file system takes 255 bytes.
_LONGEST_NAME = 60


@dataclass(frozen=True)
class ScoredAnswer:
    """One line of the answers file. `rouge_l` is 0 to 100; `tokens` counts the end-of-text token.

    Of a row without references, `rouge_l` and `exact_match` are None. `scores` holds those that were asked for beside them.
    """

    where: str
    prompt_id: int
    seed: int
    bucket: str | None
    prompt: str
    answer: str
    references: tuple[str, ...]
    rouge_l: float | None
    exact_match: bool | None
    tokens: int
    finish_reason: FinishReason
    scores: dict[str, float] = field(default_factory=dict)


def answers_file(folder: Path, set_name: str) -> Path:
    """Where an evaluation into the folder keeps the answers to a set, a `ScoredAnswer` a line."""
    # A set's name can be a path, or hold a colon.
    name = re.sub(r"[^\w.-]+", "_", set_name)[-_LONGEST_NAME:]
    return folder / f"answers_{name}.jsonl"


def check_files(names: Iterable[str], folder: Path) -> None:
    """Raise UserError where the answers to two sets would share a file."""
    by_file: dict[Path, str] = {}
    for name in names:
        other = by_file.setdefault(answers_file(folder, name), name)
        if other != name:
            raise UserError(
                f"the answers to {other} and {name} would share a file; rename one, or evaluate them into two folders"
            )


def write_answers(answers: Sequence[ScoredAnswer], path: Path | None) -> None:
    """Write the answers into a file, whole or not at all; nowhere without a path."""
    if path is not None:
        write_atomically(path, "".join(json_text(asdict(answer)) + "\n" for answer in answers))


def read_answers(path: Path) -> list[ScoredAnswer]:
    """The answers in a file that an evaluation wrote; raises UserError, with the line, for whatever is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give an answers_....jsonl that switchkd eval wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            answer = ScoredAnswer(**values)
            reason = FinishReason(answer.finish_reason)
        except (ValueError, TypeError):
            raise UserError(
                f"{path}:{number} is no scored answer; give an answers_....jsonl that switchkd eval wrote"
            ) from None
        found.append(ScoredAnswer(**{**values, "references": tuple(answer.references), "finish_reason": reason}))
    if not found:
        raise UserError(f"{path} holds no answers; run switchkd eval again")
    return found


def same_row(ours: ScoredAnswer, theirs: ScoredAnswer) -> bool:
    """Whether two answers are to the same row: with the same references, or none and the same place in a file of that name.

    Their prompts may differ, where the models have chat templates of their own.
    """
    if ours.references or theirs.references:
        return ours.references == theirs.references
    return ours.where.rsplit("/", 1)[-1] == theirs.where.rsplit("/", 1)[-1]
