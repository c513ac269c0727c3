"""A model's last hidden states over finished texts, at the positions that predict the response.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.data.collate import collate, groups_of_like_length, response_ids
from switchkd.models.heads import backbone
from switchkd.records import Example, Rollout


def response_states(
    model: PreTrainedModel,
    sequences: Sequence[Example | Rollout],
    *,
    pad_id: int,
    rows: int,
    on_forward: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, Tensor]]:
    """The index of each sequence and the states (T, H) that predict its response, on the model's device, without gradients.

    At most `rows` sequences of similar length are read at a time, the longest first; the order depends on the lengths alone.
    `on_forward` is called before each of these forwards.
    """
    lengths = [len(sequence.prompt.token_ids) + len(response_ids(sequence)) for sequence in sequences]
    for group in groups_of_like_length(lengths, rows):
        batch = collate([sequences[index] for index in group], pad_id).to(model.device)
        on_forward()
        with torch.no_grad():
            output = backbone(model)(
                input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
            )
        for index, hidden_TH, mask_T in zip(group, output.last_hidden_state, batch.response_mask_BT, strict=True):
            # The token at t is predicted at t - 1.
            yield index, hidden_TH[:-1][mask_T[1:]]
