"""How a next-token distribution is shaped and which n-grams are forbidden, as the definitions read."""

from collections.abc import Sequence
from math import exp, inf


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def shaped(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities after temperature, then the `top_k` largest (ties kept), then the smallest set of mass `top_p`.

    Ties of mass go to the lower id; greedy (temperature 0) shapes nothing.
    """
    if temperature == 0:
        return softmax(logits)
    scaled = [logit / temperature for logit in logits]
    if top_k:
        edge = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        scaled = [logit if logit >= edge else -inf for logit in scaled]
    probabilities = softmax(scaled)
    kept, mass = set(), 0.0
    for token in sorted(range(len(scaled)), key=lambda token: -probabilities[token]):
        if mass < top_p or top_p == 1:
            kept.add(token)
        mass += probabilities[token]
    return softmax([logit if token in kept else -inf for token, logit in enumerate(scaled)])


def repeats_an_ngram(token_ids: Sequence[int], size: int) -> bool:
    """Whether any n-gram of that size occurs twice."""
    ngrams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return len(set(ngrams)) < len(ngrams)
