"""The targets as their definitions read: plain lists over one set of events, all float64.

Each takes probabilities and returns probabilities. 0^a with a > 0 is 0; an id that the teacher excludes stays excluded, and of
one that only the other model excludes the teacher's probability is taken.
"""

from collections.abc import Sequence
from math import fsum, inf, log

Distribution = Sequence[float]


def _normalized(masses: Sequence[float]) -> list[float]:
    total = fsum(masses)
    return [mass / total for mass in masses]


def teacher(p_teacher: Distribution, p_student: Distribution, p_start: Distribution) -> list[float]:
    return list(p_teacher)


def proximal(
    p_teacher: Distribution, p_student: Distribution, p_start: Distribution, *, teacher_weight: float
) -> list[float]:
    """p_S^(1-w) p_T^w, normalized."""
    pairs = zip(p_teacher, p_student, strict=True)
    return _normalized([t**teacher_weight * (s or t) ** (1 - teacher_weight) for t, s in pairs])


def extrapolated(
    p_teacher: Distribution, p_student: Distribution, p_start: Distribution, *, scale: float
) -> list[float]:
    """p_0 (p_T / p_0)^scale, normalized."""
    return _normalized([(o or t) * (t / (o or t or 1)) ** scale for t, o in zip(p_teacher, p_start, strict=True)])


def top_forward_kl(student: Distribution, teacher: Distribution, *, top_k: int) -> float:
    """The terms of KL(teacher || student) at the ids that fewer than `top_k` others are likelier than to the teacher."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        if t > 0 and sum(other > t for other in teacher) < top_k:
            total += t * log(t / s) if s > 0 else inf
    return total


def margin(student: Distribution, teacher: Distribution, *, top_k: int) -> float:
    """The teacher's log-ratio between its first and its second of the student's `top_k` likeliest ids."""
    likeliest = sorted(range(len(student)), key=lambda token_id: -student[token_id])[:top_k]
    first, second = sorted((teacher[token_id] for token_id in likeliest), reverse=True)[:2]
    if first == 0:
        return 0.0
    return log(first) - log(second) if second > 0 else inf
