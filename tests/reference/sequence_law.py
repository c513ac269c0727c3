"""The exact law of a rollout on a small vocabulary, by enumeration of every response."""

from collections.abc import Callable, Sequence

TokenIds = tuple[int, ...]


def sequence_law(
    writer: Callable[[TokenIds], Sequence[float]], eos_ids: Sequence[int], max_new_tokens: int
) -> dict[TokenIds, float]:
    """The probability of each possible response; `writer` gives the next token's distribution after a response so far."""
    finished: dict[TokenIds, float] = {}
    unfinished: dict[TokenIds, float] = {(): 1.0}
    for _ in range(max_new_tokens):
        longer: dict[TokenIds, float] = {}
        for response, probability in unfinished.items():
            for token, share in enumerate(writer(response)):
                if share > 0:
                    (finished if token in eos_ids else longer)[(*response, token)] = probability * share
        unfinished = longer
    return finished | unfinished
