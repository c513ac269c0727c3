"""Policies by their definitions, on plain lists of probabilities and divergences."""

import math
from collections.abc import Sequence

from scipy.optimize import brentq

# The probability of each token that the student writes, and of each that the teacher writes; all of them add to 1.
ByWriter = tuple[list[float], list[float]]


def law_of(by_writer: ByWriter) -> list[float]:
    """The law of the token, whoever writes it."""
    return [own + other for own, other in zip(*by_writer, strict=True)]


def teacher_part(by_writer: ByWriter) -> list[float]:
    """The probability that the teacher is the writer, given the token; NaN of a token that nobody writes."""
    return [other / (own + other) if own + other > 0 else math.nan for own, other in zip(*by_writer, strict=True)]


def mixed(student: Sequence[float], teacher: Sequence[float], teacher_share: float) -> ByWriter:
    """A coin says who draws the token."""
    return [(1 - teacher_share) * s for s in student], [teacher_share * t for t in teacher]


def is_among_best(token: int, teacher: Sequence[float], top_k: int) -> bool:
    """Whether fewer than `top_k` ids are more probable, and the teacher does not exclude the token."""
    return teacher[token] > 0 and sum(other > teacher[token] for other in teacher) < top_k


def interleaved(student: Sequence[float], teacher: Sequence[float], top_k: int) -> ByWriter:
    """The student proposes a token, and the teacher draws anew where it is not among its best."""
    kept = [s if is_among_best(token, teacher, top_k) else 0.0 for token, s in enumerate(student)]
    refused = sum(student) - sum(kept)
    return kept, [refused * t for t in teacher]


def relative_entropy(law: Sequence[float], other: Sequence[float]) -> float:
    """KL(law || other) in nats."""
    if any(q > 0 and p == 0 for q, p in zip(law, other, strict=True)):
        return math.inf
    return math.fsum(q * math.log(q / p) for q, p in zip(law, other, strict=True) if q > 0)


def blended(student: Sequence[float], teacher: Sequence[float], exponent: float) -> list[float]:
    """The normalized product of p_S^(1 - exponent) and p_T^exponent over the ids that both models allow, of which there are some.

    Exponent 0 is its limit: the student's own distribution over these ids.
    """
    products = [
        s ** (1 - exponent) * t**exponent if s > 0 and t > 0 else 0.0 for s, t in zip(student, teacher, strict=True)
    ]
    return [product / math.fsum(products) for product in products]


def trust_region(student: Sequence[float], teacher: Sequence[float], budget: float) -> list[float]:
    """The blend with the largest exponent whose KL from the student is at most the budget; the student where there is none."""
    if not any(s > 0 and t > 0 for s, t in zip(student, teacher, strict=True)):
        return list(student)

    def overspent(exponent: float) -> float:
        return relative_entropy(blended(student, teacher, exponent), student) - budget

    if overspent(1.0) <= 0:
        return blended(student, teacher, 1.0)
    if overspent(0.0) >= 0:
        return list(student)
    return blended(student, teacher, brentq(overspent, 0.0, 1.0, xtol=1e-14))


def coupled(student: Sequence[float], law: Sequence[float]) -> ByWriter:
    """A law of tokens that are the student's own proposals where these can stand, and the teacher's where they are replaced."""
    return list(map(min, student, law)), [max(0.0, q - s) for s, q in zip(student, law, strict=True)]


def adaswitch(divergences: Sequence[float], factor: float, window: int) -> tuple[list[bool], list[float]]:
    """For each position in order: whether the teacher writes it, and what its divergence was compared with, or NaN."""
    writers: list[bool] = []
    thresholds: list[float] = []
    for at, divergence in enumerate(divergences):
        switched = any(writers)
        compared = at >= window and not switched
        thresholds.append(factor * sum(divergences[at - window : at]) / window if compared else math.nan)
        writers.append(switched or divergence > thresholds[-1])
    return writers, thresholds
