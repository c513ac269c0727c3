"""From examples and rollouts to padded tensors, and which of them to put together.

Shape letters: B rows, T positions, H hidden, N counted positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from switchkd.records import Batch, Example, Rollout, TopLogp

# Tokens. A forward over fewer costs a large model as much, since it reads all weights.
_FULL_FORWARD = 256
_MEASURED = ("student_logp", "teacher_logp", "law_logp", "margin")


def collate(sequences: Sequence[Example | Rollout], pad_id: int) -> Batch:
    """Prompts and responses as one Batch of shape (B, T), padded on the right to the longest sequence.

    Examples and rollouts may be mixed; an example's response counts as not written by the teacher. The batch has
    `teacher_hidden` (by teacher) and `teacher_top_N` only where every sequence has. Raises ValueError for no sequences.
    """
    if not sequences:
        raise ValueError("there are no sequences to collate; give at least one")
    prompts = [sequence.prompt.token_ids for sequence in sequences]
    responses = [response_ids(sequence) for sequence in sequences]
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    shape = (len(sequences), longest)

    # Masks go by length, never by id: the padding token of many models is their end-of-text token, which does count.
    input_ids_BT = torch.full(shape, pad_id)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    response_mask_BT = torch.zeros(shape, dtype=torch.bool)
    rolled_out_BT = torch.zeros(shape, dtype=torch.bool)
    written_by_teacher_BT = torch.zeros(shape, dtype=torch.bool)
    measured = {name: torch.zeros(shape, dtype=torch.float64) for name in _MEASURED}
    for row, (sequence, prompt, response) in enumerate(zip(sequences, prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids_BT[row, :end] = torch.tensor(prompt + response, dtype=torch.long)
        attention_mask_BT[row, :end] = 1
        begun = sequence.prompt.begun if sequence.prompt.trains_beginning else 0
        response_mask_BT[row, start - begun : end] = True
        if isinstance(sequence, Rollout):
            rolled_out_BT[row, start:end] = True
            written_by_teacher_BT[row, start:end] = torch.tensor(sequence.written_by_teacher, dtype=torch.bool)
            for name, values_BT in measured.items():
                # What the engine was not asked for is unknown, not 0.
                known = getattr(sequence, name) or (math.nan,)
                values_BT[row, start:end] = torch.tensor(known, dtype=torch.float64)
    return Batch(
        input_ids_BT,
        attention_mask_BT,
        response_mask_BT,
        rolled_out_BT,
        written_by_teacher_BT,
        _packed_teacher_hidden(sequences),
        teacher_top_N=_packed_teacher_top(sequences),
        teachers=tuple(sequence.prompt.teacher for sequence in sequences),
        **{f"{name}_BT": values_BT for name, values_BT in measured.items()},
    )


def response_ids(sequence: Example | Rollout) -> tuple[int, ...]:
    """The token ids after the prompt, the end-of-text token included."""
    return sequence.token_ids if isinstance(sequence, Rollout) else sequence.response_ids


def _packed_teacher_hidden(sequences: Sequence[Example | Rollout]) -> dict[str, torch.Tensor] | None:
    kept: dict[str, list[torch.Tensor]] = {}
    for sequence in sequences:
        if sequence.teacher_hidden is None:
            return None
        kept.setdefault(sequence.prompt.teacher, []).append(sequence.teacher_hidden)
    return {teacher: _joined(states) for teacher, states in kept.items()}


def _joined(states: Sequence[torch.Tensor]) -> torch.Tensor:
    # Those of this step are where the teacher is, replayed ones may be on the CPU.
    device = next((hidden.device for hidden in states if hidden.device.type != "cpu"), states[0].device)
    return torch.cat([hidden.to(device) for hidden in states])


def _packed_teacher_top(sequences: Sequence[Example | Rollout]) -> TopLogp | None:
    kept = [sequence.teacher_top for sequence in sequences if sequence.teacher_top is not None]
    return TopLogp.joined(kept) if len(kept) == len(sequences) else None


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of `lengths` in groups of `size` of similar length, so that little is padded; the last may be smaller.

    The longest come first, so that a run that does not fit into memory fails at once; equal lengths keep their order.
    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it has to be at least 1")
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [longest_first[start : start + size] for start in range(0, len(lengths), size)]


def groups_of_like_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of `lengths`, the longest first, in groups of at most `size`, for forwards that may be of any size.

    A group of 256 tokens or more is closed once the next row is over a tenth shorter than its longest.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        closed = len(group) * longest >= _FULL_FORWARD and lengths[index] < 0.9 * longest
        if not group or len(group) == size or closed:
            groups.append([index])
        else:
            group.append(index)
    return groups
