"""What the papers of 2026 on failing prefixes measure of a text, by position, and which of their cures that speaks for.

Shape letters: T positions of a response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from switchkd.positions import ByPosition
from switchkd.records import Rollout

# The candidates of the margin, as in the weight `release`.
MARGIN_TOP_K = 16
# Nats. A token that one of the models excludes counts as this far from both.
_MOST = 20.0
# Two measures are said to differ where one is at least this many times the other. The bound is ours.
TREND = 1.25
# The prefix that IW-OPD (arXiv 2606.22600) finds enough.
_PREFIX = 0.3
# Thirds of shorter responses are a token or two.
_LEAST_TOKENS = 6


@dataclass(frozen=True)
class PrefixMeasures:
    """By position, means over the rows that reach it.

    `discrepancy` (nats): the sum of |log p_T - log p_S| over the tokens up to and including this one (IW-OPD). `trust`, 0 to
    1: min(1, p_T / p_S) of the token (TrOPD). `margin` (nats): what the teacher's favorite among the student's 16 likeliest
    tokens has over the next (release); empty where the engine did not record it. `behind`, 0 to 1: the share of all rows'
    divergence that lies behind the position. All are of the distributions that tokens are drawn from, after temperature, top-p
    and top-k.
    """

    discrepancy: ByPosition
    trust: ByPosition
    margin: ByPosition
    behind: tuple[float, ...]


def prefix_measures(rollouts: Sequence[Rollout]) -> PrefixMeasures:
    """The measures of one writer's rollouts, for which a teacher ran."""
    columns = ByPosition.of([rollout.divergence for rollout in rollouts])
    at_position = [mean * rows for mean, rows in zip(columns.mean, columns.rows, strict=True)]
    total, upto = math.fsum(at_position), accumulate(at_position)
    return PrefixMeasures(
        discrepancy=ByPosition.of([list(accumulate(map(abs, _log_ratios(rollout)))) for rollout in rollouts]),
        trust=ByPosition.of(list(map(_trusts, rollouts))),
        margin=ByPosition.of(list(map(_margins, rollouts))),
        behind=tuple(max(0.0, 1 - part / total) if total else 0.0 for part in upto),
    )


def _log_ratios(rollout: Rollout) -> list[float]:
    """log p_T - log p_S of each token, nats."""
    pairs = zip(rollout.teacher_logp, rollout.student_logp, strict=True)
    return [max(-_MOST, min(_MOST, teacher - student)) for teacher, student in pairs]


def _trusts(rollout: Rollout) -> list[float]:
    return [math.exp(min(0.0, ratio)) for ratio in _log_ratios(rollout)]


def _margins(rollout: Rollout) -> list[float]:
    return [min(_MOST, margin) for margin in rollout.margin]


def cures_line(rollouts: Sequence[Rollout]) -> str:
    """One line that says which cures the student's own rollouts speak for, with the figures that say so.

    Each response's first third is compared with its last, so that long responses, which may be of another kind, are not
    compared with short ones; a quarter more or less is called a trend. That bound is ours, and no study stands behind it: it
    says where to look.
    """
    long = [rollout for rollout in rollouts if len(rollout.token_ids) >= _LEAST_TOKENS]
    if not long:
        return f"no response has {_LEAST_TOKENS} tokens, so nothing can be said of a trend with length"

    def thirds(values_of: Callable[[Rollout], Sequence[float]]) -> tuple[float, float]:
        rows = [values for rollout in long if (values := values_of(rollout))]
        parts = [(row[: len(row) // 3], row[-(len(row) // 3) :]) for row in rows]
        return fmean(fmean(first) for first, _ in parts), fmean(fmean(last) for _, last in parts)

    first, last = thirds(lambda rollout: rollout.divergence)
    said = []
    if last > first * TREND:
        said.append(f"the divergence grows along a response ({first:.3g} to {last:.3g} nats): switch, trb, iw_opd")
    first, last = thirds(lambda rollout: [1 - trust for trust in _trusts(rollout)])
    if last > first * TREND:
        said.append(f"the teacher trusts its end less ({1 - first:.1%} to {1 - last:.1%}): tropd")
    if long[0].margin:
        first, last = thirds(_margins)
        if last * TREND < first:
            said.append(f"the teacher tells candidates apart less at its end ({first:.3g} to {last:.3g} nats): release")
    share = _share_behind(long)
    if share < (1 - _PREFIX) / TREND:
        said.append(f"only {share:.0%} of the divergence lies behind the first {_PREFIX:.0%}: prefix")
    if not said:
        where = f"{share:.0%} of the divergence lies behind the first {_PREFIX:.0%}"
        return f"nothing grows worse along a response ({where}): gkd may do"
    return "; ".join(said)


def _share_behind(rollouts: Sequence[Rollout]) -> float:
    """The share of the divergence that lies behind the first part of each response."""
    behind = math.fsum(math.fsum(each.divergence[math.ceil(_PREFIX * len(each.divergence)) :]) for each in rollouts)
    total = math.fsum(math.fsum(each.divergence) for each in rollouts)
    return behind / total if total else 0.0
