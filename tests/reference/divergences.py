"""The divergences as their definitions read: plain sums over one pair of distributions, 0 log 0 = 0, natural log.

Each takes the two probability vectors (sequences of V floats) and returns nats, inf where the definition says so. The
gradients are those of the definition with respect to the student's logits, through the softmax.
"""

from collections.abc import Callable, Sequence
from math import fsum, inf, log

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


def symmetric_kl(student: Distribution, teacher: Distribution, *, forward_weight: float = 0.5) -> float:
    parts = (forward_weight, forward_kl(student, teacher)), (1 - forward_weight, reverse_kl(student, teacher))
    return sum(weight * value for weight, value in parts)


def skewed_forward_kl(student: Distribution, teacher: Distribution, *, teacher_weight: float = 0.1) -> float:
    return kullback_leibler(teacher, _mixture(student, teacher, teacher_weight))


def skewed_reverse_kl(student: Distribution, teacher: Distribution, *, student_weight: float = 0.1) -> float:
    return kullback_leibler(student, _mixture(student, teacher, 1 - student_weight))


def total_variation(student: Distribution, teacher: Distribution) -> float:
    return sum(abs(s - t) for s, t in zip(student, teacher, strict=True)) / 2


def _forward_share(student: Distribution, teacher: Distribution, head_mass: float) -> float:
    """The head's part of the differences: ids are taken by falling teacher probability until they have `head_mass`."""
    gap = {True: 0.0, False: 0.0}
    for s, t in zip(student, teacher, strict=True):
        # What is likelier than this id falls short of the mass, by more than rounding.
        in_head = fsum(other for other in teacher if other > t) < head_mass * (1 - 1e-6)
        gap[in_head] += abs(s - t)
    total = gap[True] + gap[False]
    return gap[True] / total if total else 0.0


def adaptive_kl(student: Distribution, teacher: Distribution, *, head_mass: float = 0.5) -> float:
    share = _forward_share(student, teacher, head_mass)
    parts = (share, forward_kl(student, teacher)), (1 - share, reverse_kl(student, teacher))
    return sum(weight * value for weight, value in parts if weight > 0)


def alpha_beta(
    student: Distribution, teacher: Distribution, *, teacher_power: float = 0.2, student_power: float = 0.7
) -> float:
    a, b = teacher_power, student_power
    terms = (
        t**a * s**b - a / (a + b) * t ** (a + b) - b / (a + b) * s ** (a + b)
        for s, t in zip(student, teacher, strict=True)
    )
    return -sum(terms) / (a * b)


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


def symmetric_kl_gradient(student: Distribution, teacher: Distribution, *, forward_weight: float = 0.5) -> np.ndarray:
    reverse = (1 - forward_weight) * reverse_kl_gradient(student, teacher)
    return forward_weight * forward_kl_gradient(student, teacher) + reverse


def skewed_forward_kl_gradient(
    student: Distribution, teacher: Distribution, *, teacher_weight: float = 0.1
) -> np.ndarray:
    mixture = np.asarray(_mixture(student, teacher, teacher_weight))
    return _through_softmax(student, -(1 - teacher_weight) * np.asarray(teacher) / mixture)


def skewed_reverse_kl_gradient(
    student: Distribution, teacher: Distribution, *, student_weight: float = 0.1
) -> np.ndarray:
    mixture = np.asarray(_mixture(student, teacher, 1 - student_weight))
    p = np.asarray(student)
    return _through_softmax(student, np.log(p / mixture) + 1 - student_weight * p / mixture)


def total_variation_gradient(student: Distribution, teacher: Distribution) -> np.ndarray:
    return _through_softmax(student, np.sign(np.asarray(student) - np.asarray(teacher)) / 2)


def adaptive_kl_gradient(student: Distribution, teacher: Distribution, *, head_mass: float = 0.5) -> np.ndarray:
    """With the two weights held: it is not the gradient of the value."""
    share = _forward_share(student, teacher, head_mass)
    return symmetric_kl_gradient(student, teacher, forward_weight=share)


def alpha_beta_gradient(
    student: Distribution, teacher: Distribution, *, teacher_power: float = 0.2, student_power: float = 0.7
) -> np.ndarray:
    p, q = np.asarray(teacher), np.asarray(student)
    a, b = teacher_power, student_power
    return _through_softmax(student, (q ** (a + b - 1) - p**a * q ** (b - 1)) / a)


VALUES: dict[str, Callable[..., float]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
}

GRADIENTS: dict[str, Callable[..., np.ndarray]] = {
    "forward_kl": forward_kl_gradient,
    "reverse_kl": reverse_kl_gradient,
    "symmetric_kl": symmetric_kl_gradient,
    "jensen_shannon": jensen_shannon_gradient,
    "skewed_forward_kl": skewed_forward_kl_gradient,
    "skewed_reverse_kl": skewed_reverse_kl_gradient,
    "total_variation": total_variation_gradient,
    "adaptive_kl": adaptive_kl_gradient,
    "alpha_beta": alpha_beta_gradient,
}

# Where the value has a kink (total variation: at equal probabilities), or the gradient is not the value's (adaptive KL).
NOT_SMOOTH = frozenset({"total_variation"})
HELD_WEIGHTS = frozenset({"adaptive_kl"})
