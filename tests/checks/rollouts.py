"""Compares the rollouts of two engines, and measures how near to a tie a decision was where float32 lets them part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, student_proposal
from switchkd.distributions.noise import Address, Stream, gumbel, row_keys, uniform
from switchkd.distributions.shaping import shaped_logp
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling
from switchkd.rollout.blends import Interleave
from switchkd.rollout.law import Policy
from switchkd.rollout.log import RolloutLog, observe

TIE = 1e-5  # Below this margin, float32 kernels that choose by shape may decide either way.


def assert_same_rollouts(
    rollouts: Sequence[Rollout],
    expected: Sequence[Rollout],
    pair: ModelPair,
    policy: Policy,
    sampling: Sampling,
    seed: int = 0,
) -> int:
    """Compare token for token, writer for writer, numbers to rounding; return the number of rows that parted (float32 only).

    A row may part where a decision was within `TIE` of a tie. From there on it is another text, and not compared.
    """
    assert [rollout.prompt for rollout in rollouts] == [rollout.prompt for rollout in expected]
    parted = 0
    float64 = pair.student.dtype == torch.float64
    # transformers' eager attention takes its softmax in float32, in models of any type.
    exact = float64 and pair.student.config._attn_implementation != "eager"
    for ours, theirs in zip(rollouts, expected, strict=True):
        decided = list(zip(ours.token_ids, ours.written_by_teacher, strict=True))
        wanted = list(zip(theirs.token_ids, theirs.written_by_teacher, strict=True))
        same = next((at for at, (a, b) in enumerate(zip(decided, wanted, strict=False)) if a != b), None)
        if same is None:
            assert decided == wanted
            assert ours.finish_reason == theirs.finish_reason
        else:
            assert not float64, f"float64 parts at {same}: {decided[same]}, {wanted[same]}"
            margin = tie_margin(pair, theirs, same, policy, sampling, seed)
            assert margin < TIE, f"parts at {same} ({decided[same]}, {wanted[same]}) by a margin of {margin}"
            parted += 1
        _assert_close(ours, theirs, same, exact)
    return parted


def _assert_close(ours: Rollout, theirs: Rollout, upto: int | None, exact: bool) -> None:
    # Exact: roundings of a few layers of scaled weights. Else 1e-5 is required of divergences; the logits of tests/tiny.py
    # differ by up to 3e-5, and so do log-probabilities, relative to values as low as -40.
    for name in ("divergence", "threshold", "student_logp", "teacher_logp"):
        a, b = (torch.tensor(getattr(each, name)[:upto], dtype=torch.float64) for each in (ours, theirs))
        tolerance, relative = (1e-10, 1e-10) if exact else (1e-5, 0.0) if name == "divergence" else (1e-4, 1e-4)
        torch.testing.assert_close(
            a, b, atol=tolerance, rtol=relative, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def tie_margin(
    pair: ModelPair, rollout: Rollout, position: int, policy: Policy, sampling: Sampling, seed: int
) -> float:
    """The distance of the nearest decision at a position from its alternative, by a fresh forward over the prefix.

    The decisions: which ids top-k and top-p keep, the proposal, the writer, whether the teacher keeps the proposal,
    and what it draws instead. All margins are in nats but top-p's, which is a probability.
    """
    key = row_keys(seed, [rollout.prompt])
    address = Address(key, torch.full_like(key, position))
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids[:position]]])
    student_logits = fresh_logits(pair, "student", ids)
    margins = _support_margins(student_logits, sampling)
    student_logp = shaped_logp(student_logits, sampling)
    margins.append(_lead(_scores(student_logp, address, Stream.PROPOSAL, sampling)))
    if not policy.needs_teacher:
        return min(margins)
    teacher_logits = fresh_logits(pair, "teacher", ids)
    margins += _support_margins(teacher_logits, sampling)
    teacher_logp = shaped_logp(teacher_logits, sampling)
    draft = Draft(student_proposal(student_logp, address, greedy=sampling.greedy), student_logp, address)
    log = RolloutLog(rollout.prompt)
    log.divergence += rollout.divergence[:position]
    log.written_by_teacher += rollout.written_by_teacher[:position]
    positions = observe(policy, draft, teacher_logp, [log], sampling.max_new_tokens)
    gap = float((positions.divergence - policy.decide(positions).threshold).abs())
    margins.append(math.inf if math.isnan(gap) else gap)
    if isinstance(policy, Interleave):
        # The proposal is kept if the k-th best of the other ids is not better.
        logp = teacher_logp[0].tolist()
        own = logp.pop(int(draft.proposal))
        edge = sorted(logp, reverse=True)[policy.keep_top_k - 1 : policy.keep_top_k]
        margins += [abs(own - each) for each in edge if math.isfinite(own) and math.isfinite(each)]
    if policy.draws_independently:
        return min([*margins, _lead(_scores(teacher_logp, address, Stream.EXCESS, sampling))])
    if sampling.greedy:
        return min([*margins, _lead(teacher_logp)])
    ratio = (teacher_logp - student_logp)[0, draft.proposal]
    margins.append(float((uniform(address, Stream.KEEP).log() - ratio).abs()))
    excess = (teacher_logp.exp() - student_logp.exp()).clamp(min=0)
    margins.append(_lead(_scores(excess.log(), address, Stream.EXCESS, sampling)))
    return min(margins)


def fresh_logits(pair: ModelPair, role: str, ids_1T: Tensor) -> Tensor:
    """Next-token logits (1, V) of one model without any cache."""
    with torch.no_grad():
        logits: Tensor = getattr(pair, role)(input_ids=ids_1T, use_cache=False).logits
    return logits[:, -1, : pair.vocabulary_size]


def _scores(logp: Tensor, address: Address, stream: Stream, sampling: Sampling) -> Tensor:
    return logp if sampling.greedy else logp + gumbel(address, stream, logp.shape[-1])


def _lead(scores_1V: Tensor) -> float:
    first, second = scores_1V.topk(2, dim=-1).values[0].tolist()
    return math.inf if math.isinf(second) else first - second


def _support_margins(logits_1V: Tensor, sampling: Sampling) -> list[float]:
    margins = []
    if sampling.greedy:
        return margins
    logits_1V = logits_1V / sampling.temperature
    if 0 < sampling.top_k < logits_1V.shape[-1]:
        ordered = logits_1V.topk(sampling.top_k + 1, dim=-1).values[0]
        margins.append(float(ordered[-2] - ordered[-1]))
        logits_1V = logits_1V.masked_fill(logits_1V < ordered[-2], -torch.inf)
    if sampling.top_p < 1:
        ordered = torch.softmax(logits_1V, dim=-1).sort(dim=-1, descending=True).values[0]
        margins.append(float((ordered.cumsum(0) - ordered - sampling.top_p).abs().min()))
    return margins
