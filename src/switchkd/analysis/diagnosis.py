"""Whether the teacher misguides: what it makes of the student's text, of SWITCH's and of its own, by position.

On-policy distillation asks the teacher about prefixes that it would never have written (SWITCH, Koo et al. 2025, arXiv
2410.19503, section 1). On a pair where that matters, the student's text drifts away from the teacher with length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from switchkd.distributions.noise import shaped_logp
from switchkd.errors import UserError
from switchkd.models.heads import Head
from switchkd.models.pair import ModelPair
from switchkd.positions import ByPosition
from switchkd.records import Rollout, Sampling
from switchkd.rollout.engine import Engine, PromptLike
from switchkd.rollout.policies import Policy, Student, Switch, Teacher
from switchkd.rollout.speculative import SpeculativeEngine

# So many logits of the teacher exist at a time, 64 MB in float32.
_NUMBERS = 1 << 24


@dataclass(frozen=True)
class TextDiagnosis:
    """One writer's texts on all prompts, by position in the response.

    `log_perplexity` (nats): the mean of -log p_teacher over the tokens from the first up to and with this one, averaged
    over rows; its exp is the teacher's perplexity of the text so far. `divergence` (nats): the Jensen-Shannon divergence
    that a policy would compare, after temperature, top-p and top-k. `entropy` (nats): of the teacher's next-token
    distribution. Perplexity and entropy are of the teacher's own distribution, temperature 1 and nothing cut off, so
    that they are finite for any text. Means are over the rows that are still there: see `ByPosition`.
    """

    policy: Policy
    teacher_share: float
    log_perplexity: ByPosition
    divergence: ByPosition
    entropy: ByPosition

    @property
    def perplexity(self) -> tuple[float, ...]:
        """The teacher's perplexity of the text so far, at each position: the geometric mean over rows."""
        return tuple(map(math.exp, self.log_perplexity.mean))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values, a list for each measure by position."""
        return {
            "policy": {"name": type(self.policy).__name__.lower(), **asdict(self.policy)},  # type: ignore[call-overload]
            "teacher_share": self.teacher_share,
            "rows": self.divergence.rows,
            "perplexity": self.perplexity,
            "divergence": self.divergence.mean,
            "entropy": self.entropy.mean,
        }


def diagnose(
    pair: ModelPair,
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    *,
    switch: Switch = Switch(),  # noqa: B008 - frozen
    seed: int = 0,
    engine: Engine | None = None,
) -> Mapping[str, TextDiagnosis]:
    """What the teacher makes of text by "student", "switch" and "teacher", on the same prompts with the same draws.

    Each text is rolled out once with the teacher's hidden states kept, and those are projected in chunks: T x H numbers
    a rollout on the CPU. Raises UserError for a pair without a teacher, and for bad or no prompts.
    """
    head = pair.teacher_head
    if head is None:
        raise UserError("a diagnosis asks the teacher about every text, but the pair has none; load one")
    if not prompts:
        raise UserError("there is no prompt to diagnose; give at least one")
    engine = engine or SpeculativeEngine(pair)
    writers: dict[str, Policy] = {"student": Student(), "switch": switch, "teacher": Teacher()}
    return {
        name: _diagnosis(policy, engine.generate(prompts, policy, sampling, seed, keep_teacher="hidden"), head)
        for name, policy in writers.items()
    }


def _diagnosis(policy: Policy, rollouts: Sequence[Rollout], head: Head) -> TextDiagnosis:
    surprises, entropies = zip(*_teacher_says(rollouts, head), strict=True)
    running = [[total / count for count, total in enumerate(accumulate(row), start=1)] for row in surprises]
    return TextDiagnosis(
        policy=policy,
        teacher_share=sum(sum(r.written_by_teacher) for r in rollouts) / sum(len(r.token_ids) for r in rollouts),
        log_perplexity=ByPosition.of(running),
        divergence=ByPosition.of([rollout.divergence for rollout in rollouts]),
        entropy=ByPosition.of(entropies),
    )


@torch.no_grad()
def _teacher_says(rollouts: Sequence[Rollout], head: Head) -> Iterator[tuple[list[float], list[float]]]:
    """For each rollout, at each token: -log p_teacher of it, and the entropy of what the teacher would write; nats."""
    size = max(1, _NUMBERS // head.vocabulary_size)
    for rollout in rollouts:
        assert rollout.teacher_hidden is not None
        hidden_TH = rollout.teacher_hidden.to(head.weight_VH.device)
        ids_T = torch.tensor(rollout.token_ids, device=hidden_TH.device)
        chunks = zip(hidden_TH.split(size), ids_T.split(size), strict=True)
        parts = [_surprise_and_entropy(head(hidden_NH), ids_N) for hidden_NH, ids_N in chunks]
        surprise_T, entropy_T = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
        yield surprise_T, entropy_T


def _surprise_and_entropy(logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    logp_NV = shaped_logp(logits_NV, Sampling(temperature=1.0))
    return -logp_NV.gather(-1, ids_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(dim=-1)
