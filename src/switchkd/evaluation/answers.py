"""Scored answers read back from the files of earlier evaluations."""

from __future__ import annotations

import json
from pathlib import Path

from switchkd.errors import UserError
from switchkd.evaluation.score import ScoredAnswer
from switchkd.records import FinishReason


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
