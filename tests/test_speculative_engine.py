"""The engine people use equals the reference engine, token for token and writer for writer, under all of its settings."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import cycle, product
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from checks.rollouts import TIE, assert_same_rollouts, tie_margin
from switchkd.errors import UserError
from switchkd.models.heads import backbone
from switchkd.models.pair import ModelPair
from switchkd.records import FinishReason, Prompt, Rollout, Sampling, teacher_share_of
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import AdaSwitch, Early, Late, Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import EOS_ID, PAD_ID, VOCABULARY, tiny_model, tiny_pair

# A family is what tests/tiny.py makes, with options: learned and rotary positions, grouped heads, tied heads, biases,
# scaled and soft-capped logits, windows of 16 that every sequence here outgrows, in all layers or in every second one.
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 eager": {"attn_implementation": "eager"},
    "opt": {},
    "llama": {},
    "llama eager": {"attn_implementation": "eager"},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2 eager": {"attn_implementation": "eager"},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {},
    "granite": {},
}

POLICIES: dict[str, Policy] = {
    "student": Student(),
    "teacher": Teacher(),
    "switch at 0": Switch(threshold=0, decay="constant"),
    "switch low": Switch(threshold=0.15),
    "switch linear": Switch(threshold=0.4, decay="linear", decay_rate=0.03),
    "switch constant": Switch(threshold=0.2, decay="constant"),
    "switch above ln 2": Switch(threshold=0.7, decay="constant"),
    "adaswitch": AdaSwitch(factor=1.3, window=4),
    "interleave": Interleave(keep_top_k=3),
    "mix": Mix(0.4),
    "trust region": TrustRegionBlend(0.2),
    "early": Early(0.4),
    "late": Late(0.4),
}

# The policies that look at more than the divergence and the position.
RULES = ("adaswitch", "interleave", "mix", "trust region")

SAMPLINGS: dict[str, Sampling] = {
    "plain": Sampling(max_new_tokens=17),
    "greedy": Sampling(max_new_tokens=17, temperature=0),
    "cool": Sampling(max_new_tokens=17, temperature=0.7),
    "top-p": Sampling(max_new_tokens=17, top_p=0.9),
    "top-k": Sampling(max_new_tokens=17, temperature=1.3, top_k=8),
}

# One-token prompts, equal prompts, padding and end-of-text ids as ordinary prompt tokens.
PROMPTS = [[5], [9, 8, 7], list(range(2, 30)), [PAD_ID, EOS_ID, 3, PAD_ID], [9, 8, 7], [40, 41, 42, 43, 44, 45, 46]]


def with_biases(model: PreTrainedModel, seed: int = 7) -> PreTrainedModel:
    """The model with noise on its vectors: initialization leaves biases 0, and a lost bias would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


@cache
def pair_of(kind: str, dtype: torch.dtype, eos_ids: tuple[int, ...] = (EOS_ID,)) -> ModelPair:
    """Made once a session; no test changes it."""
    made = tiny_pair(kind.split()[0], dtype=dtype, **{"attn_implementation": "sdpa", **KINDS[kind]})
    assert made.teacher is not None
    for model in (made.student, made.teacher):
        model.generation_config.eos_token_id = model.config.eos_token_id = list(eos_ids)
        with_biases(model)
    return made


def reference_of(pair: ModelPair, kind: str) -> ReferenceEngine:
    # transformers' eager attention takes its softmax in float32, where the float64 mask of a padding row is -inf
    # throughout and its output NaN. So the oracle has to run without padding there.
    unpadded = kind.endswith("eager") and pair.student.dtype == torch.float64
    return ReferenceEngine(pair, max_rows=1 if unpadded else 64)


@cache
def oracle(kind: str, policy: str, sampling: str, dtype: torch.dtype) -> list[Rollout]:
    return reference_of(pair_of(kind, dtype), kind).generate(PROMPTS, POLICIES[policy], SAMPLINGS[sampling])


@contextmanager
def forwards_of(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """The shape (rows, positions) of each forward that the model's backbone runs."""
    shapes: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = backbone(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


# ------ equality, token for token


# A family's cache and masks know no policy. So the quick suite runs SWITCH for every family and the other policies by turns,
# all of them for one family; `make slow` runs every pair of the two.
WHOLE = "llama"
IN_FLOAT64 = ("student", "teacher", *RULES)
IN_FLOAT64_WITH_SWITCH = ("student", "teacher", "switch low", *RULES)


def by_turns(names: Sequence[str], turn: int, count: int) -> set[str]:
    """`count` of the names, from another place at each turn."""
    return {names[(count * turn + at) % len(names)] for at in range(count)}


def grid() -> Iterator[Any]:
    """Kind, policy, sampling, block size and type of the numbers; quick and slow tests each take turns of their own.

    The sampling is one that the kind has not met yet and, where there is a choice, one new to the policy: few tests, most pairs.
    """
    sizes = {slow: cycle(range(1, 17)) for slow in (False, True)}
    met = Counter[tuple[str, str, bool]]()
    others = [policy for policy in POLICIES if policy != "switch low"]
    for dtype, names, count in ((torch.float32, others, 2), (torch.float64, IN_FLOAT64, 1)):
        for turn, kind in enumerate(KINDS):
            quick = {"switch low"} | by_turns(names, turn, count)
            if kind == WHOLE and dtype is torch.float32:
                quick |= set(POLICIES)
            for policy in POLICIES if dtype is torch.float32 else IN_FLOAT64_WITH_SWITCH:
                slow = policy not in quick
                counts = {each: (met[kind, each, slow], met[policy, each, slow]) for each in SAMPLINGS}
                sampling = min(SAMPLINGS, key=lambda each, counts=counts: (*map(bool, counts[each]), sum(counts[each])))
                met.update([(kind, sampling, slow), (policy, sampling, slow)])
                marks = pytest.mark.slow if slow else ()
                yield pytest.param(kind, policy, sampling, next(sizes[slow]), dtype, marks=marks)


def test_the_quick_grid_has_each_kind_under_every_sampling_and_all_policies_and_sizes() -> None:
    quick = [each.values for each in grid() if not each.marks]
    kinds, policies, samplings, sizes, dtypes = zip(*quick, strict=True)
    assert {*zip(kinds, samplings, strict=True)} == {*product(KINDS, SAMPLINGS)}
    assert {*zip(kinds, dtypes, strict=True)} == {*product(KINDS, (torch.float32, torch.float64))}
    assert {*zip(policies, dtypes, strict=True)} >= {*product(IN_FLOAT64_WITH_SWITCH, (torch.float32, torch.float64))}
    assert (set(policies), set(sizes)) == (set(POLICIES), set(range(1, 17)))


@pytest.mark.parametrize(("kind", "policy", "sampling", "block_size", "dtype"), [*grid()])
def test_equals_the_reference_engine(
    kind: str, policy: str, sampling: str, block_size: int, dtype: torch.dtype
) -> None:
    pair = pair_of(kind, dtype)
    rollouts = SpeculativeEngine(pair, block_size).generate(PROMPTS, POLICIES[policy], SAMPLINGS[sampling])
    assert_same_rollouts(rollouts, oracle(kind, policy, sampling, dtype), pair, POLICIES[policy], SAMPLINGS[sampling])


def blocks() -> Iterator[Any]:
    """Of a policy: a few sizes under each sampling. The quick suite takes two of the samplings besides plain by turns."""
    others = [sampling for sampling in SAMPLINGS if sampling != "plain"]
    for turn, policy in enumerate(IN_FLOAT64_WITH_SWITCH):
        # What the teacher refuses cuts a block short, whatever the rule: SWITCH meets all sizes, the others a few by turns.
        fixed = (1, 2, 3, 5, 8, 16)
        yield policy, "plain", ("auto", *(fixed if policy == "switch low" else fixed[turn % 3 :: 3]))
        yield pytest.param(policy, "plain", tuple(range(1, 17)), marks=pytest.mark.slow)
        for sampling in others:
            quick = sampling in by_turns(others, turn, 2)
            yield pytest.param(policy, sampling, ("auto", 2 + turn % 4), marks=() if quick else pytest.mark.slow)
            yield pytest.param(policy, sampling, ("auto", 2, 5), marks=pytest.mark.slow)


@pytest.mark.parametrize(("policy", "sampling", "sizes"), [*blocks()])
def test_block_size_changes_no_token(policy: str, sampling: str, sizes: tuple[int | Literal["auto"], ...]) -> None:
    pair, expected = pair_of("llama", torch.float64), oracle("llama", policy, sampling, torch.float64)
    for block_size in sizes:
        rollouts = SpeculativeEngine(pair, block_size).generate(PROMPTS, POLICIES[policy], SAMPLINGS[sampling])
        assert_same_rollouts(rollouts, expected, pair, POLICIES[policy], SAMPLINGS[sampling])


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_really_switches(kind: str) -> None:
    # A pair that always agrees, or never, would let any engine pass.
    pair, sampling = pair_of(kind, torch.float64), replace(SAMPLINGS["plain"], max_new_tokens=20)
    engine = SpeculativeEngine(pair, block_size=4)
    divergences = [d for rollout in engine.generate(PROMPTS, Teacher(), sampling) for d in rollout.divergence]
    policy = Switch(threshold=sorted(divergences)[len(divergences) // 2], decay="constant")
    # Nats. Of one model twice it is a rounding, 1e-16, which half of the tokens exceed too.
    assert policy.threshold > 1e-3
    rollouts = engine.generate(PROMPTS, policy, sampling)
    writers = [writer for rollout in rollouts for writer in rollout.written_by_teacher]
    assert 0.2 < sum(writers) / len(writers) < 0.8
    assert 0.3 < engine.metrics.acceptance < 1
    assert any(len(set(rollout.written_by_teacher)) == 2 for rollout in rollouts)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        pytest.param(kind, rule, marks=() if at == turn % len(RULES) else pytest.mark.slow)
        for turn, kind in enumerate(KINDS)
        for at, rule in enumerate(RULES)
    ],
)
def test_the_grid_really_mixes_writers_under_every_rule(kind: str, policy: str) -> None:
    engine = SpeculativeEngine(pair_of(kind, torch.float32), block_size=4)
    rollouts = engine.generate(PROMPTS, POLICIES[policy], SAMPLINGS["plain"])
    # The flat distributions of soft-capped logits agree on their best; where logits are far apart three ids hold little mass.
    assert 0.04 < teacher_share_of(rollouts) < 0.95
    assert 0.25 < engine.metrics.acceptance < 1  # at 1/4 no proposal was kept, at 1 none refused


def test_a_teacher_that_draws_what_it_refused_does_not_end_the_block() -> None:
    # One model twice under keep_top_k 1: every proposal but the most probable is refused, and some are drawn again.
    model = tiny_model("llama", dtype=torch.float64)
    pair, policy, sampling = (
        ModelPair(model, copy.deepcopy(model)),
        Interleave(keep_top_k=1),
        Sampling(max_new_tokens=4),
    )
    engine, prompts = SpeculativeEngine(pair, 4), [Prompt((2 + at % 50,), prompt_id=at) for at in range(400)]
    mixed, alone = (engine.generate(prompts, each, sampling) for each in (policy, Student()))
    redrawn = [
        ours.prompt
        for ours, own in zip(mixed, alone, strict=True)
        if ours.token_ids == own.token_ids and any(ours.written_by_teacher[:-1])
    ]
    assert redrawn
    engine.generate(redrawn[:1], policy, sampling)
    assert engine.metrics.teacher_forwards == 1


@pytest.mark.parametrize("name", ["switch low", *RULES])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_any_number_of_rows(rows: int, name: str) -> None:
    # Three blocks of 5, the last of them cut short.
    pair, sampling, policy = pair_of("llama", torch.float32), Sampling(max_new_tokens=11), POLICIES[name]
    prompts = [[2 + (row * 7 + at) % 60 for at in range(1 + row * 5 % 13)] for row in range(rows)]
    expected = ReferenceEngine(pair).generate(prompts, policy, sampling, seed=3)
    rollouts = SpeculativeEngine(pair, 5, max_rows=64).generate(prompts, policy, sampling, seed=3)
    assert_same_rollouts(rollouts, expected, pair, policy, sampling, seed=3)
    if rows > 1:
        # Addressed noise: a row alone is the row in the batch.
        alone = SpeculativeEngine(pair, 3).generate([rollouts[-1].prompt], policy, sampling, seed=3)
        assert_same_rollouts(alone, rollouts[-1:], pair, policy, sampling, seed=3)


def test_seed_and_prompt_id_move_the_noise() -> None:
    pair = pair_of("llama", torch.float64)
    engine, sampling = SpeculativeEngine(pair, 4), SAMPLINGS["plain"]
    same, other_seed, other_id = (
        engine.generate([Prompt((5, 6), prompt_id)], Teacher(), sampling, seed)[0].token_ids
        for prompt_id, seed in ((1, 0), (1, 1), (2, 0))
    )
    assert len({same, other_seed, other_id}) == 3


def test_end_of_text_anywhere_in_a_block_and_by_either_writer() -> None:
    # Six ids end a text, so that texts end early and often.
    pair = pair_of("llama", torch.float64, eos_ids=(EOS_ID, 9, 17, 30, 44, 58))
    policy, sampling = Switch(threshold=0.25, decay="constant"), Sampling(max_new_tokens=22)
    prompts = [[2 + row % 60, 7] for row in range(96)]
    expected = ReferenceEngine(pair, max_rows=96).generate(prompts, policy, sampling)
    for block_size in (1, 4, 6):
        rollouts = SpeculativeEngine(pair, block_size).generate(prompts, policy, sampling)
        assert_same_rollouts(rollouts, expected, pair, policy, sampling)
    ended = [rollout for rollout in expected if rollout.finish_reason is FinishReason.END_OF_TEXT]
    assert {len(rollout.token_ids) % 6 for rollout in ended} == set(range(6))
    assert {rollout.written_by_teacher[-1] for rollout in ended} == {True, False}
    # Where the student's probability is far below the teacher's, the end was the teacher's own, not a kept proposal.
    assert any(r.written_by_teacher[-1] and r.student_logp[-1] < r.teacher_logp[-1] - 3 for r in ended)
    for rollout in expected:
        assert not set(rollout.token_ids[:-1]) & set(pair.eos_ids)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 7, 13])
def test_length_need_not_be_a_multiple_of_the_block(max_new_tokens: int) -> None:
    pair, sampling = pair_of("gpt2", torch.float64), Sampling(max_new_tokens=max_new_tokens)
    expected = ReferenceEngine(pair).generate(PROMPTS, POLICIES["switch low"], sampling)
    for block_size in (3, 4, 16):
        rollouts = SpeculativeEngine(pair, block_size).generate(PROMPTS, POLICIES["switch low"], sampling)
        assert_same_rollouts(rollouts, expected, pair, POLICIES["switch low"], sampling)
        assert max(len(rollout.token_ids) for rollout in rollouts) == max_new_tokens


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_may_be_used_up_to_the_last(family: str) -> None:
    # 7 + 12 tokens fill the 19 positions, while drafts of 8 run over them.
    pair = tiny_pair(family, dtype=torch.float64, max_position_embeddings=19)
    sampling = Sampling(max_new_tokens=12)
    # Each way to write: a model alone, by a threshold, by a coin, and by blended laws.
    for policy in (POLICIES[name] for name in ("student", "teacher", "switch low", "mix", "trust region")):
        expected = ReferenceEngine(pair).generate([[3] * 7, [4]], policy, sampling)
        rollouts = SpeculativeEngine(pair, 8).generate([[3] * 7, [4]], policy, sampling)
        assert_same_rollouts(rollouts, expected, pair, policy, sampling)
    with pytest.raises(UserError, match=r"20 tokens, but the student, .* knows 19 positions"):
        SpeculativeEngine(pair, 8).generate([[3] * 8], Student(), sampling)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_for_the_student(size: int) -> None:
    pair = pair_of("llama", torch.float64)
    sampling = Sampling(max_new_tokens=30, temperature=0.8, no_repeat_ngram_size=size)
    expected = ReferenceEngine(pair).generate(PROMPTS[:3], Student(), sampling)
    rollouts = SpeculativeEngine(pair, 6).generate(PROMPTS[:3], Student(), sampling)
    assert_same_rollouts(rollouts, expected, pair, Student(), sampling)
    for rollout in rollouts:
        ids = [*rollout.prompt.token_ids, *rollout.token_ids]
        grams = [tuple(ids[at : at + size]) for at in range(len(rollout.prompt.token_ids), len(ids) - size + 1)]
        assert len(grams) == len(set(grams))


def test_a_padded_vocabulary_is_never_written() -> None:
    # The teacher's head has ten rows that the student does not know.
    student = tiny_model("llama", dtype=torch.float64)
    pair = ModelPair(student, tiny_model("qwen3", vocab=VOCABULARY + 10, seed=4, dtype=torch.float64))
    sampling = Sampling(max_new_tokens=25)
    for policy in (Teacher(), Switch(threshold=0.2)):
        expected = ReferenceEngine(pair).generate(PROMPTS, policy, sampling)
        rollouts = SpeculativeEngine(pair, 4).generate(PROMPTS, policy, sampling)
        assert_same_rollouts(rollouts, expected, pair, policy, sampling)


# ------ at random, and the thorough run


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """The settings of a call: kind of model, engine, policy, sampling, prompts and seed."""
    policy = draw(
        st.one_of(
            st.just(Student()),
            st.just(Teacher()),
            st.builds(
                Switch,
                threshold=st.sampled_from([0.0, 0.05, 0.7]) | st.floats(0.01, 0.6),
                decay=st.sampled_from(["exponential", "linear", "constant"]),
                decay_rate=st.none() | st.floats(0, 0.2),
            ),
            st.builds(AdaSwitch, factor=st.floats(0.5, 2), window=st.integers(1, 10)),
            st.builds(Interleave, keep_top_k=st.sampled_from([1, 2, 5, 25, 100])),
            st.builds(TrustRegionBlend, budget=st.sampled_from([0.0, 0.1, 50.0]) | st.floats(0, 2)),
            *(st.builds(each, teacher_share=st.floats(0, 1)) for each in (Mix, Early, Late)),
        )
    )
    sampling = Sampling(
        max_new_tokens=draw(st.integers(1, 24)),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5])),
        top_k=draw(st.sampled_from([0, 1, 2, 10])),
    )
    prompts = draw(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), min_size=1, max_size=8))
    return {
        "kind": draw(st.sampled_from(list(KINDS))),
        "eos_ids": draw(st.sampled_from([(EOS_ID,), (EOS_ID, 9, 17, 30)])),
        "block_size": draw(st.integers(1, 16) | st.just("auto")),
        "max_rows": draw(st.integers(1, 8)),
        "keep_teacher": draw(st.sampled_from([None, "hidden"])),
        "policy": policy,
        "sampling": sampling,
        "prompts": prompts,
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


def check_call_equals_reference(call: dict[str, Any]) -> None:
    pair = pair_of(call["kind"], torch.float64, call["eos_ids"])
    arguments = (call["prompts"], call["policy"], call["sampling"], call["seed"], call["keep_teacher"])
    engine = SpeculativeEngine(pair, call["block_size"], call["max_rows"])
    rollouts = engine.generate(*arguments)
    expected = reference_of(pair, call["kind"]).generate(*arguments)
    assert_same_rollouts(rollouts, expected, pair, call["policy"], call["sampling"], call["seed"])
    for ours, theirs in zip(rollouts, expected, strict=True):
        if call["keep_teacher"]:
            # Roundings of a few float64 layers with weights scaled up, and of eager's float32 softmax.
            tolerance = 1e-5 if call["kind"].endswith("eager") else 1e-9
            torch.testing.assert_close(ours.teacher_hidden, theirs.teacher_hidden, atol=tolerance, rtol=tolerance)
    assert engine.metrics.tokens == sum(len(rollout.token_ids) for rollout in rollouts)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_any_call_equals_the_reference_engine(call: dict[str, Any]) -> None:
    check_call_equals_reference(call)


@pytest.mark.slow
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_five_hundred_calls_equal_the_reference_engine(call: dict[str, Any]) -> None:
    check_call_equals_reference(call)


# ------ rows come and go


# Only here do rows of unequal lengths that have not switched yet meet under adaswitch.
@pytest.mark.parametrize("name", ["switch low", "adaswitch"])
@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_waiting_prompts_take_the_place_of_finished_rows(max_rows: int, name: str) -> None:
    pair = pair_of("llama", torch.float64, eos_ids=(EOS_ID, 9, 17, 30, 44, 58))
    assert pair.teacher is not None
    policy, sampling = POLICIES[name], Sampling(max_new_tokens=24)
    # One row at a time takes a step for each token, and fewer prompts show it.
    count = 25 if max_rows > 1 else 8
    prompts = [[2 + row % 50, *range(3, 3 + row * 3 % 11)] for row in range(count)]
    expected = ReferenceEngine(pair).generate(prompts, policy, sampling)
    engine = SpeculativeEngine(pair, 4, max_rows)
    told: list[int] = []
    with forwards_of(pair.student) as student, forwards_of(pair.teacher) as teacher:
        rollouts = engine.generate(prompts, policy, sampling, on_progress=told.append)
    assert_same_rollouts(rollouts, expected, pair, policy, sampling)
    assert max(rows for rows, _ in student + teacher) == max_rows
    assert told == sorted(told)
    assert told[-1] == len(prompts)
    # Rows do not wait for the longest of their batch: there are far fewer steps than in batches that last as long as it.
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    steps = sum(1 for _, positions in student if positions == 1)
    if max_rows > 1:
        in_batches = sum(max(lengths[at : at + max_rows]) for at in range(0, len(lengths), max_rows))
        assert sum(lengths) / max_rows <= steps
        assert steps * engine.metrics.acceptance < in_batches


def test_finished_rows_cost_nothing_more() -> None:
    pair = pair_of("llama", torch.float64, eos_ids=(EOS_ID, 9, 17, 30, 44, 58))
    engine = SpeculativeEngine(pair, 1, max_rows=16)
    prompts = [[2 + row] for row in range(16)]
    with forwards_of(pair.student) as shapes:
        rollouts = engine.generate(prompts, Student(), Sampling(max_new_tokens=24))
    # Blocks of one: the rows of each forward are those that still write.
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    assert [rows for rows, _ in shapes] == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert min(lengths) < max(lengths)


@pytest.mark.parametrize("policy", ["student", "switch low"])
def test_samples_of_one_prompt_share_its_prefill(policy: str) -> None:
    pair = pair_of("llama", torch.float64)
    assert pair.teacher is not None
    ids = tuple(range(3, 33))
    prompts = [Prompt(ids, prompt_id=0, sample_id=sample) for sample in range(6)] + [Prompt(ids[:9], prompt_id=1)]
    engine = SpeculativeEngine(pair, 4)
    with forwards_of(pair.student) as student, forwards_of(pair.teacher) as teacher:
        rollouts = engine.generate(prompts, POLICIES[policy], SAMPLINGS["plain"])
    assert student[0] == (2, len(ids) - 1)  # two different prompts, all but their last token
    assert [shape for shape in student if shape[1] > 1] == student[:1]
    assert [shape for shape in teacher if shape[1] > 4] == ([] if policy == "student" else [(2, len(ids) - 1)])
    assert len({rollout.token_ids for rollout in rollouts[:6]}) == 6
    expected = ReferenceEngine(pair).generate(prompts, POLICIES[policy], SAMPLINGS["plain"])
    assert_same_rollouts(rollouts, expected, pair, POLICIES[policy], SAMPLINGS["plain"])


def test_samples_that_arrive_later_share_the_prefill_of_those_in_flight() -> None:
    pair = pair_of("llama", torch.float64, eos_ids=(EOS_ID, 9, 17, 30, 44, 58))
    prompts = [Prompt(tuple(range(3, 33)), prompt_id=0, sample_id=sample) for sample in range(48)]
    engine = SpeculativeEngine(pair, 4, max_rows=12)
    with forwards_of(pair.student) as student:
        rollouts = engine.generate(prompts, Student(), SAMPLINGS["plain"])
    assert [shape for shape in student if shape[1] > 1] == [(1, 29)]
    expected = ReferenceEngine(pair).generate(prompts, Student(), SAMPLINGS["plain"])
    assert_same_rollouts(rollouts, expected, pair, Student(), SAMPLINGS["plain"])


def test_results_keep_the_order_of_the_prompts() -> None:
    pair = pair_of("llama", torch.float64)
    prompts = [Prompt(tuple(range(2, 2 + length)), prompt_id=length) for length in (3, 9, 1, 9, 20, 2)]
    prompts[3] = replace(prompts[3], sample_id=1)
    rollouts = SpeculativeEngine(pair, 3, max_rows=2).generate(prompts, Teacher(), SAMPLINGS["plain"])
    assert [rollout.prompt for rollout in rollouts] == prompts
    assert SpeculativeEngine(pair).generate([], Teacher()) == []


# ------ the teacher: when it runs, and what is kept of it


def test_the_student_alone_needs_no_teacher() -> None:
    pair = pair_of("llama", torch.float64)
    assert pair.teacher is not None
    alone = ModelPair(pair.student)
    engine = SpeculativeEngine(pair, 4)
    with forwards_of(pair.teacher) as shapes:
        with_teacher = engine.generate(PROMPTS, Student(), SAMPLINGS["plain"])
    without = SpeculativeEngine(alone, 4).generate(PROMPTS, Student(), SAMPLINGS["plain"])
    assert shapes == []
    assert_same_rollouts(without, with_teacher, pair, Student(), SAMPLINGS["plain"])
    for call in ({"policy": Teacher()}, {"policy": Student(), "keep_teacher": "hidden"}):
        with pytest.raises(UserError, match=r"has none|has no teacher"):
            SpeculativeEngine(alone).generate(PROMPTS, **call)


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("student", torch.float32),
        ("teacher", torch.float32),
        # In float64 the bound is far tighter.
        ("switch low", torch.float64),
        pytest.param("student", torch.float64, marks=pytest.mark.slow),
        pytest.param("teacher", torch.float64, marks=pytest.mark.slow),
        pytest.param("switch low", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "mistral", "gemma2 eager", "gemma3"])
def test_what_is_kept_of_the_teacher_is_a_fresh_forward(kind: str, policy: str, dtype: torch.dtype) -> None:
    pair = pair_of(kind, dtype)
    assert pair.teacher is not None
    engine = SpeculativeEngine(pair, 5, max_rows=4)
    rollouts = engine.generate(PROMPTS, POLICIES[policy], SAMPLINGS["plain"], keep_teacher="hidden")
    assert engine.metrics.teacher_forwards > 0
    for rollout in rollouts:
        prompt, response = rollout.prompt.token_ids, rollout.token_ids
        with torch.no_grad():
            fresh = backbone(pair.teacher)(torch.tensor([[*prompt, *response]]), use_cache=False).last_hidden_state
            expected = fresh[0, len(prompt) - 1 : -1]
            logits = pair.teacher(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        kept = rollout.teacher_hidden
        assert kept is not None
        assert kept.dtype == dtype
        assert kept.shape == (len(response), expected.shape[-1])
        # The requirement is 1e-4 relative; float64 has only its roundings, and those of eager's float32 softmax.
        relative = 1e-4 if dtype == torch.float32 else 1e-6 if kind.endswith("eager") else 1e-11
        assert float((kept - expected).norm() / expected.norm()) < relative
        assert not any(map(torch.isnan, torch.tensor(rollout.divergence)))
        logp = logits.double().log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(torch.tensor(rollout.teacher_logp).double(), logp, atol=1e-3, rtol=1e-3)


def test_keeping_changes_no_token() -> None:
    pair = pair_of("qwen2", torch.float64)
    for policy in (Student(), POLICIES["switch low"]):
        plain, kept = (
            SpeculativeEngine(pair, 4).generate(PROMPTS, policy, SAMPLINGS["plain"], keep_teacher=keep)
            for keep in (None, "hidden")
        )
        assert [rollout.token_ids for rollout in plain] == [rollout.token_ids for rollout in kept]
        assert all(rollout.teacher_hidden is None for rollout in plain)


@pytest.mark.parametrize("block_size", [1, "auto"])
@pytest.mark.parametrize("policy", POLICIES)
def test_metrics_are_consistent(policy: str, block_size: int | Literal["auto"]) -> None:
    pair = pair_of("llama", torch.float64)
    assert pair.teacher is not None
    engine = SpeculativeEngine(pair, block_size, max_rows=3)
    with forwards_of(pair.student) as student, forwards_of(pair.teacher) as teacher:
        rollouts = engine.generate(PROMPTS, POLICIES[policy], Sampling(max_new_tokens=9))
    metrics = engine.metrics
    assert metrics.tokens == sum(len(rollout.token_ids) for rollout in rollouts)
    assert metrics.drafted >= metrics.tokens
    assert metrics.acceptance == metrics.tokens / metrics.drafted
    assert (metrics.student_forwards, metrics.teacher_forwards) == (len(student), len(teacher))
    assert metrics.teacher_forwards <= metrics.tokens
    assert (metrics.teacher_forwards == 0) == (policy == "student")
    assert all(seconds >= 0 for seconds in metrics.seconds.values())
    if block_size == 1:
        assert metrics.drafted == metrics.tokens
    # A second call starts its own count.
    engine.generate(PROMPTS[:1], Student(), Sampling(max_new_tokens=2))
    assert metrics is not engine.metrics
    assert engine.metrics.tokens <= 2


# ------ models as found, models refused


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_mode_and_gradient_checkpointing_are_left_as_found() -> None:
    pair = tiny_pair("llama")
    assert pair.teacher is not None
    expected = SpeculativeEngine(pair, 4).generate(PROMPTS, POLICIES["switch low"], SAMPLINGS["plain"])
    pair.student.train()
    pair.student.get_decoder().layers[0].eval()  # a frozen layer, as a recipe may keep it
    pair.student.gradient_checkpointing_enable()
    before = [module.training for module in pair.student.modules()]
    for engine in (SpeculativeEngine(pair, 4), ReferenceEngine(pair)):
        rollouts = engine.generate(PROMPTS, POLICIES["switch low"], SAMPLINGS["plain"])
        assert_same_rollouts(rollouts, expected, pair, POLICIES["switch low"], SAMPLINGS["plain"])
        assert [module.training for module in pair.student.modules()] == before
        assert pair.student.is_gradient_checkpointing
        assert not pair.teacher.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pair.student.parameters())
    with pytest.raises(UserError):
        SpeculativeEngine(pair).generate([[]], Student())
    assert [module.training for module in pair.student.modules()] == before


def test_a_recurrent_state_is_served_by_the_reference_engine() -> None:
    pair = tiny_pair("falcon_h1")
    assert pair.teacher is not None
    with pytest.warns(UserWarning, match="one token at a time: the student cannot draft blocks, since") as warned:
        engine = SpeculativeEngine(pair, 4)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    sampling = Sampling(max_new_tokens=6)
    rollouts = engine.generate(PROMPTS, Teacher(), sampling)
    expected = ReferenceEngine(pair).generate(PROMPTS, Teacher(), sampling)
    assert_same_rollouts(rollouts, expected, pair, Teacher(), sampling)
    # The oracle's own cache has to hold for such a model: its numbers are those of a fresh forward.
    for rollout in rollouts:
        ids = [*rollout.prompt.token_ids, *rollout.token_ids]
        with torch.no_grad():
            logp = pair.teacher(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1)[0]
        fresh = [float(logp[at - 1, ids[at]]) for at in range(len(rollout.prompt.token_ids), len(ids))]
        # float32: see assert_same_rollouts.
        assert rollout.teacher_logp == pytest.approx(fresh, abs=1e-3)


@pytest.mark.parametrize("engine", [SpeculativeEngine, ReferenceEngine])
def test_models_that_no_engine_can_run_are_refused(engine: type[SpeculativeEngine | ReferenceEngine]) -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    # Mamba ignores such a cache, or does not go on from it, so it would see only the last token of a text.
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(UserError, match="student, T5ForConditionalGeneration, is an encoder-decoder"):
        engine(ModelPair(t5))
    with pytest.raises(UserError, match="teacher, MambaForCausalLM, reads no cache of keys and values"):
        engine(ModelPair(tiny_model("llama"), mamba))


@pytest.mark.parametrize(("setting", "value"), [("block_size", 0), ("block_size", -3), ("max_rows", 0)])
def test_sizes_below_one_are_refused(setting: str, value: int, llama_pair: ModelPair) -> None:
    with pytest.raises(UserError, match=f"{setting} is {value}"):
        SpeculativeEngine(llama_pair, **{setting: value})


# ------ the checks themselves


def test_the_comparison_sees_each_kind_of_difference() -> None:
    pair, sampling = pair_of("llama", torch.float32), SAMPLINGS["plain"]
    rollouts = oracle("llama", "teacher", "plain", torch.float32)
    good = rollouts[0]
    other_token = tuple((token + 1) % VOCABULARY for token in good.token_ids)
    for wrong in (
        replace(good, token_ids=other_token),
        replace(good, written_by_teacher=tuple(not each for each in good.written_by_teacher)),
        replace(good, divergence=tuple(value + 3e-5 for value in good.divergence)),
        replace(good, teacher_logp=tuple(value + 1e-2 for value in good.teacher_logp)),
        replace(good, law_logp=tuple(value + 1e-2 for value in good.law_logp)),
        replace(good, teacher_part=tuple(value - 1e-3 for value in good.teacher_part)),
        replace(good, token_ids=good.token_ids[:-1], written_by_teacher=good.written_by_teacher[:-1]),
    ):
        with pytest.raises(AssertionError):
            assert_same_rollouts([wrong, *rollouts[1:]], rollouts, pair, Teacher(), sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_margin_is_that_of_the_nearest_decision(sampling: str) -> None:
    # A threshold at a position's divergence makes that position a tie, and no other.
    pair = pair_of("llama", torch.float64)
    rollout = oracle("llama", "teacher", sampling, torch.float64)[0]
    policy = Switch(threshold=rollout.divergence[3] + 1e-7, decay="constant")
    margins = [tie_margin(pair, rollout, at, policy, SAMPLINGS[sampling], 0) for at in range(len(rollout.token_ids))]
    assert margins[3] == pytest.approx(1e-7, rel=1e-3)
    assert min(margins[:3] + margins[4:]) > 1e-5


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("blend", [Mix, TrustRegionBlend])
def test_the_margin_of_a_blend_vanishes_where_its_setting_turns_a_decision(
    blend: type[Mix | TrustRegionBlend], greedy: bool
) -> None:
    """Between settings that write otherwise there is one, found by halving, at which it is a tie."""
    pair, sampling = pair_of("llama", torch.float64), Sampling(max_new_tokens=1, temperature=0.0 if greedy else 1.0)
    engine = ReferenceEngine(pair)
    prompts = [Prompt((2 + at % 50, 7), prompt_id=at) for at in range(40)]
    ends = (engine.generate(prompts, blend(setting), sampling) for setting in (0.05, 0.95))
    wrote = ([(rollout.token_ids, rollout.written_by_teacher) for rollout in rollouts] for rollouts in ends)
    turned = [(prompt, first) for prompt, first, last in zip(prompts, *wrote, strict=True) if first != last]
    assert len(turned) > 1
    for prompt, first in turned[:2]:
        low, high = 0.05, 0.95
        for _ in range(24):
            middle = (low + high) / 2
            (rollout,) = engine.generate([prompt], blend(middle), sampling)
            same = (rollout.token_ids, rollout.written_by_teacher) == first
            low, high = (middle, high) if same else (low, middle)
        at_the_turn, away = (tie_margin(pair, rollout, 0, blend(each), sampling, 0) for each in (high, high / 2))
        # The setting is found to 1e-7, and moves a logarithm by at most some ten times as much.
        assert at_the_turn < 1e-6
        assert away > TIE


def test_a_policy_sees_the_place_in_the_response_that_was_begun() -> None:
    """Late and SWITCH go by the place in the response, of which a part was there."""
    pair, sampling = tiny_pair("llama", noise=0.6), Sampling(max_new_tokens=16)
    begun, alone = Prompt((5, 6, 7, 8, 9, 10), 0, begun=6), Prompt((5, 6, 7, 8, 9, 10), 0)
    for engine in (ReferenceEngine(pair), SpeculativeEngine(pair, 4)):
        (late,) = engine.generate([begun], Late(0.25), sampling)
        assert late.written_by_teacher == tuple(at + 6 >= 12 for at in range(len(late.token_ids)))
        thresholds = [engine.generate([prompt], Switch(0.3), sampling)[0].threshold for prompt in (begun, alone)]
        assert thresholds[0][0] == pytest.approx(thresholds[1][6], rel=1e-6)
