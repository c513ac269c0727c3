"""The loss of a micro-batch: the student's hidden states beside the teacher's, at the positions that are counted.

Shape letters: B rows, T positions, H hidden, N counted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.data.collate import collate, micro_batches, response_ids
from switchkd.distributions.shaping import top_logp
from switchkd.loss.objective import Counted, Report, distillation_loss
from switchkd.loss.policy_gradient import importance_and_returns
from switchkd.loss.signals import DenseTeacher, DenseTeachers, TeacherSignal, TopKTeacher
from switchkd.loss.states import response_states
from switchkd.loss.weight import product_of
from switchkd.methods.plan import Plan
from switchkd.models.heads import Head, last_hidden, put_tap
from switchkd.models.memory import numbers_at_once, pieces
from switchkd.models.pair import ModelPair
from switchkd.records import Batch, Example, Rollout, TopLogp
from switchkd.rollout.by_teacher import indices_by
from switchkd.serving.teacher import RemoteTeacher
from switchkd.training.start_model import StartModel
from switchkd.training.taught import Taught, first_pair


class _Reader(NamedTuple):
    """Who reads a teacher's texts for it, and the head that its states go through: one on a server has none here."""

    teacher: PreTrainedModel | RemoteTeacher | None
    head: Head | None


@dataclass(frozen=True, eq=False)
class PositionWeights:
    """What multiplies the loss at each counted position, the other divergence's share of it, and the long-term term's returns.

    All (N,), the returns in nats. Neither tuple nor mapping: transformers enters those, and under DeepSpeed it rounds their tensors
    to the type of the model's weights, in which a sum of weights is no longer the denominator that was counted.
    """

    weight_N: Tensor
    share_N: Tensor | None
    return_N: Tensor | None

    def to(self, device: torch.device | str) -> PositionWeights:
        """The same on another device."""
        held = {name: each.to(device) for name, each in vars(self).items() if each is not None}
        return replace(self, **held)


class StepLoss:
    """The objective of a plan on texts of a pair, or of a student with several teachers by name, in nats. Knows no trainer.

    Made while all models' weights are whole, since a head proves itself on a forward. Only `scored`, which reads the teachers in
    `reading` (None: those given), needs theirs again. A text's teacher is the one that its prompt names.
    """

    def __init__(
        self,
        student: ModelPair | Mapping[str, Taught],
        plan: Plan,
        *,
        rows: int,
        reading: Mapping[str, Taught] | None = None,
    ) -> None:
        taught: Mapping[str, Taught] = {"": Taught(student)} if isinstance(student, ModelPair) else student
        self.pair = pair = first_pair(taught)
        put_tap(pair.student)
        self.rows = rows
        self.objective = plan.objective
        self.replayed_prefix = plan.replayed_prefix
        self.top_k = 0 if plan.teacher_signal is None else plan.teacher_signal.top_k
        self.student_head = pair.student_head
        compares = plan.objective.divergence is not None
        self.readers = {
            name: _Reader(remote or of.teacher, taught[name].pair.teacher_head if compares else None)
            for name, (of, remote) in (reading or taught).items()
        }
        self.start = StartModel(pair) if plan.objective.needs_start else None
        # Told the role of each model that reads a batch.
        self.on_forward: Callable[[Literal["student", "teacher"]], None] = lambda role: None
        # Called between the student's forward and the reading of its head, which may have to be put together.
        self.before_head: Callable[[], None] = lambda: None

    def scored(self, sequences: Sequence[Example | Rollout]) -> Sequence[Example | Rollout]:
        """The sequences, each with what the teacher says of its response: its last hidden states that predict it, (T, H) on its
        device, or its likeliest ids where the plan keeps these alone.

        Rollouts that the teacher took part in have them already. The teacher reads the others, at most `rows` of similar
        length at a time, and one that occurs twice (a replayed one) once. Where the objective compares with no teacher, the
        sequences stay as they are.
        """
        if self.objective.divergence is None:
            return sequences
        unread = [
            *{id(each): each for each in sequences if each.teacher_hidden is None and each.teacher_top is None}.values()
        ]
        read: dict[int, Example | Rollout] = {}
        # In the order of the teachers, which is the same in every step and process.
        groups = indices_by([each.prompt.teacher for each in unread])
        for name, reader in self.readers.items():
            texts = [unread[index] for index in groups.get(name, ())]
            read |= dict(zip(map(id, texts), self._read(reader, texts), strict=True))
        return [read.get(id(sequence), sequence) for sequence in sequences]

    def _read(self, reader: _Reader, texts: Sequence[Example | Rollout]) -> Sequence[Example | Rollout]:
        """The texts with what one teacher says of them."""
        if reader.teacher is None or not texts:
            return texts
        if isinstance(reader.teacher, RemoteTeacher):
            return reader.teacher.read(texts)
        states = response_states(
            reader.teacher,
            texts,
            pad_id=self.pair.pad_id,
            rows=self.rows,
            on_forward=lambda: self.on_forward("teacher"),
        )
        read = {index: self._with_teacher(texts[index], reader.head, hidden_TH) for index, hidden_TH in states}
        return [read[index] for index in range(len(texts))]

    def _with_teacher(self, sequence: Example | Rollout, head: Head | None, hidden_TH: Tensor) -> Example | Rollout:
        if not self.top_k:
            return replace(sequence, teacher_hidden=hidden_TH)
        assert head is not None
        # Never the logits of a whole text.
        device = hidden_TH.device
        # A text without a response, which a process reads when it has no rows left, is one piece of none.
        at_once = pieces(len(hidden_TH), self.pair.vocabulary_size, numbers_at_once(device)) or [slice(0)]
        with torch.no_grad():
            parts = [top_logp(head(hidden_TH[piece]), self.top_k) for piece in at_once]
        return replace(sequence, teacher_top=TopLogp.joined(parts))

    def micro_batches(self, sequences: Sequence[Example | Rollout], size: int) -> list[dict[str, Any]]:
        """The inputs of a step's forwards, each on at most `size` sequences of similar length, the longest first."""
        lengths = [len(sequence.prompt.token_ids) + len(response_ids(sequence)) for sequence in sequences]
        return [self.inputs([sequences[index] for index in group]) for group in micro_batches(lengths, size)]

    def inputs(self, sequences: Sequence[Example | Rollout]) -> dict[str, Any]:
        """The inputs of a forward: the batch, its weights, and its part of the step's denominator.

        That is the number of tokens that have a weight other than 0 and so train, or the weights' sum where one of them asks
        for it.
        """
        batch = collate(sequences, self.pair.pad_id)
        weights = self._weights(batch)
        return {
            # transformers counts tokens and operations by it.
            "input_ids": batch.input_ids_BT,
            "batch": batch,
            "weights": weights,
            "denominator": self._denominator(weights.weight_N),
        }

    @staticmethod
    def not_zero(denominator: Tensor) -> Tensor:
        """A step's denominator, or one by which a loss of 0 can be divided."""
        return torch.where(denominator > 0, denominator, torch.ones_like(denominator))

    def _denominator(self, weight_N: Tensor) -> float:
        summed = any(weight.sum_is_denominator for weight in self.objective.weights)
        return float(weight_N.double().sum()) if summed else int(weight_N.count_nonzero())

    def _weights(self, batch: Batch) -> PositionWeights:
        mask_BT, weights = batch.response_mask_BT, self.objective.weights
        weight_BT, return_N = product_of(weights, batch), None
        if self.replayed_prefix is not None:
            weight_BT = torch.where(batch.beginning_BT, weight_BT * self.replayed_prefix.weight, weight_BT)
        if self.objective.long_term_weight:
            importance_BT, return_BT = importance_and_returns(batch)
            # In float32 as its factors, so that weights of 1 change no bit.
            return_N, weight_BT = return_BT[mask_BT].float(), weight_BT.float() * importance_BT.float()
        shares = [share for weight in weights if (share := weight.outlier_share(batch)) is not None]
        if self.objective.teacher_text_divergence is not None:
            shares = [batch.written_by_teacher_BT.float()]
        share_N = shares[0][mask_BT].float() if shares else None
        return PositionWeights(weight_BT[mask_BT].float(), share_N, return_N)

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], denominator: Tensor | float, *, measure: bool = False
    ) -> tuple[Tensor, Report]:
        """The sum over the counted positions of the inputs / `denominator`, and its report; see `distillation_loss`.

        `model` is the student or its wrapper; the inputs are on its device.
        """
        batch: Batch = inputs["batch"]
        weights: PositionWeights = inputs["weights"]
        self.on_forward("student")
        hidden_BTH = last_hidden(model, self.pair.student, batch.input_ids_BT, batch.attention_mask_BT)
        # The token at t is predicted at t - 1.
        mask_BT = batch.response_mask_BT[:, 1:]
        by_teacher_N, rolled_out_N = batch.written_by_teacher_BT[:, 1:][mask_BT], batch.rolled_out_BT[:, 1:][mask_BT]
        counted = Counted(
            hidden_BTH[:, :-1][mask_BT],
            batch.input_ids_BT[:, 1:][mask_BT],
            weight_N=weights.weight_N,
            other_share_N=weights.share_N,
            return_N=weights.return_N,
            cross_entropy_factor_N=self.objective.cross_entropy_factor(by_teacher_N, rolled_out_N),
            start=self._start_signal(batch, mask_BT),
        )
        teacher = self._teacher_signal(batch)
        self.before_head()
        return distillation_loss(
            counted, self.student_head, self.objective, teacher=teacher, denominator=denominator, measure=measure
        )

    def _teacher_signal(self, batch: Batch) -> TeacherSignal | None:
        temperature, top = self.objective.loss_temperature, batch.teacher_top_N
        if top is not None:
            return TopKTeacher(top.ids, top.logp, temperature, top.rest_logp)
        if self.objective.divergence is None or batch.teacher_hidden is None:
            return None
        teachers = []
        for name, hidden_NH in batch.teacher_hidden.items():
            head = self.readers[name].head
            assert head is not None
            teachers.append(DenseTeacher(hidden_NH, head, temperature))
        if len(teachers) == 1:
            return teachers[0]
        own = [batch.counted_of(name) for name in batch.teacher_hidden]
        return DenseTeachers(torch.stack(own).long().argmax(dim=0), teachers)

    def _start_signal(self, batch: Batch, mask_BT: Tensor) -> DenseTeacher | None:
        if self.start is None:
            return None
        states_BTH = self.start.hidden(batch.input_ids_BT, batch.attention_mask_BT)
        return DenseTeacher(states_BTH[:, :-1][mask_BT], self.start.head, self.objective.loss_temperature)
