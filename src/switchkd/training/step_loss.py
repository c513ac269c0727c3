"""The loss of a micro-batch: the student's hidden states beside the teacher's, at the positions that are counted.

Shape letters: B rows, T positions, H hidden, N counted positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.data.collate import collate, groups_of_like_length, micro_batches, response_ids
from switchkd.loss.objective import Counted, Report, distillation_loss
from switchkd.loss.policy_gradient import importance_and_returns
from switchkd.loss.signals import DenseTeacher
from switchkd.methods.plan import Plan
from switchkd.models.heads import backbone, last_hidden
from switchkd.models.pair import ModelPair
from switchkd.records import Batch, Example, Rollout


class StepLoss:
    """The objective of a plan on texts of a pair, in nats. Knows no trainer.

    Made while the teacher's weights are loaded, since a head proves itself on a forward. Only `scored` needs them again.
    """

    def __init__(self, pair: ModelPair, plan: Plan, *, rows: int) -> None:
        self.pair = pair
        self.rows = rows
        self.objective = plan.objective
        self.policy = plan.policy
        self.student_head = pair.student_head
        self.teacher_head = None if plan.objective.divergence is None else pair.teacher_head

    def scored(self, sequences: Sequence[Example | Rollout]) -> Sequence[Example | Rollout]:
        """The sequences, each with the teacher's last hidden states that predict its response, (T, H) on its device.

        Rollouts that the teacher took part in have them already. The teacher reads the others, at most `rows` of similar
        length at a time, and one that occurs twice (a replayed one) once. Where the objective compares with no teacher, the
        sequences stay as they are.
        """
        teacher = self.pair.teacher
        if self.teacher_head is None or teacher is None:
            return sequences
        unread = [*{id(each): each for each in sequences if each.teacher_hidden is None}.values()]
        lengths = [len(sequence.prompt.token_ids) + len(response_ids(sequence)) for sequence in unread]
        read: dict[int, Example | Rollout] = {}
        for group in groups_of_like_length(lengths, self.rows):
            batch = collate([unread[index] for index in group], self.pair.pad_id).to(teacher.device)
            with torch.no_grad():
                output = backbone(teacher)(
                    input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
                )
            states_BTH, masks_BT = output.last_hidden_state, batch.response_mask_BT
            for index, hidden_TH, mask_T in zip(group, states_BTH, masks_BT, strict=True):
                # The token at t is predicted at t - 1.
                read[id(unread[index])] = replace(unread[index], teacher_hidden=hidden_TH[:-1][mask_T[1:]])
        return [read.get(id(sequence), sequence) for sequence in sequences]

    def micro_batches(self, sequences: Sequence[Example | Rollout], size: int) -> list[dict[str, Any]]:
        """The inputs of a step's forwards, each on at most `size` sequences of similar length, the longest first."""
        lengths = [len(sequence.prompt.token_ids) + len(response_ids(sequence)) for sequence in sequences]
        return [self.inputs([sequences[index] for index in group]) for group in micro_batches(lengths, size)]

    def inputs(self, sequences: Sequence[Example | Rollout]) -> dict[str, Any]:
        """The inputs of a forward: the batch, its weights, and how many of its tokens have a weight other than 0 and so train."""
        batch = collate(sequences, self.pair.pad_id)
        weight_N, return_N = self._weights(batch)
        return {
            # transformers counts tokens and operations by it.
            "input_ids": batch.input_ids_BT,
            "batch": batch,
            "weights": (weight_N, return_N),
            "trained_tokens": int(weight_N.count_nonzero()),
        }

    def _weights(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What multiplies the loss at each counted position, (N,), and the returns of the long-term term, (N,) in nats."""
        mask_BT = batch.response_mask_BT
        weight_N = self.objective.weights(batch.written_by_teacher_BT[mask_BT], batch.rolled_out_BT[mask_BT])
        if not self.objective.long_term_weight:
            return weight_N, None
        importance_BT, return_BT = importance_and_returns(batch, self.policy)
        return weight_N * importance_BT[mask_BT].float(), return_BT[mask_BT].float()

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], denominator: Tensor | float, *, measure: bool = False
    ) -> tuple[Tensor, Report]:
        """The sum over the counted positions of the inputs / `denominator`, and its report; see `distillation_loss`.

        `model` is the student or its wrapper; the inputs are on its device.
        """
        batch: Batch = inputs["batch"]
        weight_N, return_N = inputs["weights"]
        hidden_BTH = last_hidden(model, self.pair.student, batch.input_ids_BT, batch.attention_mask_BT)
        # The token at t is predicted at t - 1.
        mask_BT = batch.response_mask_BT[:, 1:]
        by_teacher_N, rolled_out_N = batch.written_by_teacher_BT[:, 1:][mask_BT], batch.rolled_out_BT[:, 1:][mask_BT]
        counted = Counted(
            hidden_BTH[:, :-1][mask_BT],
            batch.input_ids_BT[:, 1:][mask_BT],
            weight_N=weight_N,
            written_by_teacher_N=by_teacher_N,
            return_N=return_N,
            cross_entropy_factor_N=self.objective.cross_entropy_factor(by_teacher_N, rolled_out_N),
        )
        teacher, teacher_NH = None, batch.teacher_hidden_NH
        if self.teacher_head is not None and teacher_NH is not None:
            teacher = DenseTeacher(teacher_NH, self.teacher_head, self.objective.loss_temperature)
        return distillation_loss(
            counted, self.student_head, self.objective, teacher=teacher, denominator=denominator, measure=measure
        )
