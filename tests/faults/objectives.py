"""Wrong losses, each with the checks of `checks.objective` that must catch it.

Shape letters: B rows, T positions, V vocabulary, H hidden, N counted positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _sum(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, token_ids_N: Tensor, cross_entropy_weight: float
) -> Tensor:
    student_logp, teacher_logp = student_logits_NV.log_softmax(dim=-1), teacher_logits_NV.log_softmax(dim=-1)
    divergence = F.kl_div(student_logp, teacher_logp, reduction="sum", log_target=True)
    return divergence - cross_entropy_weight * student_logp.gather(-1, token_ids_N[:, None]).sum()


def right(
    hidden, student, teacher_hidden, teacher, token_ids, *, vocabulary_size, denominator, cross_entropy_weight, **_
):
    """The loss that the faults are variants of."""
    student_logits, teacher_logits = student(hidden)[:, :vocabulary_size], teacher(teacher_hidden)[:, :vocabulary_size]
    return _sum(student_logits, teacher_logits.detach(), token_ids, cross_entropy_weight) / denominator


def divided_by_its_own_count(hidden, *heads, denominator, **settings):
    return right(hidden, *heads, denominator=max(1, len(hidden)), **settings)


def mean_that_is_nan_without_positions(hidden, *heads, denominator, **settings):
    return right(hidden, *heads, denominator=1.0, **settings) / torch.tensor(float(len(hidden)))


def mean_of_the_chunks_means(hidden, student, teacher_hidden, teacher, token_ids, *, chunk_positions, **settings):
    starts = range(0, max(1, len(hidden)), chunk_positions)
    parts = []
    for start in starts:
        chunk = slice(start, start + chunk_positions)
        size = {**settings, "denominator": max(1, len(hidden[chunk]))}
        parts.append(right(hidden[chunk], student, teacher_hidden[chunk], teacher, token_ids[chunk], **size))
    return torch.stack(parts).mean()


def equal_chunks_only(hidden, student, teacher_hidden, teacher, token_ids, *, chunk_positions, **settings):
    """Positions that do not fill a chunk are lost."""
    whole = len(hidden) // chunk_positions * chunk_positions
    return right(hidden[:whole], student, teacher_hidden[:whole], teacher, token_ids[:whole], **settings)


def chunks_by_a_view(hidden, student, teacher_hidden, teacher, token_ids, *, chunk_positions, **settings):
    """50 positions do not go into chunks of 7."""
    chunks = hidden.view(-1, chunk_positions, hidden.shape[-1])
    return right(chunks.flatten(0, 1), student, teacher_hidden, teacher, token_ids, **settings)


def padded_with_logit_0(hidden, student, teacher_hidden, teacher, token_ids, *, denominator, cross_entropy_weight, **_):
    logits = student(hidden), teacher(teacher_hidden).detach()
    rows = max(each.shape[-1] for each in logits)
    padded = (F.pad(each, (0, rows - each.shape[-1])) for each in logits)
    return _sum(*padded, token_ids, cross_entropy_weight) / denominator


def surplus_rows_scored(hidden, student: nn.Linear, teacher_hidden, teacher, token_ids, **settings):
    """The shorter one is padded with -inf; the surplus rows of the longer one keep their mass."""
    rows = max(student.out_features, teacher.out_features)
    logits = student(hidden), teacher(teacher_hidden).detach()
    student_logp, teacher_logp = (
        F.pad(each, (0, rows - each.shape[-1]), value=-1e4).log_softmax(dim=-1) for each in logits
    )
    divergence = F.kl_div(student_logp, teacher_logp, reduction="sum", log_target=True)
    cross_entropy = -student_logp.gather(-1, token_ids[:, None]).sum()
    return (divergence + settings["cross_entropy_weight"] * cross_entropy) / settings["denominator"]


FAULTS = {
    divided_by_its_own_count: ("splits",),
    mean_that_is_nan_without_positions: ("nothing_counted", "splits"),
    mean_of_the_chunks_means: ("chunks",),
    equal_chunks_only: ("chunks",),
    chunks_by_a_view: ("chunks",),
    padded_with_logit_0: ("padded_vocabulary",),
    surplus_rows_scored: ("padded_vocabulary",),
}


# ----------------------------------------------------------------------------------------------- which positions count


def _token_loss(hidden_NH: Tensor, token_ids_N: Tensor) -> Tensor:
    """A loss of hidden states and the tokens they should predict."""
    weight_VH = torch.linspace(-1, 1, 9 * hidden_NH.shape[-1], dtype=hidden_NH.dtype).reshape(9, -1).sin()
    return F.cross_entropy(hidden_NH @ weight_VH.T, token_ids_N, reduction="sum")


def counted_as_they_should_be(hidden_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    counted = mask_BT[:, 1:]
    return _token_loss(hidden_BTH[:, :-1][counted], ids_BT[:, 1:][counted])


def unshifted(hidden_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return _token_loss(hidden_BTH[mask_BT], ids_BT[mask_BT])


def first_response_token_never_trained(hidden_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    counted = mask_BT[:, 1:] & mask_BT[:, :-1]
    return _token_loss(hidden_BTH[:, :-1][counted], ids_BT[:, 1:][counted])


def mask_not_shifted_with_the_labels(hidden_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    counted = mask_BT[:, :-1]
    return _token_loss(hidden_BTH[:, :-1][counted], ids_BT[:, 1:][counted])


def mask_ignored(hidden_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return _token_loss(hidden_BTH[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


POSITION_FAULTS = (unshifted, first_response_token_never_trained, mask_not_shifted_with_the_labels, mask_ignored)
