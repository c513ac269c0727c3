"""The distance to the teacher against every response that there is."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from reference.sequence_law import TokenIds, sequence_law
from switchkd.analysis.distance import SequenceKL, distance_to_teacher, sequence_kl
from switchkd.distributions.divergences import Divergence, ForwardKL, ReverseKL
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import FinishReason, Prompt, Rollout
from tiny import EOS_ID, tiny_model, tiny_pair

PROMPT, NEW_TOKENS = (2, 3), 3


@pytest.fixture(scope="module")
def small() -> ModelPair:
    """Four ids and at most three tokens: 40 responses."""
    return tiny_pair("llama", vocab=4, noise=0.6, dtype=torch.float64)


def law_of(model: torch.nn.Module) -> dict[TokenIds, float]:
    def writer(response: TokenIds) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([PROMPT + response])).logits[0, -1].softmax(-1).tolist()  # type: ignore[no-any-return]

    return sequence_law(writer, [EOS_ID], NEW_TOKENS)


def laws(pair: ModelPair) -> tuple[dict[TokenIds, float], dict[TokenIds, float]]:
    assert pair.teacher is not None
    return law_of(pair.student), law_of(pair.teacher)


def kl(law: dict[TokenIds, float], other: dict[TokenIds, float]) -> float:
    return math.fsum(share * math.log(share / other[response]) for response, share in law.items())


def rollout(response: TokenIds) -> Rollout:
    per_token = (math.nan,) * len(response)
    writers = (False,) * len(response)
    return Rollout(Prompt(PROMPT, 0), response, writers, *[per_token] * 4, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("divergence", "swapped"), [(ReverseKL(), False), (ForwardKL(), True)], ids=["reverse", "forward"]
)
def test_the_mean_over_all_responses_is_the_divergence_of_the_two_laws(
    small: ModelPair, divergence: Divergence, swapped: bool
) -> None:
    law, other = reversed(laws(small)) if swapped else laws(small)
    assert len(law) == 40
    # Texts of three lengths, in groups that do not divide them.
    found = sequence_kl(small, [rollout(response) for response in law], divergence, rows=7)
    assert found.tokens == tuple(map(len, law))
    mean = math.fsum(share * nats for share, nats in zip(law.values(), found.per_sequence, strict=True))
    assert kl(law, other) > 0.1
    # float64, and 40 sums of at most 3 terms: a few hundred roundings.
    assert mean == pytest.approx(kl(law, other), rel=1e-12)


def test_samples_give_it_within_the_standard_error_of_their_law(small: ModelPair) -> None:
    student, teacher = laws(small)
    prompts = [Prompt(PROMPT, number) for number in range(200)]
    found = distance_to_teacher(small, prompts, max_new_tokens=NEW_TOKENS, seed=5)
    both = (found.reverse, ReverseKL(), student, teacher), (found.forward, ForwardKL(), teacher, student)
    for estimate, divergence, law, other in both:
        exact, of_each = kl(law, other), sequence_kl(small, [rollout(response) for response in law], divergence)
        spread = [share * (nats - exact) ** 2 for share, nats in zip(law.values(), of_each.per_sequence, strict=True)]
        # From the law and not from the samples: rare responses that are far apart may be missing among these.
        error = math.sqrt(math.fsum(spread) / len(prompts))
        assert abs(estimate.mean - exact) < 4 * error
        assert error < exact / 2


def test_all_students_meet_the_same_texts_of_the_teacher(
    llama_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[Rollout]] = []

    def kept(pair: ModelPair, samples: list[Rollout], divergence: Divergence, *, rows: int) -> SequenceKL:
        read.append(samples)
        return sequence_kl(pair, samples, divergence, rows=rows)

    monkeypatch.setattr("switchkd.analysis.distance.sequence_kl", kept)
    prompts = [[3, 4], [5, 6, 7]]
    found = distance_to_teacher(llama_pair, prompts, max_new_tokens=6)
    assert llama_pair.teacher is not None
    distance_to_teacher(ModelPair(tiny_model("gpt2"), llama_pair.teacher), prompts, max_new_tokens=6)
    assert [each.token_ids for each in read[1]] == [each.token_ids for each in read[3]]
    assert [each.token_ids for each in read[0]] != [each.token_ids for each in read[2]]
    # To the swapped pair, the teacher's texts are the student's. float32, and sums of six terms.
    swapped = sequence_kl(llama_pair.swapped(), read[1], ReverseKL())
    assert found.forward.per_sequence == pytest.approx(swapped.per_sequence, rel=1e-4)


def test_equal_models_are_at_no_distance() -> None:
    teacher = tiny_model("gpt2")
    pair = ModelPair(copy.deepcopy(teacher), teacher)
    found = distance_to_teacher(pair, [[3, 4], [5]], max_new_tokens=6)
    assert set(found.reverse.per_sequence + found.forward.per_sequence) == {0.0}


def test_what_is_told_of_samples() -> None:
    found = SequenceKL(((1.0, 3.0), (2.0,), (0.0, 0.0, 6.0)))
    assert found.per_sequence == (4, 2, 6)
    assert found.mean == 4
    assert found.standard_error == pytest.approx(2 / math.sqrt(3))
    assert found.per_token == 2
    # What is left of 4, 2, 6 beyond 2 a token: 0, 0, 0.
    assert found.per_token_error == 0
    assert found.by_position.mean == (1, 1.5, 6)
    assert {label: part.per_sequence for label, part in found.by(["long", None, "long"]).items()} == {"long": (4, 6)}
    assert found.as_json()["rows"] == (3, 2, 1)
    assert SequenceKL(((1.0,),)).as_json()["standard_error"] is None


def test_a_teacher_and_a_prompt_are_needed(llama_pair: ModelPair) -> None:
    with pytest.raises(UserError, match="the pair has no teacher"):
        distance_to_teacher(ModelPair(llama_pair.student), [[3]], max_new_tokens=2)
    with pytest.raises(UserError, match="no prompt"):
        distance_to_teacher(llama_pair, [], max_new_tokens=2)
