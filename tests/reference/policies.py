"""Policies by their definitions, on plain lists of probabilities and divergences."""

import math
from collections.abc import Sequence


def mixed(student: Sequence[float], teacher: Sequence[float], teacher_share: float) -> list[float]:
    """The law of a token that a coin gives to the teacher."""
    return [teacher_share * t + (1 - teacher_share) * s for s, t in zip(student, teacher, strict=True)]


def is_among_best(token: int, teacher: Sequence[float], top_k: int) -> bool:
    """Whether fewer than `top_k` ids are more probable, and the teacher does not exclude the token."""
    return teacher[token] > 0 and sum(other > teacher[token] for other in teacher) < top_k


def interleaved(student: Sequence[float], teacher: Sequence[float], top_k: int) -> list[float]:
    """The law of a token that the student proposes, and the teacher draws anew where it is not among its best."""
    kept = [s if is_among_best(token, teacher, top_k) else 0.0 for token, s in enumerate(student)]
    refused = sum(student) - sum(kept)
    return [k + refused * t for k, t in zip(kept, teacher, strict=True)]


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
