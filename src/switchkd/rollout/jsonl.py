"""Rollouts as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.files import write_atomically
from switchkd.records import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rollout_record(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The rollout as JSON values: its texts and the fields of `Rollout`, with one list entry per token.

    JSON has no NaN (no teacher, or no threshold) and no -inf (a model excludes the token): both become null.
    """
    texts = {
        name: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        for name, ids in (("prompt", rollout.prompt.token_ids), ("response", rollout.token_ids))
    }
    numbers = {
        name: [value if math.isfinite(value) else None for value in getattr(rollout, name)]
        for name in ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part", "margin")
        if getattr(rollout, name)
    }
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "sample_id": rollout.prompt.sample_id,
        **texts,
        "finish_reason": str(rollout.finish_reason),
        "teacher_share": rollout.teacher_share,
        "prompt_token_ids": list(rollout.prompt.token_ids),
        "token_ids": list(rollout.token_ids),
        "tokens": tokenizer.convert_ids_to_tokens(list(rollout.token_ids)),
        "written_by_teacher": list(rollout.written_by_teacher),
        **numbers,
    }


def write_rollouts(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write one line per rollout, atomically: the whole file or none."""
    write_atomically(path, "".join(json.dumps(rollout_record(rollout, tokenizer)) + "\n" for rollout in rollouts))
