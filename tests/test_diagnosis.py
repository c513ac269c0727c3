"""The diagnosis against plain forwards over the finished texts."""

from __future__ import annotations

import math

import pytest
import torch

from switchkd.analysis import diagnosis
from switchkd.analysis.diagnosis import diagnose
from switchkd.distributions.divergences import JensenShannon
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.rollout.law import Policy
from switchkd.rollout.policies import Student, Switch, Teacher
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import tiny_pair

PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13], [14, 15]]
SWITCH = Switch(threshold=0.3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=0.8, top_p=0.9)], ids=["plain", "shaped"])
def test_the_numbers_are_those_of_a_plain_forward(
    family: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tiny_pair(family, dtype=torch.float64)
    assert pair.teacher is not None
    # Chunks of 5 positions.
    monkeypatch.setattr(diagnosis, "_LOGITS_AT_A_TIME", 5 * pair.vocabulary_size)
    texts = diagnose(pair, PROMPTS, sampling, switch=SWITCH, seed=3, engine=SpeculativeEngine(pair, block_size=4))
    policies: dict[str, Policy] = {"student": Student(), "switch": SWITCH, "teacher": Teacher()}
    assert texts.keys() == policies.keys()
    for name, policy in policies.items():
        rollouts = ReferenceEngine(pair).generate(PROMPTS, policy, sampling, seed=3)
        measures: list[list[tuple[float, float, float]]] = [[] for _ in range(12)]
        for rollout in rollouts:
            prompt, ids = rollout.prompt.token_ids, torch.tensor(rollout.token_ids)
            with torch.no_grad():
                student, teacher = (
                    model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
                    for model in (pair.student, pair.teacher)
                )
            logp = teacher.log_softmax(-1)
            surprise = -logp[range(len(ids)), ids]
            entropy = torch.distributions.Categorical(logits=teacher).entropy()
            divergence = JensenShannon()(*(diagnosis.shaped_logp(logits, sampling) for logits in (student, teacher)))
            for t in range(len(ids)):
                measures[t].append((float(surprise[: t + 1].mean()), float(divergence[t]), float(entropy[t])))
        text = texts[name]
        written = [row for row in measures if row]
        assert text.divergence.rows == text.entropy.rows == text.log_perplexity.rows == tuple(map(len, written))
        for t, row in enumerate(written):
            mean = [math.fsum(column) / len(row) for column in zip(*row, strict=True)]
            # float64 through a cache and without one: 1e-9 is what the engines' own tests allow, and passes here.
            assert text.log_perplexity.mean[t] == pytest.approx(mean[0], rel=1e-9)
            assert text.perplexity[t] == pytest.approx(math.exp(mean[0]), rel=1e-8)
            assert text.divergence.mean[t] == pytest.approx(mean[1], rel=1e-9)
            assert text.entropy.mean[t] == pytest.approx(mean[2], rel=1e-9)
    assert texts["student"].teacher_share == 0
    assert 0 < texts["switch"].teacher_share < texts["teacher"].teacher_share == 1


def test_a_teacher_and_a_prompt_are_needed(llama_pair: ModelPair) -> None:
    with pytest.raises(UserError, match="the pair has no teacher"):
        diagnose(ModelPair(llama_pair.student), PROMPTS, Sampling(4))
    with pytest.raises(UserError, match="no prompt"):
        diagnose(llama_pair, [], Sampling(4))
