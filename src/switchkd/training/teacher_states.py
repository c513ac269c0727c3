"""What the teacher says of the texts of a step, asked once and before the student's first forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from switchkd.data.collate import collate, groups_of_like_length, response_ids
from switchkd.models.heads import backbone
from switchkd.records import Example, Rollout


def with_teacher_states(
    sequences: Sequence[Example | Rollout], teacher: PreTrainedModel, pad_id: int, *, rows: int, device: torch.device
) -> list[Example | Rollout]:
    """The sequences, each with the teacher's last hidden states that predict its response, (T, H) on the CPU.

    A rollout that the teacher took part in brings them; the others are read here, at most `rows` of like length at a time.
    """
    scored = list(sequences)
    unread = [index for index, sequence in enumerate(sequences) if sequence.teacher_hidden is None]
    lengths = [len(sequences[index].prompt.token_ids) + len(response_ids(sequences[index])) for index in unread]
    for group in groups_of_like_length(lengths, rows):
        indices = [unread[each] for each in group]
        batch = collate([sequences[index] for index in indices], pad_id).to(device)
        with torch.no_grad():
            output = backbone(teacher)(
                input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
            )
        for hidden_TH, response_mask_T, index in zip(
            output.last_hidden_state, batch.response_mask_BT, indices, strict=True
        ):
            # The token at t is predicted at t - 1.
            scored[index] = replace(sequences[index], teacher_hidden=hidden_TH[:-1][response_mask_T[1:]].cpu())
    return scored
