"""The diagnosis against plain forwards over the finished texts."""

from __future__ import annotations

import math

import pytest
import torch

from switchkd.analysis import diagnosis
from switchkd.analysis.cures import cures_line
from switchkd.analysis.diagnosis import diagnose, share_line
from switchkd.distributions.divergences import JensenShannon
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import FinishReason, Prompt, Rollout, Sampling
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import Switch
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
    texts = diagnose(
        pair, PROMPTS, sampling, switch=SWITCH, seed=3, engine=SpeculativeEngine(pair, block_size=4, margin_top_k=16)
    )
    policies: dict[str, Policy] = {"student": Student(), "switch": SWITCH, "teacher": Teacher()}
    assert texts.keys() == policies.keys()
    for name, policy in policies.items():
        rollouts = ReferenceEngine(pair).generate(PROMPTS, policy, sampling, seed=3)
        measures: list[list[tuple[float, ...]]] = [[] for _ in range(12)]
        surprises = []
        for rollout in rollouts:
            prompt, ids = rollout.prompt.token_ids, torch.tensor(rollout.token_ids)
            with torch.no_grad():
                student, teacher = (
                    model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
                    for model in (pair.student, pair.teacher)
                )
            logp = teacher.log_softmax(-1)
            surprise = -logp[range(len(ids)), ids]
            surprises.append(surprise)
            entropy = torch.distributions.Categorical(logits=teacher).entropy()
            divergence = JensenShannon()(*(diagnosis.shaped_logp(logits, sampling) for logits in (student, teacher)))
            logps = [diagnosis.shaped_logp(logits, sampling)[range(len(ids)), ids] for logits in (student, teacher)]
            ratio = (logps[1] - logps[0]).clamp(-20, 20)
            candidates = diagnosis.shaped_logp(student, sampling).topk(16).indices
            favorites = diagnosis.shaped_logp(teacher, sampling).gather(-1, candidates).topk(2).values
            margin = (favorites[:, 0] - favorites[:, 1]).nan_to_num(0.0).clamp(max=20)
            for t in range(len(ids)):
                of_all = (float(surprise[: t + 1].mean()), float(divergence[t]), float(entropy[t]))
                of_prefixes = (float(ratio[: t + 1].abs().sum()), min(1.0, math.exp(ratio[t])), float(margin[t]))
                measures[t].append((*of_all, *of_prefixes))
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
            assert text.prefixes.discrepancy.mean[t] == pytest.approx(mean[3], rel=1e-9, abs=1e-12)
            assert text.prefixes.trust.mean[t] == pytest.approx(mean[4], rel=1e-9)
            assert text.prefixes.margin.mean[t] == pytest.approx(mean[5], rel=1e-9)
        assert text.whole_perplexity == pytest.approx(math.exp(torch.cat(surprises).mean()), rel=1e-8)
        sums = [math.fsum(measure[1] for measure in row) for row in written]
        behind = [math.fsum(sums[t + 1 :]) / math.fsum(sums) for t in range(len(sums))]
        # A share near 0 is what is left of a difference of sums.
        assert text.prefixes.behind == pytest.approx(behind, rel=1e-9, abs=1e-12)
    assert texts["student"].teacher_share == 0
    assert 0 < texts["switch"].teacher_share < texts["teacher"].teacher_share == 1


def test_a_teacher_and_a_prompt_are_needed(llama_pair: ModelPair) -> None:
    with pytest.raises(UserError, match="the pair has no teacher"):
        diagnose(ModelPair(llama_pair.student), PROMPTS, Sampling(4))
    with pytest.raises(UserError, match="no prompt"):
        diagnose(llama_pair, [], Sampling(4))


def test_a_larger_share_is_advised_where_the_teacher_reads_switchs_text_worse_than_its_own(
    llama_pair: ModelPair,
) -> None:
    """With a threshold of 0 the teacher writes all, so the texts are one. Above ln 2 all is the student's, which reads worse."""
    switches = (Switch(tau, decay="constant") for tau in (0.0, 0.7))
    one, apart = (diagnose(llama_pair, PROMPTS, Sampling(12), switch=switch) for switch in switches)
    own = one["teacher"].whole_perplexity
    assert share_line(one) == (
        f"by the teacher 100.0% of its tokens; the teacher reads it with a perplexity of {own:.4g}, and its own text with {own:.4g}"
    )
    assert apart["switch"].whole_perplexity == apart["student"].whole_perplexity > 1.25 * own
    assert share_line(apart).endswith(": try a larger share")


# ------------------------------------------------------------------------------------------ which cures it speaks for


def rollout(divergence: list[float], trust: list[float], margin: list[float]) -> Rollout:
    count = len(divergence)
    return Rollout(
        Prompt((1,), 0),
        (5,) * count,
        (False,) * count,
        tuple(divergence),
        (math.nan,) * count,
        (-1.0,) * count,
        tuple(-1.0 + math.log(each) for each in trust),
        FinishReason.LENGTH,
        margin=tuple(margin),
    )


LEVEL, RISING, FALLING = [0.1] * 9, [0.1] * 6 + [0.4] * 3, [0.4] * 3 + [0.1] * 6
TRUST, LESS_TRUST = [0.9] * 9, [0.9] * 6 + [0.5] * 3
MARGIN, LESS_MARGIN = [4.0] * 9, [4.0] * 6 + [1.0] * 3


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        ((LEVEL, TRUST, MARGIN), {"gkd may do"}),
        ((RISING, TRUST, MARGIN), {"0.1 to 0.4 nats): switch, trb, iw_opd"}),
        ((LEVEL, LESS_TRUST, MARGIN), {"90.0% to 50.0%): tropd"}),
        ((LEVEL, TRUST, LESS_MARGIN), {"4 to 1 nats): release"}),
        ((FALLING, TRUST, MARGIN), {"only 33% of the divergence lies behind the first 30%: prefix"}),
        ((RISING, LESS_TRUST, []), {"switch, trb, iw_opd", "tropd"}),
    ],
)
def test_each_measure_speaks_for_its_cures(measures: tuple[list[float], ...], said: set[str]) -> None:
    line = cures_line([rollout(*measures)])
    assert all(each in line for each in said)
    named = {name for name in ("switch", "tropd", "release", "prefix", "gkd") if name in line}
    assert named == {name for name in named if any(name in each for each in said)}


def test_of_a_few_tokens_no_trend_is_claimed() -> None:
    assert "nothing can be said" in cures_line([rollout([0.1] * 5, [0.9] * 5, [])])
