"""Compares the rollouts of two engines, and measures how near to a tie a decision was where float32 lets them part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from switchkd.distributions.draw import Draft, student_proposal, written_tokens
from switchkd.distributions.noise import Address, Stream, gumbel, row_keys, uniform
from switchkd.distributions.shaping import shaped_logp
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling
from switchkd.rollout.blends import Interleave, TrustRegionBlend, trust_region_blend
from switchkd.rollout.law import Policy, Positions
from switchkd.rollout.log import RolloutLog, compare, observe

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
        _assert_close(ours, theirs, same, exact, isinstance(policy, TrustRegionBlend))
    return parted


def _assert_close(ours: Rollout, theirs: Rollout, upto: int | None, exact: bool, searched: bool) -> None:
    # Exact: roundings of a few layers of scaled weights. Else 1e-5 is required of divergences; the logits of tests/tiny.py
    # differ by up to 3e-5, and so do log-probabilities, relative to values as low as -40, and, where logarithms are as large,
    # the part of a mixture, p (1 - p) times the difference of two of them.
    # `searched`: a KL off by e moves the exponent b of a blend by e / (b var), and so the law's logarithm at a token that is k
    # deviations from the mean log-ratio by e k / (b sd), where b sd is about sqrt(2 budget): by some 10 e.
    for name in ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part"):
        a, b = (torch.tensor(getattr(each, name)[:upto], dtype=torch.float64) for each in (ours, theirs))
        tolerance, relative = (1e-10, 1e-10) if exact else (1e-5, 0.0) if name == "divergence" else (1e-4, 1e-4)
        if searched and name in ("law_logp", "teacher_part"):
            tolerance, relative = 10 * tolerance, 10 * relative
        torch.testing.assert_close(
            a, b, atol=tolerance, rtol=relative, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def tie_margin(
    pair: ModelPair, rollout: Rollout, position: int, policy: Policy, sampling: Sampling, seed: int
) -> float:
    """The distance of the nearest decision at a position from its alternative, by a fresh forward over the prefix.

    The decisions: which ids top-k and top-p keep, the proposal, the law, whether the proposal is kept under it, what is drawn
    instead, and the writer of a token that either model may have written. All margins are in nats but top-p's and the writer's,
    which are probabilities.
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
    positions = observe(policy, draft, compare(draft, teacher_logp), [log], sampling)
    decision = policy.decide(positions)
    gap = float((positions.divergence - decision.threshold).abs())
    margins.append(math.inf if math.isnan(gap) else gap)
    if isinstance(policy, Interleave):
        margins.append(_edge_margin(policy, positions, draft))
    if isinstance(policy, TrustRegionBlend):
        return min([*margins, _searched_margin(policy, draft, teacher_logp, sampling)])
    law_logp = teacher_logp if decision.blend is None else decision.blend.logp
    if decision.blend is None or decision.blend.teacher_mass is None:
        return min([*margins, _draw_margin(draft, law_logp, sampling)])
    token, _ = written_tokens(draft, law_logp, decision.by_teacher, greedy=sampling.greedy)
    part = decision.blend.teacher_mass * (teacher_logp - law_logp)[0, token].exp()
    margins.append(float((positions.coin - part).abs()))
    return min([*margins, _draw_margin(draft, law_logp, sampling)])


def _edge_margin(policy: Interleave, positions: Positions, draft: Draft) -> float:
    """How far the teacher's last accepted id is above the first refused; greedy, only the proposal's own place counts."""
    logp = positions.teacher_logp[0].tolist()
    if not positions.greedy:
        ordered = sorted(logp, reverse=True)
        inside, outside = ordered[policy.keep_top_k - 1 : policy.keep_top_k], ordered[policy.keep_top_k :][:1]
        # An excluded id is refused whatever its rank.
        return min([a - b for a, b in zip(inside, outside, strict=False) if math.isfinite(b)], default=math.inf)
    # The proposal is kept if the k-th best of the other ids is not better.
    own = logp.pop(int(draft.proposal))
    edge = sorted(logp, reverse=True)[policy.keep_top_k - 1 : policy.keep_top_k]
    return min([abs(own - each) for each in edge if math.isfinite(own) and math.isfinite(each)], default=math.inf)


def _draw_margin(draft: Draft, law_logp: Tensor, sampling: Sampling) -> float:
    """That of a draw from a law coupled to the proposal: whether it stands, and what is drawn instead."""
    if sampling.greedy:
        return _lead(law_logp)
    ratio = (law_logp - draft.student_logp)[0, draft.proposal]
    kept = float((uniform(draft.address, Stream.KEEP).log() - ratio).abs())
    excess = (law_logp.exp() - draft.student_logp.exp()).clamp(min=0)
    return min(kept, _lead(_scores(excess.log(), draft.address, Stream.EXCESS, sampling)))


def _searched_margin(policy: TrustRegionBlend, draft: Draft, teacher_logp: Tensor, sampling: Sampling) -> float:
    """That of a draw from a law whose exponent was searched for: 0 if laws that the search may as well have found decide otherwise.

    The KL that is compared with the budget moves with the log-probabilities, so exponents that spend `TIE` more or less may be
    found, each a step of the search lower or higher. Between the ends nothing leaves what they say by more than the square of so
    short an interval: log(law / p_S) is a straight line less the log of the sum, which is smooth.
    """
    student_logp, at = draft.student_logp.double(), torch.ones(1, dtype=torch.bool)
    exact = Draft(draft.proposal, student_logp, draft.address)
    laws = [
        trust_region_blend(student_logp, teacher_logp.double(), max(0.0, policy.budget + off))
        for off in (-TIE, 0.0, TIE)
    ]
    # One more step of the search to both sides.
    support = student_logp.isfinite() & teacher_logp.isfinite()
    step = (2.0**-20 * (teacher_logp.double() - student_logp)).masked_fill(~support, 0.0)
    laws += [(laws[0] - step).log_softmax(dim=-1), (laws[2] + step).log_softmax(dim=-1)]
    tokens = {int(written_tokens(exact, law, at, greedy=sampling.greedy)[0]) for law in laws}
    return min(_draw_margin(exact, law, sampling) for law in laws) if len(tokens) == 1 else 0.0


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
