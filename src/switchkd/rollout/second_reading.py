"""What both models would have written at each token of a finished rollout, for a person who reads it.

Shape letters: T positions of a response, C those of a piece, V vocabulary, H hidden, K favorites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd.distributions.divergences import JensenShannon
from switchkd.distributions.shaping import shaped_logp
from switchkd.models.heads import Head, backbone, evaluating
from switchkd.models.memory import numbers_at_once, pieces
from switchkd.models.pair import ModelPair
from switchkd.records import Rollout, Sampling

FAVORITES = 5
_DIVERGENCE = JensenShannon()


@dataclass(frozen=True)
class Favorites:
    """One model's likeliest ids at each token, the likeliest first, and their log-probabilities in nats; `logp`: the token's own.

    All are of the distribution that tokens are drawn from: after temperature, top-p and top-k.
    """

    ids: list[list[int]]
    ids_logp: list[list[float]]
    logp: list[float]


@dataclass(frozen=True)
class SecondReading:
    """Both models' favorites in a response of T tokens. Without a teacher, its part is None and `divergence` (nats) is empty."""

    student: Favorites
    teacher: Favorites | None
    divergence: list[float]


def read_again(pair: ModelPair, rollouts: Sequence[Rollout], sampling: Sampling) -> list[SecondReading]:
    """Both models' favorites at every token of these rollouts: one forward a text and model, a text at a time.

    The student is read as it is now. It counts whether the pair has a teacher, not whether one took part in the rollout.
    """
    with evaluating(*pair.models.values()), pair.computing():
        return [_read(pair, rollout, sampling) for rollout in rollouts]


def _read(pair: ModelPair, rollout: Rollout, sampling: Sampling) -> SecondReading:
    heads = {"student": pair.student_head} | ({} if pair.teacher_head is None else {"teacher": pair.teacher_head})
    hidden = {role: _hidden(pair, role, rollout) for role in heads}
    tokens, device = len(rollout.token_ids), pair.student.device
    written_T = torch.tensor(rollout.token_ids, device=device)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {role: [] for role in heads}
    divergence: list[float] = []
    for piece in pieces(tokens, pair.vocabulary_size, numbers_at_once(device)):
        logp = {role: _logp(head, hidden[role][piece], sampling, device) for role, head in heads.items()}
        for role, logp_CV in logp.items():
            top_logp, top_ids = logp_CV.topk(min(FAVORITES, logp_CV.shape[-1]), dim=-1)
            found[role].append((top_ids, top_logp, logp_CV.gather(-1, written_T[piece, None])[:, 0]))
        if "teacher" in logp:
            divergence += _DIVERGENCE(logp["student"], logp["teacher"]).tolist()
    favorites = {role: Favorites(*(torch.cat(part).tolist() for part in zip(*each))) for role, each in found.items()}  # noqa: B905
    return SecondReading(favorites["student"], favorites.get("teacher"), divergence)


def _hidden(pair: ModelPair, role: str, rollout: Rollout) -> Tensor:
    """The last hidden states (T, H) that predict the response."""
    model = pair.models[role]
    # What the last token would lead to is nobody's question.
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids[:-1]]], device=model.device)
    output = backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden: Tensor = output.last_hidden_state[0, -len(rollout.token_ids) :]
    return hidden


def _logp(head: Head, hidden_CH: Tensor, sampling: Sampling, device: torch.device) -> Tensor:
    return shaped_logp(head(hidden_CH).to(device), sampling)
