"""The oracle: its law against exact enumeration, its numbers against fresh forwards, and its batching against none.

A fresh forward runs one sequence without cache and without padding.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from draws import by_writer
from reference.divergences import jensen_shannon
from reference.policies import adaswitch, law_of, teacher_part
from reference.sampling import repeats_an_ngram, shaped
from reference.sequence_law import sequence_law
from switchkd.errors import UserError
from switchkd.models.heads import backbone
from switchkd.models.pair import ModelPair
from switchkd.records import FinishReason, Prompt, Rollout, Sampling
from switchkd.rollout.blends import Interleave, Mix, TrustRegionBlend
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import AdaSwitch, Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import EOS_ID, tiny_model, tiny_pair

FAMILIES = ("llama", "gpt2", "opt")
# Unequal lengths: padding on the left of three of four rows.
PROMPTS = ([5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9], [20, 21])
POLICIES: dict[str, Policy] = {
    "student": Student(),
    "teacher": Teacher(),
    "switch": Switch(threshold=0.3, decay_rate=0.02),
}


@pytest.fixture(scope="module", params=FAMILIES)
def exact_pair(request: pytest.FixtureRequest) -> ModelPair:
    """In float64, where batching and caching leave only a few roundings. Eight ids end a text, so that many texts end."""
    pair = tiny_pair(request.param, dtype=torch.float64)
    pair.student.generation_config.eos_token_id = list(range(EOS_ID, EOS_ID + 8))
    return pair


def logits_after(model: Any, token_ids: Sequence[int]) -> Tensor:
    """The logits (T, V) at every position of one sequence, fresh."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits
    return logits[0]


def same(first: Rollout, second: Rollout) -> bool:
    """Equal tokens, writers and reasons; numbers to rounding."""
    measured = ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part")
    plain = dict.fromkeys(measured, ()) | {"teacher_hidden": None}
    if dataclasses.replace(first, **plain) != dataclasses.replace(second, **plain):
        return False
    pairs = ((getattr(first, name), getattr(second, name)) for name in measured)
    # float64 through two layers with weights scaled by 20.
    return all(a == pytest.approx(b, rel=1e-9, abs=1e-9, nan_ok=True) for a, b in pairs)


# ------ the exact law

# The chance that a correct engine fails; under this fixed seed the result never changes.
ALPHA = 1e-3
ROLLOUTS = 4000
SHORT = Sampling(max_new_tokens=3)


# The writers that must occur in the enumeration, for policies under which the prefix alone decides who writes.
WRITERS: dict[type[Policy], set[bool]] = {
    Student: {False},
    Teacher: {True},
    Switch: {True, False},
    AdaSwitch: {True, False},
    Mix: set(),
    Interleave: set(),
    TrustRegionBlend: set(),
}


@pytest.fixture(scope="module")
def five_token_pair() -> ModelPair:
    return tiny_pair("llama", vocab=5, hidden=16, layers=1, scale=8.0, noise=1.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("policy", "sampling"),
    [
        (Student(), SHORT),
        (Teacher(), SHORT),
        (Switch(threshold=0.2, decay_rate=0.3), SHORT),
        (Switch(threshold=0.1, decay="constant"), Sampling(max_new_tokens=4, temperature=1.5, top_k=4, top_p=0.9)),
        (Teacher(), Sampling(max_new_tokens=3, temperature=0.7, top_p=0.8)),
        (Mix(0.4), SHORT),
        (Interleave(keep_top_k=2), SHORT),
        (Interleave(keep_top_k=2), Sampling(max_new_tokens=3, temperature=1.5, top_p=0.8)),
        (TrustRegionBlend(0.3), SHORT),
        # Here the models keep different ids: after some prefixes the budget pays for the loss of the student's, after some not.
        (TrustRegionBlend(0.3), Sampling(max_new_tokens=3, temperature=1.5, top_p=0.9)),
        (AdaSwitch(factor=1.1, window=1), Sampling(max_new_tokens=4, temperature=1.5, top_k=4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else f"{value.temperature} {value.top_p}",
)
def test_responses_follow_the_exact_law(policy: Policy, sampling: Sampling, five_token_pair: ModelPair) -> None:
    pair, prompt = five_token_pair, (2, 3)
    wrote: set[bool] = set()

    @cache
    def distributions(response: tuple[int, ...]) -> tuple[list[float], list[float]]:
        student, teacher = (
            shaped(
                logits_after(model, prompt + response)[-1].tolist(),
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
            )
            for model in (pair.student, pair.teacher)
        )
        return student, teacher

    def token_law(response: tuple[int, ...]) -> list[float]:
        student, teacher = distributions(response)
        match policy:
            case Mix() | Interleave() | TrustRegionBlend():
                return law_of(by_writer(policy, student, teacher))
            case Switch():
                rate = policy.decay_rate if policy.decay == "exponential" else 0
                by_teacher = jensen_shannon(student, teacher) > policy.threshold * math.exp(-rate * len(response))
            case AdaSwitch():
                prefixes = [response[:length] for length in range(len(response) + 1)]
                divergences = [jensen_shannon(*distributions(prefix)) for prefix in prefixes]
                by_teacher = adaswitch(divergences, policy.factor, policy.window)[0][-1]
            case _:
                by_teacher = isinstance(policy, Teacher)
        wrote.add(by_teacher)
        return teacher if by_teacher else student

    law = sequence_law(token_law, pair.eos_ids, sampling.max_new_tokens)
    assert sum(law.values()) == pytest.approx(1)
    assert wrote == WRITERS[type(policy)]
    prompts = [Prompt(prompt, prompt_id=0, sample_id=sample) for sample in range(ROLLOUTS)]
    rollouts = ReferenceEngine(pair, max_rows=ROLLOUTS).generate(prompts, policy, sampling, seed=1)
    counts = dict.fromkeys(law, 0)
    for rollout in rollouts:
        counts[rollout.token_ids] += 1  # A response that the law excludes is a KeyError.
    # The chi-square approximation needs about 5 in a bin: the rest share one.
    large = [response for response, probability in law.items() if probability * ROLLOUTS >= 5]
    assert len(large) > 10
    observed, expected = [counts[response] for response in large], [law[response] * ROLLOUTS for response in large]
    rest = ROLLOUTS - sum(expected)
    if rest > 1e-6:
        observed.append(ROLLOUTS - sum(observed))
        expected.append(rest)
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > ALPHA


# ------ against fresh, whole forwards


@pytest.mark.parametrize(
    "sampling", [Sampling(24), Sampling(24, temperature=0.7, top_p=0.9, top_k=20), Sampling(24, 0)]
)
@pytest.mark.parametrize("policy", ["teacher", "switch"])
def test_what_is_recorded_is_what_a_forward_over_the_whole_text_says(
    exact_pair: ModelPair, policy: str, sampling: Sampling
) -> None:
    writer = POLICIES[policy]
    rollouts = ReferenceEngine(exact_pair).generate(PROMPTS, writer, sampling, seed=3, keep_teacher="hidden")
    for rollout in rollouts:
        text = [*rollout.prompt.token_ids, *rollout.token_ids]
        predicting = slice(len(rollout.prompt.token_ids) - 1, -1)
        student, teacher = (logits_after(model, text)[predicting] for model in (exact_pair.student, exact_pair.teacher))
        with torch.no_grad():
            states = backbone(exact_pair.teacher)(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(rollout.teacher_hidden, states[predicting], rtol=1e-8, atol=1e-8)  # as in `same`
        for at, token in enumerate(rollout.token_ids):
            settings = (sampling.temperature, sampling.top_k, sampling.top_p)
            p_student, p_teacher = (shaped(logits[at].tolist(), *settings) for logits in (student, teacher))
            divergence = jensen_shannon(p_student, p_teacher)
            assert rollout.divergence[at] == pytest.approx(divergence, rel=1e-7, abs=1e-9)
            assert math.exp(rollout.student_logp[at]) == pytest.approx(p_student[token], rel=1e-7, abs=1e-12)
            assert math.exp(rollout.teacher_logp[at]) == pytest.approx(p_teacher[token], rel=1e-7, abs=1e-12)
            if policy == "teacher":
                assert rollout.written_by_teacher[at]
                assert math.isnan(rollout.threshold[at])
            else:
                assert rollout.threshold[at] == pytest.approx(0.3 * math.exp(-0.02 * at))
                assert rollout.written_by_teacher[at] == (rollout.divergence[at] > rollout.threshold[at])
            writes = p_teacher if rollout.written_by_teacher[at] else p_student
            assert writes[token] > 0
            # One model's law: its own numbers, and no doubt about the writer.
            by_teacher = rollout.written_by_teacher[at]
            assert rollout.law_logp[at] == (rollout.teacher_logp if by_teacher else rollout.student_logp)[at]
            assert rollout.teacher_part[at] == by_teacher
            if sampling.greedy:
                assert writes[token] == max(writes)
    if policy == "switch":
        written = [by_teacher for rollout in rollouts for by_teacher in rollout.written_by_teacher]
        assert 0 < sum(written) < len(written)


@pytest.mark.parametrize(
    "sampling", [Sampling(24), Sampling(24, temperature=1.5, top_p=0.95, top_k=20)], ids=["plain", "shaped"]
)
@pytest.mark.parametrize(
    "policy", [Mix(0.4), Interleave(3), TrustRegionBlend(0.5)], ids=lambda each: type(each).__name__
)
def test_what_is_recorded_of_a_blend_is_what_its_definition_says(
    exact_pair: ModelPair, policy: Policy, sampling: Sampling
) -> None:
    wrote: set[bool] = set()
    for rollout in ReferenceEngine(exact_pair).generate(PROMPTS, policy, sampling, seed=3):
        text = [*rollout.prompt.token_ids, *rollout.token_ids]
        predicting = slice(len(rollout.prompt.token_ids) - 1, -1)
        student, teacher = (logits_after(model, text)[predicting] for model in (exact_pair.student, exact_pair.teacher))
        for at, token in enumerate(rollout.token_ids):
            settings = (sampling.temperature, sampling.top_k, sampling.top_p)
            joint = by_writer(policy, *(shaped(logits[at].tolist(), *settings) for logits in (student, teacher)))
            # float64 through the layers, as in `same`. Of a searched exponent, 1e-6 times log-ratios of up to some 50.
            tolerance = 1e-4 if isinstance(policy, TrustRegionBlend) else 1e-7
            law, part = law_of(joint)[token], teacher_part(joint)[token]
            assert rollout.law_logp[at] == pytest.approx(math.log(law), rel=tolerance, abs=tolerance)
            assert rollout.teacher_part[at] == pytest.approx(part, abs=tolerance)
            assert joint[rollout.written_by_teacher[at]][token] > 0
        wrote |= set(rollout.written_by_teacher)
        assert math.isnan(rollout.threshold[0])
        assert rollout.teacher_share == pytest.approx(sum(rollout.teacher_part) / len(rollout.token_ids))
    assert wrote == {True, False}


def test_the_student_alone_records_nan_where_no_teacher_ran(exact_pair: ModelPair) -> None:
    alone = ModelPair(exact_pair.student)
    rollout = ReferenceEngine(alone).generate([[5, 6]], Student(), Sampling(9), seed=1)[0]
    assert all(map(math.isnan, (*rollout.divergence, *rollout.threshold, *rollout.teacher_logp)))
    assert not any(rollout.written_by_teacher)
    assert rollout.teacher_part == (0,) * len(rollout.token_ids)
    assert rollout.teacher_share == 0
    assert rollout.law_logp == rollout.student_logp
    text = [5, 6, *rollout.token_ids]
    logp = torch.log_softmax(logits_after(exact_pair.student, text), dim=-1)[1:-1]
    assert rollout.student_logp == pytest.approx(logp[range(len(rollout.token_ids)), list(rollout.token_ids)].tolist())
    with_teacher = ReferenceEngine(exact_pair).generate([[5, 6]], Student(), Sampling(9), seed=1)[0]
    assert with_teacher.token_ids == rollout.token_ids


def test_a_threshold_above_ln_2_is_the_student_and_one_of_0_the_teacher(exact_pair: ModelPair) -> None:
    engine = ReferenceEngine(exact_pair)

    def tokens(policy: Policy) -> list[tuple[int, ...]]:
        return [rollout.token_ids for rollout in engine.generate(PROMPTS, policy, Sampling(12), seed=2)]

    assert tokens(Switch(threshold=0.7, decay="constant")) == tokens(Student())
    assert tokens(Switch(threshold=0)) == tokens(Teacher())
    assert tokens(Student()) != tokens(Teacher())


# ------ batching and address


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, temperature=0)], ids=["sampled", "greedy"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(exact_pair: ModelPair, policy: str, sampling: Sampling) -> None:
    prompts = [Prompt(tuple(ids), prompt_id=10 + index) for index, ids in enumerate(PROMPTS)]
    together = ReferenceEngine(exact_pair).generate(prompts, POLICIES[policy], sampling, seed=5)
    by_two = ReferenceEngine(exact_pair, max_rows=2).generate(prompts, POLICIES[policy], sampling, seed=5)
    assert len({len(rollout.token_ids) for rollout in together}) > 1 or sampling.greedy
    for prompt, rollout, other in zip(prompts, together, by_two, strict=True):
        (alone,) = ReferenceEngine(exact_pair).generate([prompt], POLICIES[policy], sampling, seed=5)
        assert same(rollout, alone)
        assert same(other, alone)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "cohere", "granite"])
def test_long_unequal_prompts_equal_one_by_one_in_every_family(family: str) -> None:
    """Longer than the sliding windows of 16. Not Gemma 2: its only attention turns padding into NaN in float64."""
    pair = tiny_pair(family, dtype=torch.float64)
    prompts = [Prompt(tuple(range(2, 2 + length)), prompt_id=length) for length in (3, 25, 14)]
    together = ReferenceEngine(pair).generate(prompts, Switch(threshold=0.2), Sampling(12), seed=0)
    for prompt, rollout in zip(prompts, together, strict=True):
        (alone,) = ReferenceEngine(pair).generate([prompt], Switch(threshold=0.2), Sampling(12), seed=0)
        assert same(rollout, alone)
        text = [*prompt.token_ids, *rollout.token_ids]
        logp = torch.log_softmax(logits_after(pair.student, text), dim=-1)[len(prompt.token_ids) - 1 : -1]
        fresh = logp[range(len(rollout.token_ids)), list(rollout.token_ids)].tolist()
        assert rollout.student_logp == pytest.approx(fresh, rel=1e-7, abs=1e-9)


def test_the_address_and_not_the_place_in_the_batch_names_the_noise(exact_pair: ModelPair) -> None:
    prompts = [
        Prompt(tuple(PROMPTS[index]), prompt_id=index, sample_id=sample) for index in range(4) for sample in (0, 1)
    ]
    engine, switch = ReferenceEngine(exact_pair), POLICIES["switch"]
    forward = engine.generate(prompts, switch, Sampling(12), seed=4)
    backward = engine.generate(prompts[::-1], switch, Sampling(12), seed=4)[::-1]
    assert [rollout.prompt for rollout in forward] == prompts
    assert all(map(same, forward, backward))
    texts = [rollout.token_ids for rollout in forward]
    assert texts[::2] != texts[1::2]
    other_ids = [dataclasses.replace(prompt, prompt_id=prompt.prompt_id + 50) for prompt in prompts]
    for others, seed in ((prompts, 5), (other_ids, 4)):
        assert [rollout.token_ids for rollout in engine.generate(others, switch, Sampling(12), seed=seed)] != texts


def test_plain_prompts_are_numbered_by_position(exact_pair: ModelPair) -> None:
    engine = ReferenceEngine(exact_pair)
    plain = engine.generate(PROMPTS, Student(), Sampling(8), seed=4)
    named = [Prompt(tuple(ids), prompt_id=index) for index, ids in enumerate(PROMPTS)]
    assert all(map(same, plain, engine.generate(named, Student(), Sampling(8), seed=4)))
    assert [rollout.prompt for rollout in plain] == named


def test_a_longer_limit_only_adds_tokens(exact_pair: ModelPair) -> None:
    switch = Switch(threshold=0.3, decay_rate=0.02)
    short, long = (ReferenceEngine(exact_pair).generate(PROMPTS, switch, Sampling(n), seed=4) for n in (5, 15))
    for first, second in zip(short, long, strict=True):
        assert second.token_ids[: len(first.token_ids)] == first.token_ids


# ------ the end


def test_rows_end_at_their_own_end_of_text_or_at_the_limit(exact_pair: ModelPair) -> None:
    prompts = [Prompt((5, 9), prompt_id=index) for index in range(60)]
    rollouts = ReferenceEngine(exact_pair).generate(prompts, Student(), Sampling(20), seed=0)
    reasons = {rollout.finish_reason for rollout in rollouts}
    assert reasons == set(FinishReason)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 3
    for rollout in rollouts:
        assert not set(rollout.token_ids[:-1]) & set(exact_pair.eos_ids)
        ended = rollout.token_ids[-1] in exact_pair.eos_ids
        assert ended == (rollout.finish_reason is FinishReason.END_OF_TEXT)
        assert ended or len(rollout.token_ids) == 20
        per_token = ("written_by_teacher", "divergence", "threshold", "law_logp", "teacher_part")
        lengths = {len(getattr(rollout, field)) for field in per_token}
        assert lengths == {len(rollout.token_ids)}


def test_any_of_several_end_of_text_ids_ends_a_row(exact_pair: ModelPair) -> None:
    assert len(exact_pair.eos_ids) == 8
    prompts = [Prompt((5, 9), prompt_id=index) for index in range(60)]
    rollouts = ReferenceEngine(exact_pair).generate(prompts, Student(), Sampling(20), seed=0)
    last = {rollout.token_ids[-1] for rollout in rollouts if rollout.finish_reason is FinishReason.END_OF_TEXT}
    assert len(last) > 1


def test_an_end_of_text_at_the_last_position_is_an_end_of_text(exact_pair: ModelPair) -> None:
    long = ReferenceEngine(exact_pair).generate([[5, 9]] * 60, Student(), Sampling(20), seed=0)
    ended = next(r for r in long if r.finish_reason is FinishReason.END_OF_TEXT)
    limit = Sampling(len(ended.token_ids))
    (again,) = ReferenceEngine(exact_pair).generate([ended.prompt], Student(), limit, seed=0)
    assert again.finish_reason is FinishReason.END_OF_TEXT


def test_a_prompt_may_hold_end_of_text_and_pad_ids(exact_pair: ModelPair) -> None:
    """Padding is marked by length: the pad token's id inside a prompt is read like any other."""
    prompts = [Prompt((0, EOS_ID, 5, 0), prompt_id=1), Prompt(tuple(range(2, 12)), prompt_id=2)]
    together = ReferenceEngine(exact_pair).generate(prompts, POLICIES["switch"], Sampling(8), seed=0)
    (alone,) = ReferenceEngine(exact_pair).generate(prompts[:1], POLICIES["switch"], Sampling(8), seed=0)
    assert same(together[0], alone)


def test_one_token_and_no_prompt_at_all(exact_pair: ModelPair) -> None:
    (rollout,) = ReferenceEngine(exact_pair).generate([[4]], Teacher(), Sampling(1), seed=0)
    assert len(rollout.token_ids) == 1
    assert rollout.teacher_share == 1
    assert ReferenceEngine(exact_pair).generate([], Student(), Sampling(1)) == []


# ------ vocabulary, n-grams


def test_the_surplus_rows_of_a_padded_teacher_are_never_written_nor_compared() -> None:
    """The same model padded by rows that would win: no divergence, and none of them is drawn."""
    student = tiny_model("llama", dtype=torch.float64)
    teacher = copy.deepcopy(student)
    teacher.resize_token_embeddings(72, mean_resizing=False)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[64:] = 50.0
    pair = ModelPair(student, teacher)
    assert pair.vocabulary_size == 64
    for rollout in ReferenceEngine(pair).generate(PROMPTS, Teacher(), Sampling(12), seed=0):
        assert max(rollout.token_ids) < 64
        assert max(rollout.divergence) < 1e-12  # roundings of one model under two head shapes


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_ngram_is_repeated_and_nothing_else_changes(size: int, temperature: float) -> None:
    pair = ModelPair(tiny_model("llama", dtype=torch.float64))
    prompts = [[5, 9, 5, 9, 11], [7, 8, 7]] if size > 1 else [[5, 9, 11], [7, 8]]
    sampling = Sampling(30, temperature, no_repeat_ngram_size=size)
    free = ReferenceEngine(pair).generate(prompts, Student(), dataclasses.replace(sampling, no_repeat_ngram_size=0))
    for rollout, unbound in zip(ReferenceEngine(pair).generate(prompts, Student(), sampling), free, strict=True):
        prompt = rollout.prompt.token_ids
        for end in range(1, len(rollout.token_ids) + 1):
            text = prompt + rollout.token_ids[:end]
            # The prompt may repeat itself; only a new token must not complete a repetition.
            ngrams = [text[at : at + size] for at in range(len(text) - size + 1)]
            assert ngrams[-1] not in ngrams[:-1]
        if not repeats_an_ngram(prompt + unbound.token_ids, size):
            assert rollout.token_ids == unbound.token_ids


# ------ modes and refusals


@pytest.mark.parametrize("training", [True, False])
def test_models_are_left_in_the_mode_that_they_were_found_in(training: bool) -> None:
    pair = tiny_pair("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = ReferenceEngine(pair).generate(PROMPTS, POLICIES["switch"], Sampling(8), seed=0)
    pair.student.train(training)
    frozen = pair.student.transformer.h[0].eval()
    assert same_tokens(expected, ReferenceEngine(pair).generate(PROMPTS, POLICIES["switch"], Sampling(8), seed=0))
    assert pair.student.training == training
    assert not frozen.training
    assert pair.student.transformer.h[1].training == training
    assert not pair.teacher.training


def same_tokens(first: list[Rollout], second: list[Rollout]) -> bool:
    return [r.token_ids for r in first] == [r.token_ids for r in second]


def test_the_mode_is_restored_after_an_error() -> None:
    pair = tiny_pair("llama")
    pair.student.train()

    class Broken(Policy):
        def decide(self, positions: Any) -> Any:
            raise RuntimeError("broken policy")

    with pytest.raises(RuntimeError, match="broken policy"):
        ReferenceEngine(pair).generate(PROMPTS, Broken(), Sampling(3))
    assert pair.student.training
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_does_not_change_what_is_generated() -> None:
    pair = tiny_pair("llama")
    expected = ReferenceEngine(pair).generate(PROMPTS, POLICIES["switch"], Sampling(10), seed=0)
    pair.student.gradient_checkpointing_enable()
    pair.student.train()
    assert same_tokens(expected, ReferenceEngine(pair).generate(PROMPTS, POLICIES["switch"], Sampling(10), seed=0))
    assert pair.student.is_gradient_checkpointing


def test_no_gradient_is_tracked(exact_pair: ModelPair) -> None:
    (rollout,) = ReferenceEngine(exact_pair).generate([[5]], Teacher(), Sampling(2), keep_teacher="hidden")
    assert not rollout.teacher_hidden.requires_grad
    assert rollout.teacher_hidden.shape[0] == len(rollout.token_ids)


def test_progress_is_told_and_ends_at_the_number_of_prompts(exact_pair: ModelPair) -> None:
    told: list[int] = []
    ReferenceEngine(exact_pair, max_rows=2).generate([[5]] * 5, Student(), Sampling(2), on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 5


def test_text_is_tokenized_without_special_tokens(llama_pair: ModelPair) -> None:
    (rollout,) = ReferenceEngine(llama_pair).generate(["one bird"], Student(), Sampling(2))
    tokenizer = llama_pair.tokenizer
    assert tokenizer.convert_ids_to_tokens(list(rollout.prompt.token_ids)) == ["one", "bird"]


@pytest.mark.parametrize(
    ("prompts", "policy", "options", "message"),
    [
        ([[5], []], Student(), {}, "prompt 1 is empty"),
        ([[5, 64]], Student(), {}, "prompt 0 holds token id 64.* 64 ids"),
        ([[5, -1]], Student(), {}, "token id -1"),
        ([(5,), Prompt((1, 99), 7)], Student(), {}, "prompt 1 holds token id 99"),
        (["some text"], Student(), {}, "prompt 0 is text, but the pair has no tokenizer"),
        ([[5]], Teacher(), {"sampling": Sampling(4, no_repeat_ngram_size=2)}, "no_repeat_ngram_size is 2"),
    ],
)
def test_a_call_that_cannot_be_served_is_refused(
    prompts: list[Any], policy: Policy, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ReferenceEngine(tiny_pair("llama")).generate(prompts, policy, **options)


@pytest.mark.parametrize("policy", [Teacher(), Switch()])
def test_a_policy_that_needs_a_teacher_is_refused_where_there_is_none(policy: Policy) -> None:
    engine = ReferenceEngine(ModelPair(tiny_model("llama")))
    with pytest.raises(UserError, match=f"{type(policy).__name__} needs a teacher"):
        engine.generate([[5]], policy)
    with pytest.raises(UserError, match="keep_teacher"):
        engine.generate([[5]], Student(), keep_teacher="hidden")


def test_more_positions_than_a_model_knows_are_refused() -> None:
    pair = tiny_pair("gpt2", max_position_embeddings=32)
    with pytest.raises(UserError, match="32"):
        ReferenceEngine(pair).generate([list(range(2, 22))], Student(), Sampling(20))


@pytest.mark.parametrize("engine", [ReferenceEngine, SpeculativeEngine])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_no_numbers_are_refused(role: str, engine: type[ReferenceEngine | SpeculativeEngine]) -> None:
    pair = tiny_pair("llama")
    made = engine(pair)
    backbone(pair.models[role]).norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match=f"the {role}'s probabilities are NaN"):
        made.generate([[5, 6]], Switch(), Sampling(4))
