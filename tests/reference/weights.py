"""The weights as their definitions read, in plain lists: one value for each counted token of one text, in float64.

`writers` has a letter for each counted token: s (student), t (teacher), d (the data set's text, or the beginning of a
rollout). The log-probabilities and margins have as many values, of which those at d are never read.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, exp, fsum, inf, log


def by_writer(writers: str, *, student: float, teacher: float) -> list[float]:
    return [{"s": student, "t": teacher, "d": 1.0}[writer] for writer in writers]


def prefix(writers: str, *, tokens: int) -> list[float]:
    return [1.0 if place < tokens else 0.0 for place in range(len(writers))]


def prefix_tokens(share: float, max_new_tokens: int) -> int:
    """The fewest whole tokens that are at least this share of all."""
    return ceil(share * max_new_tokens)


def importance(writers: str, student: Sequence[float], teacher: Sequence[float], *, gamma: float) -> list[float]:
    own = [place for place, writer in enumerate(writers) if writer != "d"]
    distance = {place: abs(teacher[place] - student[place]) for place in own}
    total = fsum(distance.values())
    weights = [1.0] * len(writers)
    for place in own:
        before = fsum(distance[other] for other in own if other < place)
        weights[place] = 1 + gamma * (1 - (before / total if total else 0.0))
    return weights


def trust(
    writers: str, student: Sequence[float], teacher: Sequence[float], *, least_trust: float | None = None
) -> list[float]:
    weights = []
    for writer, p_student, p_teacher in zip(writers, student, teacher, strict=True):
        # A ratio above 1 is cut before it can overflow.
        trusted = 1.0 if writer == "d" or p_teacher >= p_student else exp(p_teacher - p_student)
        weights.append(trusted if least_trust is None else float(trusted >= least_trust))
    return weights


def change_point(series: Sequence[float]) -> int | None:
    """Where the series drops, by trying every place: residuals around means, and the Bayesian information criterion.

    A model has its means, and with two of them the place between; each of these costs log n.
    """
    count = len(series)
    if count < 4:
        return None

    def residual(*bounds: int) -> float:
        total = 0.0
        for start, stop in pairwise(bounds):
            part = series[start:stop]
            mean = fsum(part) / len(part)
            total += fsum((value - mean) ** 2 for value in part)
        return total

    def criterion(squares: float, parameters: int) -> float:
        return (count * log(squares / count) if squares > 0 else -inf) + parameters * log(count)

    def falls(place: int) -> bool:
        return fsum(series[:place]) / place > fsum(series[place:]) / (count - place)

    drops = [(residual(0, place, count), place) for place in range(1, count) if falls(place)]
    if not drops:
        return None
    squares, place = min(drops)
    return place if criterion(squares, 4) < criterion(residual(0, count), 2) else None


def release(writers: str, margins: Sequence[float], *, segment_tokens: int) -> list[float]:
    own = [place for place, writer in enumerate(writers) if writer != "d"]
    segments: list[list[float]] = []
    for number, place in enumerate(own):
        if number % segment_tokens == 0:
            segments.append([])
        segments[-1].append(margins[place])
    drop = change_point([fsum(segment) / len(segment) for segment in segments])
    weights = [1.0] * len(writers)
    if drop is not None:
        for place in own[drop * segment_tokens :]:
            weights[place] = 0.0
    return weights
