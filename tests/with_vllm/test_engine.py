"""Rollouts by vLLM against the reference engine: the same tokens, on models of float32 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import AdaSwitch, Early, Late, Switch
from switchkd.rollout.reference import ReferenceEngine
from tiny import tiny_pair

pytest.importorskip("vllm")

from switchkd.serving.colocated import VllmOptions
from switchkd.serving.engine import VllmEngine
from switchkd.serving.started import Started, sizes_of

# Unequal lengths, more of them than rows in flight, and one that ends with the end of text itself.
PROMPTS = [[5, 9, 11], [7, 8], [3, 4, 5, 6, 7, 8, 9], [20, 1], [30, 31, 32, 33], [40, 41], [5, 9, 11]]
POLICIES: list[Policy] = [
    Student(),
    Teacher(),
    *(Switch(threshold=tau, decay_rate=0.02) for tau in (0.1, 0.3, 0.5)),
    AdaSwitch(factor=1.2, window=3),
    Mix(teacher_share=0.4),
    Early(),
    Late(),
    Interleave(keep_top_k=5),
    TrustRegionBlend(),
]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    """With heads of 16, which vLLM's attention on a CPU does not take, so that they are filled up, as the embedded pair's are."""
    return tiny_pair("llama", hidden=64)


@pytest.fixture(scope="module")
def engine(pair: ModelPair) -> Iterator[VllmEngine]:
    return VllmEngine(pair, options=VllmOptions(block_size=3, max_rows=4, max_tokens=64, cache_gib=0.1))


def check_equal(got: list[Rollout], wanted: list[Rollout]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert (one.token_ids, one.written_by_teacher) == (other.token_ids, other.written_by_teacher)
        assert (one.finish_reason, one.prompt) == (other.finish_reason, other.prompt)
        for name in ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part"):
            # float32 logits of deviation 2.3 differ by up to 3e-5 between two kernels (tests/tiny.py); a log-probability is a
            # difference of two of them, and its square root of magnitude enters the divergence.
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=2e-4, abs=2e-4, nan_ok=True), name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_vllm_writes_what_the_reference_writes(
    engine: VllmEngine, pair: ModelPair, policy: Policy, temperature: float
) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=temperature)
    wanted = ReferenceEngine(pair).generate(PROMPTS, policy, sampling, seed=3)
    check_equal(engine.generate(PROMPTS, policy, sampling, seed=3), wanted)


def test_vllm_says_what_it_was_started_with(engine: VllmEngine, pair: ModelPair) -> None:
    models = {role: sizes_of(model.config) for role, model in pair.models.items()}
    assert models["student"] == {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    assert engine.backend.started == Started(64, 64, models)


def test_top_k_and_top_p_act_on_both_models(engine: VllmEngine, pair: ModelPair) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=0.7, top_k=12, top_p=0.9)
    wanted = ReferenceEngine(pair).generate(PROMPTS, Switch(threshold=0.2), sampling, seed=5)
    check_equal(engine.generate(PROMPTS, Switch(threshold=0.2), sampling, seed=5), wanted)


def test_the_teachers_likeliest_ids_come_back(engine: VllmEngine, pair: ModelPair) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.7)
    wanted = ReferenceEngine(pair).generate(PROMPTS, Student(), sampling, seed=5, keep_teacher=6)
    got = engine.generate(PROMPTS, Student(), sampling, seed=5, keep_teacher=6)
    check_equal(got, wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.teacher_top is not None
        assert other.teacher_top is not None
        torch.testing.assert_close(one.teacher_top.logp, other.teacher_top.logp, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(one.teacher_top.rest_logp, other.teacher_top.rest_logp, rtol=2e-4, atol=2e-4)


def test_a_begun_response_and_addresses_of_ones_own(engine: VllmEngine, pair: ModelPair) -> None:
    prompts = [Prompt((5, 9, 11, 12), 70, sample_id=4, begun=2), Prompt((7, 8), -(1 << 33), sample_id=9)]
    sampling = Sampling(max_new_tokens=10)
    wanted = ReferenceEngine(pair).generate(prompts, Switch(threshold=0.2), sampling, seed=5)
    check_equal(engine.generate(prompts, Switch(threshold=0.2), sampling, seed=5), wanted)


def test_what_cannot_be_had_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(UserError, match="one token long"):
        engine.generate([[5]], Student())
    with pytest.raises(UserError, match="max_tokens 64"):
        engine.generate([[5, 6]], Student(), Sampling(max_new_tokens=100))
    # And the engine goes on.
    assert len(engine.generate([[5, 6]], Student(), Sampling(max_new_tokens=3))) == 1


def test_new_weights_reach_the_running_student(engine: VllmEngine, pair: ModelPair) -> None:
    """Last, since it changes the pair. The prompts are those of before: what a cache held of the old weights would show."""
    sampling = Sampling(max_new_tokens=24)
    before = engine.generate(PROMPTS, Switch(threshold=0.3), sampling, seed=3)
    version = engine._version
    with torch.no_grad():
        for parameter in pair.student.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.15)
    wanted = ReferenceEngine(pair).generate(PROMPTS, Switch(threshold=0.3), sampling, seed=3)
    got = engine.generate(PROMPTS, Switch(threshold=0.3), sampling, seed=3)
    assert [each.token_ids for each in got] != [each.token_ids for each in before]
    check_equal(got, wanted)
    assert engine._version == version + 1
