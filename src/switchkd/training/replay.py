"""Past rollouts, kept to be trained on again. What is drawn depends on an address and on what is kept, on nothing else.

Shape letters: T positions, H hidden.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from switchkd.errors import UserError
from switchkd.files import replacing
from switchkd.records import FinishReason, Prompt, Rollout, TopLogp

FILE_NAME = "replay.safetensors"
# The types of the engines' own numbers: in float32 a resumed run would not be equal bit for bit.
_PER_TOKEN = {"token_ids": torch.int64, "written_by_teacher": torch.bool} | dict.fromkeys(
    ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part", "margin"), torch.float64
)
_REASONS = list(FinishReason)


class ReplayBuffer:
    """The newest `capacity` rollouts, oldest first, with what they keep of the teacher.

    A token takes 57 bytes in a checkpoint and 240 in memory, and 8 and 32 more with its margin. A kept `teacher_hidden` adds T
    x H numbers to both, a `teacher_top` 12 bytes for each id of each token.
    """

    def __init__(self, capacity: int) -> None:
        self.rollouts: deque[Rollout] = deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        """Whether a further rollout pushes one out."""
        return len(self.rollouts) == self.rollouts.maxlen

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Keep the rollouts of one step, ordered by prompt, so that no order or split of the batch matters."""
        # Kept states may be many, and a device has better uses for its memory.
        self.rollouts.extend(sorted((rollout.to("cpu") for rollout in rollouts), key=_address))

    def put_back(self, rollouts: Iterable[Rollout]) -> None:
        """Take rollouts that the teacher has read in the place of those kept unread, so that each is read once."""
        read = {_address(rollout): rollout for rollout in rollouts if _is_read(rollout)}
        for index, kept in enumerate(self.rollouts):
            if not _is_read(kept) and _address(kept) in read:
                self.rollouts[index] = read[_address(kept)].to("cpu")

    def draw(self, uniform: float) -> Rollout:
        """The kept rollout that a uniform in [0, 1) selects, each as likely as another."""
        return self.rollouts[int(uniform * len(self.rollouts))]

    def save(self, folder: Path) -> None:
        """Write `FILE_NAME` into the folder, whole or not at all. Raises OSError where that fails."""
        with replacing(folder / FILE_NAME) as partial:
            save_file(_packed(list(self.rollouts)), partial)

    def load(self, folder: Path | None, teachers: Collection[str] = ("",)) -> None:
        """Take what `save` wrote in place of what is kept; None empties the buffer.

        Raises UserError where it cannot be read, and for rollouts of a teacher that is none of `teachers`.
        """
        self.rollouts.clear()
        if folder is None:
            return
        path = folder / FILE_NAME
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}), and the run goes on from its rollouts; resume from another checkpoint"
            ) from error
        if "teachers" not in tensors:
            raise UserError(f"{path} is of an earlier switchkd, which kept rollouts otherwise; begin the run again")
        found = _unpacked(tensors)
        gone = [each.prompt.teacher for each in found if each.prompt.teacher not in teachers]
        if gone:
            raise UserError(
                f"{path} has rollouts of the teacher {gone[0]!r}, which is not there; go on with the same teachers"
            )
        self.rollouts.extend(found)


def _is_read(rollout: Rollout) -> bool:
    """Whether it has what the teacher says of it."""
    return rollout.teacher_hidden is not None or rollout.teacher_top is not None


def _address(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt.sample_id, rollout.prompt.prompt_id


def _packed(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """All fields as flat tensors, row after row, and a table of lengths, ids and ends with a line for each row."""
    ends = [_REASONS.index(rollout.finish_reason) for rollout in rollouts]
    table = [
        (
            len(r.prompt.token_ids),
            len(r.token_ids),
            r.prompt.prompt_id,
            r.prompt.sample_id,
            r.prompt.begun,
            r.prompt.trains_beginning,
            end,
        )
        for r, end in zip(rollouts, ends, strict=True)
    ]
    return {
        "rows": torch.tensor(table, dtype=torch.int64).reshape(-1, 7),
        "prompt": torch.tensor([token for r in rollouts for token in r.prompt.token_ids], dtype=torch.int64),
        **_packed_states(rollouts),
        **_packed_tops(rollouts),
        **{
            name: torch.tensor([value for r in rollouts for value in getattr(r, name)], dtype=dtype)
            for name, dtype in _PER_TOKEN.items()
        },
    }


def _packed_states(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """What is kept of the teachers' states: those of each teacher by its number, since they differ in width and type.

    Of a teacher: whose its states are, how many positions each has, and the states. The names stand behind as JSON.
    """
    teachers = sorted({rollout.prompt.teacher for rollout in rollouts})
    packed = {
        "teacher": torch.tensor([teachers.index(rollout.prompt.teacher) for rollout in rollouts], dtype=torch.int64),
        "teachers": torch.tensor(list(json.dumps(teachers).encode()), dtype=torch.uint8),
    }
    for number, teacher in enumerate(teachers):
        kept = {
            row: rollout.teacher_hidden
            for row, rollout in enumerate(rollouts)
            if rollout.teacher_hidden is not None and rollout.prompt.teacher == teacher
        }
        if kept:
            packed[f"hidden_of.{number}"] = torch.tensor(list(kept), dtype=torch.int64)
            # A rollout that began with a trained part of its response has states for that part too.
            lengths = [len(hidden_TH) for hidden_TH in kept.values()]
            packed[f"hidden_rows.{number}"] = torch.tensor(lengths, dtype=torch.int64)
            packed[f"hidden.{number}"] = torch.cat([hidden_TH.cpu() for hidden_TH in kept.values()])
    return packed


def _unpacked_states(tensors: dict[str, Tensor], teachers: int) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for number in range(teachers):
        if f"hidden.{number}" in tensors:
            states = tensors[f"hidden.{number}"].split(tensors[f"hidden_rows.{number}"].tolist())
            found |= zip(tensors[f"hidden_of.{number}"].tolist(), states, strict=True)
    return found


def _packed_tops(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """What is kept of the teacher's likeliest ids: whose it is, how many positions each has, and the three columns."""
    kept = {row: rollout.teacher_top for row, rollout in enumerate(rollouts) if rollout.teacher_top is not None}
    if not kept:
        return {}
    of, rows = torch.tensor(list(kept)), torch.tensor([len(top.ids) for top in kept.values()])
    columns = TopLogp.joined([*kept.values()])
    return {"top_of": of, "top_rows": rows, **{f"top_{name}": each for name, each in vars(columns).items()}}


def _unpacked_tops(tensors: dict[str, Tensor]) -> dict[int, TopLogp]:
    if "top_of" not in tensors:
        return {}
    lengths = tensors["top_rows"].tolist()
    parts = zip(*(tensors[f"top_{name}"].split(lengths) for name in ("ids", "logp", "rest_logp")), strict=True)
    return {row: TopLogp(*columns) for row, columns in zip(tensors["top_of"].tolist(), parts, strict=True)}


def _unpacked(tensors: dict[str, Tensor]) -> list[Rollout]:
    table = tensors["rows"].tolist()
    teachers = json.loads(bytes(tensors["teachers"].tolist()))
    lengths = [length for _, length, *_ in table]
    prompts = tensors["prompt"].split([length for length, *_ in table])
    # What the engine was not asked for is empty.
    per_token = {name: tensors[name].split(lengths) for name in _PER_TOKEN if len(tensors[name]) == sum(lengths)}
    hidden, tops = _unpacked_states(tensors, len(teachers)), _unpacked_tops(tensors)
    of, found = tensors["teacher"].tolist(), []
    for row, (_, _, prompt_id, sample_id, begun, trains, reason) in enumerate(table):
        values: dict[str, Any] = {name: tuple(parts[row].tolist()) for name, parts in per_token.items()}
        prompt = Prompt(tuple(prompts[row].tolist()), prompt_id, sample_id, begun, bool(trains), teachers[of[row]])
        values |= {"teacher_hidden": hidden.get(row), "teacher_top": tops.get(row)}
        found.append(Rollout(prompt, finish_reason=_REASONS[reason], **values))
    return found
