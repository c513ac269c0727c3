"""Calibration: the threshold found gives the share, always the same one, and what cannot be is said."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from switchkd.analysis.calibration import calibrate
from switchkd.data.examples import to_examples
from switchkd.data.sets import resolve
from switchkd.errors import UserError
from switchkd.models.load import load_pair
from switchkd.models.pair import ModelPair
from switchkd.positions import ByPosition
from switchkd.records import Prompt, Rollout, Sampling
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import tiny_pair

SAMPLING = Sampling(max_new_tokens=24)
PROMPTS = [[3 + n, 7, 20 + n] for n in range(24)]


def share_of(rollouts: list[Rollout]) -> float:
    return sum(sum(r.written_by_teacher) for r in rollouts) / sum(len(r.token_ids) for r in rollouts)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        *((Switch(), share) for share in (0.1, 0.53, 0.8)),
        (Switch(decay_rate=0.05, threshold=0), 0.8),
        (Switch(decay="constant"), 0.1),
        (Switch(decay="linear", threshold=99), 0.53),
    ],
    ids=lambda given: f"{given.decay}-from-{given.threshold}" if isinstance(given, Switch) else None,
)
def test_the_threshold_found_gives_the_share(llama_pair: ModelPair, shape: Switch, wanted: float) -> None:
    engine = SpeculativeEngine(llama_pair, block_size=4)
    found = calibrate(engine, PROMPTS, SAMPLING, teacher_share=wanted, policy=shape, tolerance=0.02)
    assert found.reached
    assert found.policy == replace(shape, threshold=found.policy.threshold)
    rollouts = engine.generate(PROMPTS, found.policy, SAMPLING)
    assert share_of(rollouts) == found.measured_share == pytest.approx(wanted, abs=0.02)
    assert found.prompts == len(PROMPTS)
    assert found.tokens == sum(len(rollout.token_ids) for rollout in rollouts)
    last = max(len(rollout.token_ids) for rollout in rollouts) - 1
    there = [rollout for rollout in rollouts if len(rollout.token_ids) > last]
    assert found.divergence.rows[last] == len(there)
    # Sums of a few numbers in another order: float64 roundings.
    assert found.divergence.mean[last] == pytest.approx(sum(r.divergence[last] for r in there) / len(there), rel=1e-12)
    assert found.teacher_share.mean[last] == sum(r.written_by_teacher[last] for r in there) / len(there)
    # The engine compares in float32.
    assert found.threshold[last] == pytest.approx(there[0].threshold[last], rel=1e-6)


def test_a_threshold_that_begins_above_every_divergence_is_warned_of(
    llama_pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    engine = SpeculativeEngine(llama_pair, block_size=4)
    late = calibrate(engine, PROMPTS, SAMPLING, teacher_share=0.2, policy=Switch(final_fraction=1e-6), tolerance=0.02)
    first = late.first_reachable
    assert 0 < first < len(late.threshold)
    assert late.threshold[first] < math.log(2) <= late.threshold[first - 1]
    assert not any(late.teacher_share.mean[:first])
    assert f"so the teacher writes none of the first {first} tokens; ask for a larger share" in caplog.text
    caplog.clear()
    even = calibrate(engine, PROMPTS, SAMPLING, teacher_share=0.2, policy=Switch(decay="constant"), tolerance=0.02)
    assert even.first_reachable == 0
    assert not caplog.text


def test_engines_and_calls_agree_on_the_threshold() -> None:
    # In float64, where the engines' divergences differ by roundings far below the gaps between them.
    pair = tiny_pair("llama", dtype=torch.float64)
    engines = (ReferenceEngine(pair), SpeculativeEngine(pair, block_size=3), SpeculativeEngine(pair, block_size=1))
    first, *others = (calibrate(engine, PROMPTS[:8], SAMPLING, tolerance=0.02) for engine in engines)
    for other in others:
        assert other.policy.threshold == pytest.approx(first.policy.threshold, rel=1e-9)
        assert (other.measured_share, other.rounds) == (first.measured_share, first.rounds)
    again = calibrate(engines[1], PROMPTS[:8], SAMPLING, tolerance=0.02)
    assert again == others[0]


def test_a_student_that_is_the_teacher_has_no_threshold(llama_pair: ModelPair) -> None:
    twins = ModelPair(llama_pair.student, llama_pair.student)
    with pytest.raises(UserError, match=r"20% cannot be reached: .*all divergences are 0"):
        calibrate(SpeculativeEngine(twins, block_size=4), PROMPTS[:4], SAMPLING)


class Agreeing:
    """An engine whose models agree on three tokens of four."""

    def generate(self, prompts: list[list[int]], policy: Switch, sampling: Sampling, seed: int) -> list[Rollout]:
        size = sampling.max_new_tokens
        divergence = tuple(0.1 + 0.001 * t if t % 4 == 0 else 0.0 for t in range(size))
        nothing = (0.0,) * size
        by_teacher = tuple(d > t for d, t in zip(divergence, thresholds(policy, size), strict=True))
        ids = (5,) * size
        return [
            Rollout(Prompt((5,), n), ids, by_teacher, divergence, nothing, nothing, nothing, finish_reason="length")  # type: ignore[arg-type]
            for n, _ in enumerate(prompts)
        ]


def thresholds(policy: Switch, size: int) -> list[float]:
    values: list[float] = policy.thresholds(torch.arange(size), size).tolist()
    return values


def test_shares_at_the_ends_of_what_can_be_reached() -> None:
    with pytest.raises(UserError, match=r"53% cannot be reached: even with a threshold of almost 0 .* 25%"):
        calibrate(Agreeing(), [[5]], SAMPLING, teacher_share=0.53)  # type: ignore[arg-type]
    assert calibrate(Agreeing(), [[5]], SAMPLING, teacher_share=0.25).reached  # type: ignore[arg-type]
    fallen = Switch(decay="linear", decay_rate=0.25)
    with pytest.raises(UserError, match=r"5% cannot be reached: the linear decay falls to 0.* 21%"):
        calibrate(Agreeing(), [[5]], SAMPLING, teacher_share=0.05, policy=fallen)  # type: ignore[arg-type]
    # One token of 24 more or less is all that a threshold can do here.
    coarse = calibrate(Agreeing(), [[5]], SAMPLING, teacher_share=0.1)  # type: ignore[arg-type]
    assert not coarse.reached
    assert abs(coarse.measured_share - 0.1) <= 0.5 / 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_share": 0}, "share is 0"),
        ({"teacher_share": 1}, "share is 1"),
        ({"tolerance": -1}, "tolerance is -1"),
    ],
)
def test_bad_settings_are_refused(llama_pair: ModelPair, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(ReferenceEngine(llama_pair), PROMPTS, SAMPLING, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no prompt"):
        calibrate(ReferenceEngine(llama_pair), [], SAMPLING)


def test_rows_that_end_leave_the_mean() -> None:
    curve = ByPosition.of([[1.0, 3.0, 5.0], [3.0]])
    assert curve == ByPosition((2.0, 3.0, 5.0), (2, 1, 1))
    (bucket,) = curve.buckets()
    assert (bucket.name, bucket.mean, bucket.tokens, bucket.rows) == ("0-31", 3.0, 4, (2, 1))
    assert [bucket.name for bucket in ByPosition.of([[0.0] * 300]).buckets()][-1] == "256+"
    assert [bucket.name for bucket in ByPosition.of([[0.0] * 33]).buckets()] == ["0-31", "32-63"]


def world_prompts(pair: ModelPair, split: str, count: int) -> list[Prompt]:
    assert pair.tokenizer is not None
    rows = resolve(f"world:{split}", limit=count)
    limits: dict[str, Any] = {"max_prompt_tokens": 288, "max_response_tokens": 224, "need_response": False}
    return [example.prompt for example in to_examples(rows, pair.tokenizer, **limits).examples]


# 0.03: the standard error of a share over 24 texts of some 100 tokens that go together is about 0.02.
@pytest.mark.parametrize("wanted", [0.53, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.1, 0.3, 0.8))])
def test_the_share_holds_on_fresh_prompts_of_the_embedded_pair(wanted: float) -> None:
    pair = load_pair("world:student", "world:teacher")
    sampling = Sampling(max_new_tokens=224)
    engine = SpeculativeEngine(pair, block_size=4)
    found = calibrate(engine, world_prompts(pair, "train", 24), sampling, teacher_share=wanted)
    fresh = share_of(engine.generate(world_prompts(pair, "test", 24), found.policy, sampling, seed=1))
    print(
        f"{wanted:.2f}: threshold {found.policy.threshold:.3g}, measured {found.measured_share:.3f}, fresh {fresh:.3f}"
    )
    assert found.measured_share == pytest.approx(wanted, abs=0.03)
    assert fresh == pytest.approx(wanted, abs=0.03)
