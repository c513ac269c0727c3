"""Past rollouts, kept to be trained on again: what is drawn depends on an address and on what is kept, nothing else."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from switchkd.errors import UserError
from switchkd.records import FinishReason, Prompt, Rollout

FILE_NAME = "replay.safetensors"
_PER_TOKEN: dict[str, torch.dtype] = {
    "token_ids": torch.int64,
    "written_by_teacher": torch.bool,
    "divergence": torch.float64,
    "threshold": torch.float64,
    "student_logp": torch.float64,
    "teacher_logp": torch.float64,
}
_REASONS = list(FinishReason)


class ReplayBuffer:
    """The newest `capacity` rollouts, oldest first, with what they keep of the teacher. Raises UserError for a capacity below 1.

    Memory and checkpoint: some 50 bytes a token, and what `teacher_hidden` takes: T x H numbers a rollout, where it is kept.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"replay_capacity is {capacity}; it has to be at least 1 rollout")
        self.rollouts: deque[Rollout] = deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        """Whether a further rollout pushes one out."""
        return len(self.rollouts) == self.rollouts.maxlen

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Keep the rollouts of one step, ordered by prompt, so that no order or split of the batch matters."""
        self.rollouts.extend(sorted(rollouts, key=lambda rollout: (rollout.prompt.sample_id, rollout.prompt.prompt_id)))

    def draw(self, uniform: float) -> Rollout:
        """The kept rollout that a uniform in [0, 1) selects, each as likely as another."""
        return self.rollouts[int(uniform * len(self.rollouts))]

    def save(self, folder: Path) -> None:
        """Write `FILE_NAME` into the folder, whole or not at all. Raises OSError where that fails."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE_NAME}.partial"
        save_file(_packed(list(self.rollouts)), partial, metadata={"rollouts": json.dumps(len(self.rollouts))})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(folder / FILE_NAME)

    def load(self, folder: Path) -> None:
        """Take what `save` wrote in place of what is kept; raises UserError where it is missing or cut off."""
        path = folder / FILE_NAME
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}), and the run goes on from its rollouts; resume from another checkpoint"
            ) from error
        self.rollouts.clear()
        self.rollouts.extend(_unpacked(tensors))


def _packed(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """All fields as flat tensors, row after row, with the rows' lengths."""
    hidden = {index: rollout.teacher_hidden for index, rollout in enumerate(rollouts)}
    kept = {index: hidden_TH for index, hidden_TH in hidden.items() if hidden_TH is not None}
    whole_numbers: dict[str, Callable[[Rollout], int]] = {
        "prompt_length": lambda rollout: len(rollout.prompt.token_ids),
        "length": lambda rollout: len(rollout.token_ids),
        "prompt_id": lambda rollout: rollout.prompt.prompt_id,
        "sample_id": lambda rollout: rollout.prompt.sample_id,
        "finish_reason": lambda rollout: _REASONS.index(rollout.finish_reason),
    }
    tensors = {name: torch.tensor([of(r) for r in rollouts], dtype=torch.int64) for name, of in whole_numbers.items()}
    tensors["prompt"] = torch.tensor([token for r in rollouts for token in r.prompt.token_ids], dtype=torch.int64)
    for name, dtype in _PER_TOKEN.items():
        tensors[name] = torch.tensor([value for r in rollouts for value in getattr(r, name)], dtype=dtype)
    tensors["hidden_of"] = torch.tensor(list(kept), dtype=torch.int64)
    tensors["hidden"] = torch.cat([h.cpu() for h in kept.values()]) if kept else torch.empty(0, 0)
    return tensors


def _unpacked(tensors: dict[str, Tensor]) -> list[Rollout]:
    lengths = tensors["length"].tolist()
    prompts = [part.tolist() for part in _parts(tensors["prompt"], tensors["prompt_length"].tolist())]
    per_token = {name: [part.tolist() for part in _parts(tensors[name], lengths)] for name in _PER_TOKEN}
    owners = tensors["hidden_of"].tolist()
    hidden = dict(zip(owners, _parts(tensors["hidden"], [lengths[owner] for owner in owners]), strict=True))
    found = []
    for row, prompt in enumerate(prompts):
        values: dict[str, Any] = {name: tuple(parts[row]) for name, parts in per_token.items()}
        found.append(
            Rollout(
                prompt=Prompt(tuple(prompt), int(tensors["prompt_id"][row]), int(tensors["sample_id"][row])),
                finish_reason=_REASONS[int(tensors["finish_reason"][row])],
                teacher_hidden=hidden.get(row),
                **values,
            )
        )
    return found


def _parts(packed: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return [packed[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]
