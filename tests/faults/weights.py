"""Wrong weights, each with the definition that catches it.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.weights import Text
from reference import weights as reference
from switchkd.loss.release import Release, downward_change_point
from switchkd.records import Batch

GAMMA, TOKENS, LEAST, SEGMENT = 0.5, 3, 0.4, 2


@dataclass(frozen=True)
class Fault:
    """A wrong weight, and what it claims to be."""

    function: Callable[[Batch], Tensor]
    claims: Callable[[Text], list[float]]


def by_writer(text: Text) -> list[float]:
    return reference.by_writer(text.writers, student=0.25, teacher=2.0)


def prefix(text: Text) -> list[float]:
    return reference.prefix(text.writers, tokens=TOKENS)


def importance(text: Text) -> list[float]:
    return reference.importance(text.writers, text.student, text.teacher, gamma=GAMMA)


def trust(text: Text) -> list[float]:
    return reference.trust(text.writers, text.student, text.teacher)


def trust_from_a_least(text: Text) -> list[float]:
    return reference.trust(text.writers, text.student, text.teacher, least_trust=LEAST)


def release(text: Text) -> list[float]:
    return reference.release(text.writers, text.margins, segment_tokens=SEGMENT)


# -------------------------------------------------------------------------------------------------------------- faults


def _log_ratio(batch: Batch) -> Tensor:
    assert batch.teacher_logp_BT is not None
    assert batch.student_logp_BT is not None
    return batch.teacher_logp_BT - batch.student_logp_BT


def data_counted_as_the_students(batch: Batch) -> Tensor:
    return torch.where(batch.written_by_teacher_BT, 2.0, 0.25)


def writers_the_other_way_round(batch: Batch) -> Tensor:
    return torch.where(batch.rolled_out_BT, torch.where(batch.written_by_teacher_BT, 0.25, 2.0), 1.0)


def prefix_one_short(batch: Batch) -> Tensor:
    return (batch.response_mask_BT.cumsum(dim=1) < TOKENS).double()


def prefix_of_the_whole_text(batch: Batch) -> Tensor:
    return (batch.attention_mask_BT.cumsum(dim=1) <= TOKENS).double()


def prefix_of_the_rollout_alone(batch: Batch) -> Tensor:
    return (batch.rolled_out_BT.cumsum(dim=1) <= TOKENS).double()


def _importance(batch: Batch, before_BT: Tensor, total: Tensor) -> Tensor:
    return torch.where(batch.rolled_out_BT, 1 + GAMMA * (1 - before_BT / total.clamp(min=1e-8)), 1.0)


def importance_with_the_token_itself(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch).abs()
    return _importance(batch, distance_BT.cumsum(dim=1), distance_BT.sum(dim=1, keepdim=True))


def importance_by_the_total_of_the_batch(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch).abs()
    return _importance(batch, distance_BT.cumsum(dim=1) - distance_BT, distance_BT.sum())


def importance_normalized_by_the_padded_length(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch).abs()
    padded = distance_BT.shape[1] / batch.rolled_out_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return _importance(batch, distance_BT.cumsum(dim=1) - distance_BT, distance_BT.sum(dim=1, keepdim=True) * padded)


def importance_of_signed_distances(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch)
    return _importance(batch, distance_BT.cumsum(dim=1) - distance_BT, distance_BT.sum(dim=1, keepdim=True))


def importance_of_data_text_too(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch).abs()
    total = distance_BT.sum(dim=1, keepdim=True).clamp(min=1e-8)
    return 1 + GAMMA * (1 - (distance_BT.cumsum(dim=1) - distance_BT) / total)


def importance_that_rises(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch).abs()
    total = distance_BT.sum(dim=1, keepdim=True)
    return _importance(batch, total - (distance_BT.cumsum(dim=1) - distance_BT), total)


def importance_that_is_nan_where_the_models_agree(batch: Batch) -> Tensor:
    distance_BT = _log_ratio(batch).abs()
    share_BT = (distance_BT.cumsum(dim=1) - distance_BT) / distance_BT.sum(dim=1, keepdim=True)
    return torch.where(batch.rolled_out_BT, 1 + GAMMA * (1 - share_BT), 1.0)


def trust_without_a_most(batch: Batch) -> Tensor:
    return torch.where(batch.rolled_out_BT, _log_ratio(batch).exp(), 1.0)


def trust_upside_down(batch: Batch) -> Tensor:
    return torch.where(batch.rolled_out_BT, (-_log_ratio(batch)).exp().clamp(max=1), 1.0)


def trust_by_the_teachers_probability(batch: Batch) -> Tensor:
    assert batch.teacher_logp_BT is not None
    return torch.where(batch.rolled_out_BT, batch.teacher_logp_BT.exp(), 1.0)


def least_trust_of_the_logarithm(batch: Batch) -> Tensor:
    return torch.where(batch.rolled_out_BT, (_log_ratio(batch) >= -LEAST).double(), 1.0)


def distrust_where_the_least_is_reached(batch: Batch) -> Tensor:
    trust_BT = _log_ratio(batch).exp().clamp(max=1)
    return torch.where(batch.rolled_out_BT, (trust_BT < LEAST).double(), 1.0)


def _released(batch: Batch, late: int = 0, counted: bool = False, upwards: bool = False) -> Tensor:
    assert batch.margin_BT is not None
    weight_BT = torch.ones(batch.rolled_out_BT.shape, dtype=torch.float64)
    read_BT = batch.response_mask_BT if counted else batch.rolled_out_BT
    for row, mask_T in enumerate(read_BT):
        margins = batch.margin_BT[row][mask_T]
        place = Release(segment_tokens=SEGMENT).release_at((-margins if upwards else margins).tolist())
        weight_BT[row][mask_T.nonzero()[place + late :, 0]] = 0
    return weight_BT


def release_a_segment_late(batch: Batch) -> Tensor:
    return _released(batch, late=SEGMENT)


def release_with_the_beginning_in_the_series(batch: Batch) -> Tensor:
    return _released(batch, counted=True)


def release_at_a_rise(batch: Batch) -> Tensor:
    return _released(batch, upwards=True)


def release_of_the_whole_batch(batch: Batch) -> Tensor:
    return _released(batch).amin(dim=0).expand(batch.rolled_out_BT.shape)


def release_of_tokens_without_segments(batch: Batch) -> Tensor:
    assert batch.margin_BT is not None
    weight_BT = torch.ones(batch.rolled_out_BT.shape, dtype=torch.float64)
    for row, mask_T in enumerate(batch.rolled_out_BT):
        place = downward_change_point(batch.margin_BT[row][mask_T].tolist())
        if place is not None:
            weight_BT[row][mask_T.nonzero()[place * SEGMENT :, 0]] = 0
    return weight_BT


FAULTS = [
    Fault(data_counted_as_the_students, by_writer),
    Fault(writers_the_other_way_round, by_writer),
    Fault(prefix_one_short, prefix),
    Fault(prefix_of_the_whole_text, prefix),
    Fault(prefix_of_the_rollout_alone, prefix),
    Fault(importance_with_the_token_itself, importance),
    Fault(importance_by_the_total_of_the_batch, importance),
    Fault(importance_normalized_by_the_padded_length, importance),
    Fault(importance_of_signed_distances, importance),
    Fault(importance_of_data_text_too, importance),
    Fault(importance_that_rises, importance),
    Fault(importance_that_is_nan_where_the_models_agree, importance),
    Fault(trust_without_a_most, trust),
    Fault(trust_upside_down, trust),
    Fault(trust_by_the_teachers_probability, trust),
    Fault(least_trust_of_the_logarithm, trust_from_a_least),
    Fault(distrust_where_the_least_is_reached, trust_from_a_least),
    Fault(release_a_segment_late, release),
    Fault(release_with_the_beginning_in_the_series, release),
    Fault(release_at_a_rise, release),
    Fault(release_of_the_whole_batch, release),
    Fault(release_of_tokens_without_segments, release),
]
