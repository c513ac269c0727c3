"""From logits to log-probabilities: those that tokens are drawn from, and those that the loss compares.

Shape letters: B rows, V vocabulary; `...` is any leading shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from switchkd.records import Sampling, TopLogp


def shaped_logp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities (..., V) in nats after temperature, top-k, then top-p; excluded tokens are -inf.

    At least float32. All logits equal to the k-th largest are kept. Greedy decoding keeps the models' own distributions
    (temperature 1), which are what a policy then compares.
    """
    # Low precision cannot tell the tokens of a large vocabulary apart.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.greedy:
        return torch.log_softmax(logits, dim=-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        edge = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
        # The mass in front of a token decides, so the likeliest token always stays.
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.log_softmax(logits, dim=-1)


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (..., V) in nats at a temperature above 0, at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if temperature == 1 else logits / temperature
    # log_softmax adds up one by one on a CPU, which at 131,072 ids costs 1.5e-5 of the gradient; this costs 2e-6.
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def top_logp(logits: Tensor, top_k: int) -> TopLogp:
    """The likeliest `top_k` ids at each position of logits (T, V), with their log-probabilities and the rest's, on the CPU."""
    return top_logp_of_parts([logits], top_k)


def top_logp_of_parts(logits: Iterable[Tensor], top_k: int) -> TopLogp:
    """As `top_logp`, of logits that come in parts, one after another: one copy to the CPU for all of them."""
    # By `map`, which lets go of a part before it asks for the next.
    table = torch.cat([*map(partial(_top_table, top_k=top_k), logits)]).cpu()
    kept = table.shape[1] // 2
    ids, logp, rest = table.split([kept, kept, 1], dim=1)
    # Copies, for a part of one would keep the whole table.
    return TopLogp(ids.long(), logp.clone(), rest[:, 0].clone())


def _top_table(logits: Tensor, top_k: int) -> Tensor:
    """The columns of a `TopLogp`, side by side in float32, in which ids are exact up to 16 million."""
    logp = log_probabilities(logits, 1.0).float()
    kept, ids = logp.topk(min(top_k, logp.shape[-1]), dim=-1)
    # Not 1 - the sum of the kept, which rounding would leave without a digit where the rest is small.
    rest = logp.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([ids.to(logp.dtype), kept, rest], dim=-1)


def entropy(logp: Tensor) -> Tensor:
    """Entropies (...) in nats of log-probabilities (..., V); an excluded id adds nothing."""
    nats: Tensor = torch.special.entr(logp.exp()).sum(dim=-1)
    return nats


def ban_repeated_ngrams(logits_BV: Tensor, texts: Sequence[Sequence[int]], size: int) -> Tensor:
    """The logits with -inf for every token that would repeat an n-gram of `size` tokens already in its row's text."""
    logits_BV = logits_BV.clone()
    for row, ids in enumerate(texts):
        context = tuple(ids[len(ids) - size + 1 :])
        starts = range(len(ids) - size + 1)
        banned = [ids[start + size - 1] for start in starts if tuple(ids[start : start + size - 1]) == context]
        logits_BV[row, banned] = -torch.inf
    return logits_BV
