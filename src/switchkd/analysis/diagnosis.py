"""Whether the teacher misguides: what it makes of the student's text, of SWITCH's and of its own, by position.

On-policy distillation asks the teacher about prefixes that it would never have written (SWITCH, Koo et al. 2025, arXiv
2410.19503, section 1). On a pair where that matters, the student's text drifts away from the teacher with length.

Shape letters: T positions of a response, N positions of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from switchkd.analysis.cures import MARGIN_TOP_K, TREND, PrefixMeasures, cures_line, prefix_measures
from switchkd.distributions.shaping import shaped_logp
from switchkd.errors import UserError
from switchkd.models.heads import Head
from switchkd.models.pair import ModelPair
from switchkd.positions import ByPosition
from switchkd.records import Rollout, Sampling, teacher_share_of
from switchkd.rollout.engine import Engine, PromptLike
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import POLICY, Switch
from switchkd.rollout.speculative import SpeculativeEngine

# The number of teacher logits that exist at a time: 64 MB in float32.
_LOGITS_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class TextDiagnosis:
    """One writer's texts on all prompts, by position in the response.

    `log_perplexity` (nats): the mean of -log p_teacher over the tokens up to and including this one, averaged over rows; its
    exp is the teacher's perplexity of the text so far; `whole_perplexity` is that of all tokens. `divergence` (nats): the
    Jensen-Shannon divergence that a policy compares, after temperature, top-p and top-k. `entropy` (nats): that of the
    teacher's next-token distribution. Perplexity and entropy use temperature 1 and cut nothing off, so that they are finite for
    any text. `prefixes` holds the measures of the papers on failing prefixes, and `cures` is the line that says which of their
    cures the text speaks for. Means are over the rows that reach a position: see `ByPosition`.
    """

    policy: Policy
    teacher_share: float
    whole_perplexity: float
    log_perplexity: ByPosition
    divergence: ByPosition
    entropy: ByPosition
    prefixes: PrefixMeasures
    cures: str

    @property
    def perplexity(self) -> tuple[float, ...]:
        """The teacher's perplexity of the text so far, at each position: the geometric mean over rows."""
        return tuple(map(math.exp, self.log_perplexity.mean))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values, a list for each measure by position."""
        return {
            "policy": POLICY.describe(self.policy),
            "teacher_share": self.teacher_share,
            "whole_perplexity": self.whole_perplexity,
            "rows": self.divergence.rows,
            "perplexity": self.perplexity,
            "divergence": self.divergence.mean,
            "entropy": self.entropy.mean,
            "accumulated_discrepancy": self.prefixes.discrepancy.mean,
            "trust": self.prefixes.trust.mean,
            "margin": self.prefixes.margin.mean,
            "divergence_behind": self.prefixes.behind,
            "cures": self.cures,
        }


def diagnose(
    pair: ModelPair,
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    *,
    switch: Switch = Switch(),
    seed: int = 0,
    engine: Engine | None = None,
) -> Mapping[str, TextDiagnosis]:
    """What the teacher makes of text by "student", "switch" and "teacher", on the same prompts with the same draws.

    Each text is rolled out once. The teacher's hidden states are kept on the CPU, T x H numbers per rollout, and projected in
    chunks. Raises UserError for a pair without a teacher, and for bad or no prompts.
    """
    head = pair.teacher_head
    if head is None:
        raise UserError("a diagnosis asks the teacher about every text, but the pair has no teacher; load one")
    if not prompts:
        raise UserError("there is no prompt to diagnose; give at least one")
    engine = engine or SpeculativeEngine(pair, hidden_device="cpu", margin_top_k=MARGIN_TOP_K)
    writers: dict[str, Policy] = {"student": Student(), "switch": switch, "teacher": Teacher()}
    return {
        name: _diagnosis(policy, engine.generate(prompts, policy, sampling, seed, keep_teacher="hidden"), head)
        for name, policy in writers.items()
    }


def share_line(texts: Mapping[str, TextDiagnosis]) -> str:
    """One line: how the teacher reads SWITCH's text beside its own, and whether a larger share is worth a try.

    On the pairs of docs/results/study.md SWITCH taught where the two were near to each other, 1.04 and 1.00, and did not where they
    were far apart. Where "far" begins is ours, as in `cures_line`.
    """
    switch, teacher = texts["switch"], texts["teacher"]
    said = (
        f"by the teacher {switch.teacher_share:.1%} of its tokens; the teacher reads it with a perplexity of "
        f"{switch.whole_perplexity:.4g}, and its own text with {teacher.whole_perplexity:.4g}"
    )
    return f"{said}: try a larger share" if switch.whole_perplexity > TREND * teacher.whole_perplexity else said


def _diagnosis(policy: Policy, rollouts: Sequence[Rollout], head: Head) -> TextDiagnosis:
    surprisals, entropies = zip(*_surprisals_and_entropies(rollouts, head), strict=True)
    running = [[total / count for count, total in enumerate(accumulate(row), start=1)] for row in surprisals]
    tokens = list(chain.from_iterable(surprisals))
    return TextDiagnosis(
        policy=policy,
        teacher_share=teacher_share_of(rollouts),
        whole_perplexity=math.exp(math.fsum(tokens) / len(tokens)),
        log_perplexity=ByPosition.of(running),
        divergence=ByPosition.of([rollout.divergence for rollout in rollouts]),
        entropy=ByPosition.of(entropies),
        prefixes=prefix_measures(rollouts),
        cures=cures_line(rollouts),
    )


@torch.no_grad()
def _surprisals_and_entropies(rollouts: Sequence[Rollout], head: Head) -> Iterator[tuple[list[float], list[float]]]:
    """For each rollout, at each token: its -log p_teacher, and the entropy of the teacher's distribution there; nats."""
    size = max(1, _LOGITS_AT_A_TIME // head.vocabulary_size)
    for rollout in rollouts:
        assert rollout.teacher_hidden is not None
        hidden_TH = rollout.teacher_hidden.to(head.weight_VH.device)
        ids_T = torch.tensor(rollout.token_ids, device=hidden_TH.device)
        chunks = zip(hidden_TH.split(size), ids_T.split(size), strict=True)
        parts = [_surprisal_and_entropy(head(hidden_NH), ids_N) for hidden_NH, ids_N in chunks]
        surprisal_T, entropy_T = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
        yield surprisal_T, entropy_T


def _surprisal_and_entropy(logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    # Temperature 1 and nothing cut off, however the text was sampled: a token that was cut off would be infinitely surprising.
    logp_NV = shaped_logp(logits_NV, Sampling(temperature=1.0))
    return -logp_NV.gather(-1, ids_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(dim=-1)
