"""The divergences as their definitions read: plain sums over one pair of distributions, 0 log 0 = 0, natural log.

Each takes the two probability vectors (sequences of V floats) and returns nats, inf where the definition says so. The
gradients are those of the definition with respect to the student's logits, through the softmax.
"""

from collections.abc import Callable, Sequence
from math import inf, log

import numpy as np

Distribution = Sequence[float]


def kullback_leibler(p: Distribution, q: Distribution) -> float:
    total = 0.0
    for p_i, q_i in zip(p, q, strict=True):
        if p_i > 0:
            total += p_i * log(p_i / q_i) if q_i > 0 else inf
    return total


def forward_kl(student: Distribution, teacher: Distribution) -> float:
    return kullback_leibler(teacher, student)


def reverse_kl(student: Distribution, teacher: Distribution) -> float:
    return kullback_leibler(student, teacher)


def _mixture(student: Distribution, teacher: Distribution, teacher_weight: float) -> list[float]:
    return [teacher_weight * t + (1 - teacher_weight) * s for s, t in zip(student, teacher, strict=True)]


def jensen_shannon(student: Distribution, teacher: Distribution, *, teacher_weight: float = 0.5) -> float:
    mixture = _mixture(student, teacher, teacher_weight)
    of_teacher, of_student = kullback_leibler(teacher, mixture), kullback_leibler(student, mixture)
    return teacher_weight * of_teacher + (1 - teacher_weight) * of_student


def _through_softmax(student: Distribution, gradient: np.ndarray) -> np.ndarray:
    """From the gradient with respect to the probabilities to the gradient with respect to the logits."""
    p = np.asarray(student)
    return p * (gradient - (p * gradient).sum())


def forward_kl_gradient(student: Distribution, teacher: Distribution) -> np.ndarray:
    return _through_softmax(student, -np.asarray(teacher) / np.asarray(student))


def reverse_kl_gradient(student: Distribution, teacher: Distribution) -> np.ndarray:
    return _through_softmax(student, np.log(np.asarray(student) / np.asarray(teacher)) + 1)


def jensen_shannon_gradient(student: Distribution, teacher: Distribution, *, teacher_weight: float = 0.5) -> np.ndarray:
    mixture = np.asarray(_mixture(student, teacher, teacher_weight))
    return _through_softmax(student, (1 - teacher_weight) * np.log(np.asarray(student) / mixture))


VALUES: dict[str, Callable[..., float]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}

GRADIENTS: dict[str, Callable[..., np.ndarray]] = {
    "forward_kl": forward_kl_gradient,
    "reverse_kl": reverse_kl_gradient,
    "jensen_shannon": jensen_shannon_gradient,
}
