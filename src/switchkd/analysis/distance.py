"""How far a student is from its teacher as writers of whole texts: both KL divergences a sequence, from samples.

The log-ratio of two laws of a text is a sum over its tokens, and the mean of each summand, given the tokens before it, is
the KL divergence of the two next-token distributions there. So the sum of these exact divergences along a sample has the KL
divergence of the two laws as its mean: the estimate is unbiased, never negative, and needs no second text (Amini et al.
2025, arXiv 2504.10637). A text counts as far as `max_new_tokens`.

Shape letters: T positions of a response, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from switchkd.distributions.divergences import Divergence, ForwardKL, ReverseKL
from switchkd.errors import UserError
from switchkd.loss.objective import Counted, Objective, distillation_loss
from switchkd.loss.signals import DenseTeacher
from switchkd.loss.states import response_states
from switchkd.models.heads import evaluating
from switchkd.models.pair import ModelPair
from switchkd.positions import ByPosition
from switchkd.records import Rollout, Sampling
from switchkd.rollout.engine import Engine, PromptLike
from switchkd.rollout.law import Student
from switchkd.rollout.speculative import SpeculativeEngine


@dataclass(frozen=True)
class SequenceKL:
    """KL(writer || other model) in nats, from the writer's samples at temperature 1, one for each prompt.

    `positions` holds for each sample the exact divergence of the two next-token distributions at each of its tokens, in the
    order of the prompts. Standard errors are over samples, so they hold both the prompts' and the draws' spread; of a single
    sample they are NaN.
    """

    positions: tuple[tuple[float, ...], ...]

    @property
    def per_sequence(self) -> tuple[float, ...]:
        """Each sample's estimate, in nats."""
        return tuple(map(math.fsum, self.positions))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Each sample's number of tokens."""
        return tuple(map(len, self.positions))

    @property
    def mean(self) -> float:
        """The divergence a sequence, in nats."""
        return fmean(self.per_sequence)

    @property
    def standard_error(self) -> float:
        """That of `mean`."""
        return _standard_error(self.per_sequence)

    @property
    def per_token(self) -> float:
        """The mean over all tokens of all samples, in nats."""
        return math.fsum(self.per_sequence) / sum(self.tokens)

    @property
    def per_token_error(self) -> float:
        """The standard error of `per_token`: as of a ratio of means, since samples with more tokens weigh more."""
        ratio = self.per_token
        rest = [nats - ratio * tokens for nats, tokens in zip(self.per_sequence, self.tokens, strict=True)]
        return _standard_error(rest) / fmean(self.tokens)

    @property
    def by_position(self) -> ByPosition:
        """The mean at each position of the response, over the samples that reach it."""
        return ByPosition.of(self.positions)

    def by(self, labels: Sequence[str | None]) -> dict[str, SequenceKL]:
        """The same of the samples of each label, in the order in which labels come up; None has no part.

        Label by what is known of a prompt, such as its row's bucket. Samples that are chosen by what the model wrote, such as
        their own length, estimate no divergence. Raises ValueError where there is not one label for each sample.
        """
        groups: dict[str, list[tuple[float, ...]]] = {}
        for label, positions in zip(labels, self.positions, strict=True):
            if label is not None:
                groups.setdefault(label, []).append(positions)
        return {label: SequenceKL(tuple(group)) for label, group in groups.items()}

    def as_json(self) -> dict[str, Any]:
        """The estimates, the means by position, and each sample's own estimate, as JSON values; NaN is None."""
        names = ("mean", "standard_error", "per_token", "per_token_error")
        totals = {name: None if math.isnan(value := getattr(self, name)) else value for name in names}
        by_position = self.by_position
        return {
            **totals,
            "tokens": sum(self.tokens),
            "rows": by_position.rows,
            "by_position": by_position.mean,
            "per_sequence": self.per_sequence,
        }


@dataclass(frozen=True)
class Distance:
    """`reverse`: KL(student || teacher) on the student's samples; `forward`: KL(teacher || student) on the teacher's.

    Reverse says what the student writes that the teacher would not, forward what the teacher writes that the student lacks.
    """

    reverse: SequenceKL
    forward: SequenceKL

    def as_json(self) -> dict[str, Any]:
        """Both as JSON values."""
        return {"reverse_kl": self.reverse.as_json(), "forward_kl": self.forward.as_json()}


def distance_to_teacher(
    pair: ModelPair,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    seed: int = 0,
    engine: Engine | None = None,
    teacher_engine: Engine | None = None,
    rows: int = 32,
) -> Distance:
    """Both KL divergences a sequence between the pair's models, over one sample of each model for each prompt.

    Sampling has temperature 1 and cuts nothing off. Each model writes by itself, so the teacher's texts do not depend on the
    student, and all students are compared on the same ones: `engine` serves the pair, `teacher_engine` the pair
    `ModelPair.swapped`. Both models then read the finished texts, at most `rows` at a time, and are compared over their shared
    vocabulary in pieces; their logits never exist in full. Raises UserError for a pair without a teacher, and for bad or no
    prompts.
    """
    if pair.teacher is None:
        raise UserError("a distance to the teacher needs one, but the pair has no teacher; load one")
    if not prompts:
        raise UserError("there is no prompt to sample on; give at least one")
    engine = engine or SpeculativeEngine(pair)
    # No drafts by the student: what is drawn would depend on it, and where computing is dear they cost more than they save.
    teacher_engine = teacher_engine or SpeculativeEngine(pair.swapped())
    sampling = Sampling(max_new_tokens=max_new_tokens)

    def estimate(writer: Engine, divergence: Divergence) -> SequenceKL:
        return sequence_kl(pair, writer.generate(prompts, Student(), sampling, seed), divergence, rows=rows)

    return Distance(reverse=estimate(engine, ReverseKL()), forward=estimate(teacher_engine, ForwardKL()))


def sequence_kl(pair: ModelPair, samples: Sequence[Rollout], divergence: Divergence, *, rows: int = 32) -> SequenceKL:
    """What `divergence` is at each token of the samples, at temperature 1, whatever the samples were drawn with.

    It estimates KL(student || teacher) only for the student's samples and `ReverseKL`, and KL(teacher || student) only for the
    teacher's and `ForwardKL`, both at temperature 1 with nothing cut off. The pair has a teacher.
    """
    assert pair.teacher is not None
    assert pair.teacher_head is not None
    objective, found = Objective(divergence), dict[int, tuple[float, ...]]()
    with evaluating(pair.student, pair.teacher), pair.computing():
        students, teachers = (
            response_states(model, samples, pad_id=pair.pad_id, rows=rows) for model in (pair.student, pair.teacher)
        )
        for (index, student_TH), (_, teacher_TH) in zip(students, teachers, strict=True):
            ids_T = torch.tensor(samples[index].token_ids, device=student_TH.device)
            teacher = DenseTeacher(teacher_TH, pair.teacher_head)
            counted = Counted(student_TH, ids_T)
            _, report = distillation_loss(counted, pair.student_head, objective, teacher=teacher, denominator=1)
            found[index] = _floats(report.divergence_N)
    return SequenceKL(tuple(found[index] for index in range(len(samples))))


def _floats(values_T: Tensor) -> tuple[float, ...]:
    return tuple(values_T.tolist())


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
