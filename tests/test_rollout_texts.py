"""How a rollout starts, how long it grows, how the teacher rewrites it, and the margin that it records."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerState

from checks.divergence import logp, random_logits
from checks.rollouts import assert_same_rollouts
from reference import targets as reference
from switchkd.errors import UserError
from switchkd.loss.weights import Prefix
from switchkd.methods.config import SwitchConfig
from switchkd.methods.text import LengthGrowth, ReplayedPrefix, Rewrite
from switchkd.models.pair import ModelPair
from switchkd.records import Example, FinishReason, Prompt, Rollout, Sampling
from switchkd.rollout.engine import Engine
from switchkd.rollout.law import Policy, Student
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.rollout.write import teacher_margin
from switchkd.training.meters import Meters
from switchkd.training.replay import ReplayBuffer
from switchkd.training.rewriting import rewritten
from switchkd.training.step_text import TEXT_MEASURES, StepText
from tiny import EOS_ID, tiny_pair, tiny_tokenizer
from trainers import EXAMPLES, NEW_TOKENS, RecordingEngine, assert_same_weights, make_examples, make_trainer, weights

LAST_COIN = 1 - 2.0**-24

# ------------------------------------------------------------------------------------------------ the length of a prefix


@pytest.mark.parametrize(("kappa", "parts"), [(0.6, 8), (0.6, 2), (0.1, 4), (1.0, 5), (1.0, 8)])
def test_a_prefix_of_one_more_part_is_rarer_by_kappa(kappa: float, parts: int) -> None:
    begin, coins = ReplayedPrefix(parts=parts, kappa=kappa), 3000
    lengths = [begin.tokens((coin + 0.5) / coins, 3 * parts, 0.7) for coin in range(coins)]
    assert lengths == sorted(lengths)
    total = math.fsum(kappa**part for part in range(parts))
    for part in range(parts):
        # A grid meets an interval of length p in p / step coins, up to one.
        assert abs(lengths.count(3 * part) - coins * kappa**part / total) <= 1
    assert set(lengths) == {3 * part for part in range(parts)}


@pytest.mark.parametrize("kappa", [0.6, 1.0])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_prefix_is_never_the_whole_response(parts: int, kappa: float) -> None:
    begin = ReplayedPrefix(parts=parts, kappa=kappa)
    for tokens in range(30):
        found = [begin.tokens(coin, tokens, 0.0) for coin in (2.0**-24, 0.3, 0.9, LAST_COIN)]
        assert found[0] == 0
        # The most is all parts but the last, rounded down.
        assert found[-1] == tokens * (parts - 1) // parts
        assert all(length < max(1, tokens) for length in found)


def test_prefixes_shrink_by_a_cosine() -> None:
    begin = ReplayedPrefix(parts=8, kappa=1.0, until=0.6)
    # Of seven parts: 70 tokens of 80.
    found = {progress: begin.tokens(LAST_COIN, 80, progress) for progress in (0.0, 0.2, 0.3, 0.4, 0.6, 0.9, 1.0)}
    # (1 + cos) / 2 is 1, 3/4, 1/2, 1/4 and 0; the angles are rounded, and lengths rounded down.
    assert found == {0.0: 70, 0.2: 52, 0.3: 35, 0.4: 17, 0.6: 0, 0.9: 0, 1.0: 0}
    lengths = [begin.tokens(LAST_COIN, 80, step / 100) for step in range(101)]
    assert all(after <= before for before, after in pairwise(lengths))
    assert len(set(lengths)) > 30
    stays = dataclasses.replace(begin, until=0.0)
    assert {stays.tokens(LAST_COIN, 80, progress) for progress in (0.0, 0.5, 1.0)} == {70}


def test_growth_is_a_token_every_so_many_steps() -> None:
    assert [LengthGrowth(4, 1.0).limit(step, 10) for step in range(9)] == [4, 5, 6, 7, 8, 9, 10, 10, 10]
    assert [LengthGrowth(1, 2.0).limit(step, 3) for step in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [LengthGrowth(2, 0.5).limit(step, 99) for step in range(4)] == [2, 4, 6, 8]
    assert LengthGrowth(50).limit(0, 10) == 10


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (ReplayedPrefix, {"source": "student"}, "source is 'student'; choose data or teacher"),
        (ReplayedPrefix, {"parts": 1}, "parts is 1; a response has at least 2 parts"),
        (ReplayedPrefix, {"kappa": 0.0}, "kappa is 0.0; it has to be above 0 and at most 1"),
        (ReplayedPrefix, {"kappa": 1.1}, "kappa is 1.1"),
        (ReplayedPrefix, {"until": -0.1}, "until is -0.1; it is a share of the run's steps"),
        (ReplayedPrefix, {"until": 1.1}, "until is 1.1"),
        (ReplayedPrefix, {"weight": -1.0}, "weight is -1.0; it has to be 0 or more"),
        (ReplayedPrefix, {"weight": math.inf}, "weight is inf"),
        (LengthGrowth, {"start": 0}, "start is 0; it has to be at least 1 token"),
        (LengthGrowth, {"steps_per_token": 0.0}, "steps_per_token is 0.0; it has to be positive"),
        (LengthGrowth, {"steps_per_token": math.inf}, "steps_per_token is inf"),
        (Rewrite, {"template": "Again: {attempt}"}, "has the fields attempt; it needs {prompt} and {attempt}"),
        (Rewrite, {"template": "Again."}, "has the fields none; it needs"),
        (Rewrite, {"template": "{prompt} {attempt} {0}"}, "has the fields 0, attempt, prompt; it needs"),
        (Rewrite, {"template": "{prompt} {attempt} {}"}, "has the fields , attempt, prompt; it needs"),
        (Rewrite, {"template": "{prompt} {attempt} {hint}"}, "has the fields attempt, hint, prompt; it needs"),
        (Rewrite, {"template": "{prompt} {attempt} }"}, "cannot be read .*write a brace of the text twice"),
    ],
)
def test_settings_out_of_range_are_refused(part: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        part(**settings)


def test_a_request_holds_prompt_and_attempt_as_they_are() -> None:
    assert Rewrite("{{{prompt}}} then {attempt}").request("a {b}", "{c} d") == "{a {b}} then {c} d"
    assert all(each in Rewrite().request("the prompt", "an attempt") for each in ("the prompt", "an attempt"))


# --------------------------------------------------------------------------------------------------- in the step's text


class OneTokenEngine:
    """Ends every text at once."""

    def generate(self, prompts: Sequence[Prompt], policy: Policy, **settings: Any) -> list[Rollout]:
        unknown, end = (math.nan,), FinishReason.END_OF_TEXT
        return [
            Rollout(prompt, (EOS_ID,), (False,), unknown, unknown, unknown, unknown, finish_reason=end)
            for prompt in prompts
        ]


def begun(examples: Sequence[Example], step: int, **settings: Any) -> list[Prompt]:
    """The prompts of one step of ten."""
    args = SwitchConfig(output_dir="unused", method="gkd", **{"max_new_tokens": NEW_TOKENS, **settings})
    text = StepText(args, {"": ModelPair(tiny_pair("llama", layers=1).student)}, Meters(TEXT_MEASURES), examples)
    engine: Any = OneTokenEngine()
    state = TrainerState(global_step=step, max_steps=10)
    (made,) = text.sequences_of_steps([examples], state, engine, log=lambda measured: None)
    return [each.prompt for each in made.sequences]


def test_rollouts_begin_with_a_part_of_their_examples_response() -> None:
    examples = make_examples(60)
    prompts = begun(examples, 3, replayed_prefix=ReplayedPrefix(kappa=1.0))
    for prompt, example in zip(prompts, examples, strict=True):
        assert 0 <= prompt.begun < len(example.response_ids)
        assert prompt.token_ids == example.prompt.token_ids + example.response_ids[: prompt.begun]
        assert (prompt.prompt_id, prompt.sample_id) == (example.prompt.prompt_id, 3)
        assert not prompt.trains_beginning
    # Lengths of 2 to 9, and seven in eight prefixes are not empty: the mean of 7/16 of 5.5 tokens.
    assert 1.5 < sum(prompt.begun for prompt in prompts) / 60 < 3.0
    assert max(prompt.begun for prompt in prompts) >= 6


def test_a_prefix_depends_on_row_and_step_alone() -> None:
    examples, settings = make_examples(40), {"replayed_prefix": ReplayedPrefix()}
    whole = begun(examples, 3, **settings)
    halves = begun(examples[20:], 3, **settings) + begun(examples[:20], 3, **settings)
    assert whole == halves[20:] + halves[:20] == begun(examples, 3, **settings)
    later = begun(examples, 4, **settings)
    assert [prompt.begun for prompt in later] != [prompt.begun for prompt in whole]
    other = begun(examples, 3, seed=5, **settings)
    assert [prompt.begun for prompt in other] != [prompt.begun for prompt in whole]


def test_prefixes_shrink_over_the_steps_and_leave_room() -> None:
    examples, settings = make_examples(40), {"replayed_prefix": ReplayedPrefix(kappa=1.0, until=0.5)}
    sums = [sum(prompt.begun for prompt in begun(examples, step, **settings)) for step in (0, 2, 4, 5, 9)]
    assert sums[0] > sums[1] > sums[2] >= sums[3] == sums[4] == 0
    # What a rollout begins with is of the text that the step would have trained on.
    changes: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 4},
        {"length_growth": LengthGrowth(4, 99.0)},
        {"weight": Prefix(tokens=4)},
    )
    for more in changes:
        prompts = begun(examples, 0, replayed_prefix=ReplayedPrefix(kappa=1.0), **more)
        assert max(prompt.begun for prompt in prompts) == 3


# ------------------------------------------------------------------------------------------------------ in both engines

POSITIONS = 24


def begun_prompts(longest: int = POSITIONS - NEW_TOKENS) -> list[Prompt]:
    """Prompts of many lengths, the longest of as many tokens as leave room for the new ones, begun by 0 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [
        (longest, 0),
        (longest, 9),
        (longest, 3),
        (1, 9),
        (1, 0),
        (5, 8),
        (longest - 1, 9),
        (7, 4),
        (longest, 1),
        (longest, 0),
    ]
    ids = [tuple(torch.randint(2, 64, (own + more,), generator=generator).tolist()) for own, more in lengths]
    return [Prompt(each, row, begun=more) for row, (each, (_, more)) in enumerate(zip(ids, lengths, strict=True))]


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def short_pair(request: pytest.FixtureRequest) -> ModelPair:
    """Models of just as many positions as the longest prompt and its response."""
    return tiny_pair(request.param, layers=1, dtype=torch.float64, max_position_embeddings=POSITIONS)


def engines(pair: ModelPair, **options: Any) -> list[Engine]:
    """The reference, then ours in blocks and rows of several sizes."""
    sizes: list[dict[str, Any]] = [{"block_size": 1}, {"block_size": 4, "max_rows": 3}, {"block_size": 16}]
    return [ReferenceEngine(pair, **options), *(SpeculativeEngine(pair, **size, **options) for size in sizes)]


@pytest.mark.parametrize("policy", [Student(), Switch(0.3)], ids=["student", "switch"])
def test_engines_agree_on_begun_rollouts_up_to_the_last_position(policy: Policy, short_pair: ModelPair) -> None:
    prompts, sampling = begun_prompts(), Sampling(NEW_TOKENS)
    oracle, *others = engines(short_pair)
    expected = oracle.generate(prompts, policy, sampling, seed=1)
    for rollout in expected:
        total = rollout.prompt.begun + len(rollout.token_ids)
        assert total == NEW_TOKENS or (rollout.finish_reason == FinishReason.END_OF_TEXT and total < NEW_TOKENS)
    full = [each for each in expected if len(each.prompt.token_ids) + len(each.token_ids) == POSITIONS]
    assert len({each.prompt.begun for each in full}) > 1
    for engine in others:
        assert_same_rollouts(
            engine.generate(prompts, policy, sampling, seed=1), expected, short_pair, policy, sampling, 1
        )
    # Alone, without the other rows, which go on longer or shorter.
    for rollout, prompt in zip(expected, prompts, strict=True):
        alone = oracle.generate([prompt], policy, sampling, seed=1)
        assert_same_rollouts(alone, [rollout], short_pair, policy, sampling, 1)


def test_a_begun_text_goes_on_as_it_would_have(short_pair: ModelPair) -> None:
    """Greedy, so that no noise depends on where a token stands."""
    prompts, sampling = [replace_begun(each) for each in begun_prompts()], Sampling(NEW_TOKENS, temperature=0.0)
    for engine in engines(short_pair):
        whole = engine.generate(prompts, Student(), sampling)
        halved = [
            Prompt(each.prompt.token_ids + each.token_ids[:cut], each.prompt.prompt_id, begun=cut)
            for each in whole
            if (cut := len(each.token_ids) // 2)
        ]
        rest = engine.generate(halved, Student(), sampling)
        assert len(rest) > 5
        for again, each in zip(rest, [each for each in whole if len(each.token_ids) > 1], strict=True):
            assert each.token_ids == each.token_ids[: again.prompt.begun] + again.token_ids
            assert again.finish_reason == each.finish_reason


def replace_begun(prompt: Prompt) -> Prompt:
    """The prompt alone."""
    own = len(prompt.token_ids) - prompt.begun
    return Prompt(prompt.token_ids[:own], prompt.prompt_id)


def test_a_response_that_is_complete_is_not_begun(short_pair: ModelPair) -> None:
    for engine in engines(short_pair):
        with pytest.raises(
            UserError, match="a response has 10 tokens already, and max_new_tokens is 10; leave something"
        ):
            engine.generate([Prompt((5,) * 12, 0, begun=10)], Student(), Sampling(10))
        # Begun tokens are part of the new ones: what does not fit is the prompt of 15.
        with pytest.raises(UserError, match="come to 25 tokens"):
            engine.generate([Prompt((5,) * 18, 0, begun=3)], Student(), Sampling(10))


# ------------------------------------------------------------------------------------------------------------- margins


@pytest.mark.parametrize("top_k", [2, 3, 7, 99])
def test_the_margin_is_that_of_its_definition(top_k: int) -> None:
    # float64: two logarithms. float32: the same of up to 10 nats, with an error of 10 * 2^-24 = 6e-7.
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        student, teacher = (logp(each).detach() for each in random_logits((4, 5, 7), dtype=dtype))
        found = teacher_margin(student, teacher, top_k)
        assert found.shape == (4, 5)
        rows = zip(*(each.double().exp().reshape(-1, 7).tolist() for each in (student, teacher)), strict=True)
        expected = [reference.margin(s, t, top_k=top_k) for s, t in rows]
        assert found.flatten().tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert (found > 0).all()


@pytest.mark.parametrize(
    ("teacher", "margin"),
    [
        # The student's favorites are the first three ids.
        ([0.1, 0.4, 0.2, 0.3], math.log(2)),
        ([0.0, 0.4, 0.1, 0.5], math.log(4)),
        ([0.0, 0.4, 0.0, 0.6], math.inf),
        ([0.0, 0.0, 0.0, 1.0], 0.0),
        ([0.25, 0.25, 0.25, 0.25], 0.0),
    ],
)
def test_ids_that_the_teacher_excludes(teacher: list[float], margin: float) -> None:
    student = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    target = torch.tensor(teacher, dtype=torch.float64)
    assert float(teacher_margin(student, target.log(), 3)) == pytest.approx(margin, rel=1e-14)
    assert reference.margin(student.exp().tolist(), teacher, top_k=3) == pytest.approx(margin, rel=1e-14)


def test_engines_record_the_margin_at_every_token(short_pair: ModelPair) -> None:
    prompts, sampling, policy = begun_prompts(), Sampling(NEW_TOKENS), Switch(0.3)
    assert short_pair.teacher is not None
    for engine in engines(short_pair, margin_top_k=3):
        for rollout in engine.generate(prompts, policy, sampling, seed=1):
            ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
            start = len(rollout.prompt.token_ids) - 1
            models: list[Any] = [short_pair.student, short_pair.teacher]
            with torch.no_grad():
                rows = [model(ids).logits[0, start:-1].softmax(-1).tolist() for model in models]
            expected = [reference.margin(s, t, top_k=3) for s, t in zip(*rows, strict=True)]
            # Float64 through a cache and in one pass: some tens of roundings of logits of up to 10.
            assert rollout.margin == pytest.approx(expected, rel=1e-11, abs=1e-11)
        # Without a teacher there is none.
        assert {each.margin for each in engine.generate(prompts, Student(), sampling)} == {()}
        asked = engine.generate(prompts, Student(), sampling, keep_teacher="hidden")
        assert all(len(each.margin) == len(each.token_ids) for each in asked)
    for engine in engines(short_pair):
        assert {each.margin for each in engine.generate(prompts, policy, sampling)} == {()}


# --------------------------------------------------------------------------------------------------------- in the buffer


@pytest.mark.parametrize("margin_top_k", [0, 3])
def test_the_replay_keeps_how_a_rollout_began_and_what_was_measured(margin_top_k: int, tmp_path: Path) -> None:
    pair = tiny_pair("llama", layers=1)
    prompts = [dataclasses.replace(each, trains_beginning=each.prompt_id % 2 == 0) for each in begun_prompts()]
    engine = SpeculativeEngine(pair, margin_top_k=margin_top_k)
    rollouts = engine.generate(prompts, Switch(0.3), Sampling(NEW_TOKENS))
    buffer = ReplayBuffer(len(rollouts))
    buffer.add(rollouts)
    buffer.save(tmp_path)
    loaded = ReplayBuffer(len(rollouts))
    loaded.load(tmp_path)
    for ours, theirs in zip(loaded.rollouts, rollouts, strict=True):
        assert ours == theirs
        assert (len(ours.law_logp), len(ours.teacher_part)) == (len(ours.token_ids),) * 2
        assert len(ours.margin) == (len(ours.token_ids) if margin_top_k else 0)
    assert len({(each.prompt.begun, each.prompt.trains_beginning) for each in loaded.rollouts}) > 4


def test_a_resumed_run_replays_begun_rollouts_with_what_the_teacher_read_of_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "reopd", "replayed_prefix": ReplayedPrefix(kappa=1.0, weight=0.25)}
    options |= {"replay_capacity": 6, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    pair = tiny_pair("llama", layers=1)
    whole = make_trainer(tmp_path, pair, **options)
    whole.train()
    assert any(line.get("replayed", 0) > 0 for line in whole.state.log_history)
    resumed = make_trainer(tmp_path, pair, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(whole), weights(resumed))


# -------------------------------------------------------------------------------------------------------- in the trainer


def position_losses(pair: ModelPair, text: Example | Rollout, *, reverse: bool = True) -> list[float]:
    """The KL at each token that follows the bare prompt, one row alone: logits at t - 1 predict t."""
    prompt, response = text.prompt, text.token_ids if isinstance(text, Rollout) else text.response_ids
    ids = torch.tensor([[*prompt.token_ids, *response]])
    models: list[Any] = [pair.student, pair.teacher]
    with torch.no_grad():
        student, teacher = (model(ids).logits[0, :-1].log_softmax(-1) for model in models)
    p, q = (student, teacher) if reverse else (teacher, student)
    kl: Tensor = (p.exp() * (p - q)).sum(-1)
    return kl[len(prompt.token_ids) - prompt.begun - 1 :].tolist()


def first_loss(trainer: Any) -> float:
    return float(trainer.state.log_history[0]["loss"])


# In a rollout of SWITCH the teacher has read what was written, but not the beginning.
@pytest.mark.parametrize("method", ["reopd", "switch"])
@pytest.mark.parametrize(("weight", "student_share"), [(0.0, 0.5), (0.0, 1.0), (0.25, 0.5), (1.5, 1.0)])
def test_a_prefix_is_trained_on_with_its_weight_alone(
    weight: float, student_share: float, method: str, tmp_path: Path
) -> None:
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    begin = ReplayedPrefix(kappa=1.0, weight=weight)
    options: dict[str, Any] = {"method": method, "replayed_prefix": begin, "student_share": student_share}
    trainer = make_trainer(tmp_path, pair, split=(3, 3), max_steps=1, **options)
    engine = RecordingEngine(trainer)
    trainer.train()
    rollouts = {each.prompt.prompt_id: each for each in engine.calls[0]}
    assert (len(rollouts) < 8) == (student_share < 1)
    assert sum(each.prompt.begun > 0 for each in rollouts.values()) > 2
    total, count = 0.0, 0
    for example in EXAMPLES:
        text = rollouts.get(example.prompt.prompt_id, example)
        losses, started = position_losses(pair, text, reverse=method == "reopd"), text.prompt.begun
        total += weight * sum(losses[:started]) + sum(losses[started:])
        count += len(losses) - (0 if weight else started)
    # transformers adds the losses of a step up in float32.
    assert first_loss(trainer) == pytest.approx(total / count, rel=1e-6)


def test_no_split_of_a_step_changes_prefixes_or_text(tmp_path: Path) -> None:
    pair, found = tiny_pair("llama", layers=1, dtype=torch.float64), []
    for split in ((8, 1), (2, 4), (8, 1)):
        trainer = make_trainer(tmp_path, pair, split=split, max_steps=2, method="reopd")
        engine = RecordingEngine(trainer)
        trainer.train()
        found.append([{each.prompt: each.token_ids for each in call} for call in engine.calls])
    assert found[0] == found[1] == found[2]
    assert any(prompt.begun for call in found[0] for prompt in call)


def test_rollouts_grow_with_the_steps(tmp_path: Path) -> None:
    pair, growth = tiny_pair("llama", layers=1), LengthGrowth(2, 0.5)
    options: dict[str, Any] = {"method": "gkd", "length_growth": growth, "student_share": 0.7, "max_new_tokens": 5}
    trainer = make_trainer(tmp_path, pair, split=(8, 1), max_steps=4, **options)
    engine = RecordingEngine(trainer)
    trainer.train()
    for rollouts, limit in zip(engine.calls, (2, 4, 5, 5), strict=True):
        assert max(len(each.token_ids) for each in rollouts) == limit
        assert all(len(each.token_ids) == limit for each in rollouts if each.finish_reason == FinishReason.LENGTH)


@pytest.mark.parametrize("weight", [{"tokens": 3}, {"share": 0.3}, {"share": 0.25}], ids=str)
def test_text_ends_with_the_prefix_that_counts(weight: dict[str, Any], tmp_path: Path) -> None:
    """Three tokens of ten, in each case: rollouts end there, and the data's text is cut there."""
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    options: dict[str, Any] = {"method": "prefix", "weight": {"name": "prefix", **weight}, "student_share": 0.5}
    trainer = make_trainer(tmp_path, pair, split=(4, 2), max_steps=1, **options)
    scored: list[int] = []
    teacher: Any = trainer.pair.teacher
    teacher.get_decoder().register_forward_hook(
        lambda module, given, kwargs, output: scored.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine = RecordingEngine(trainer)
    trainer.train()
    rollouts = {each.prompt.prompt_id: each for each in engine.calls[0]}
    assert 0 < len(rollouts) < 8
    assert max(len(each.token_ids) for each in rollouts.values()) == 3
    texts = [
        rollouts.get(each.prompt.prompt_id, dataclasses.replace(each, response_ids=each.response_ids[:3]))
        for each in EXAMPLES
    ]
    losses = [loss for each in texts for loss in position_losses(pair, each)]
    # transformers adds the losses of a step up in float32.
    assert first_loss(trainer) == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    # Nothing behind is scored: prompts have up to 6 tokens.
    assert 3 < max(scored) <= 6 + 3


# ----------------------------------------------------------------------------------------------------------- rewritten

TEMPLATE = "says {prompt} and {attempt} :"
TOKENIZER = tiny_tokenizer()
SAYS, AND, COLON = (TOKENIZER.get_vocab()[word] for word in ("says", "and", ":"))
# Words alone, since marks run together where a text is put together.
WORDS = [Example(Prompt(tuple(range(20 + row, 24 + row)), row), (10, EOS_ID)) for row in range(4)]


def rewriting_trainer(folder: Path, pair: ModelPair, **options: Any) -> Any:
    settings: dict[str, Any] = {"method": "trd", "rewrite": {"template": TEMPLATE}, "max_steps": 1, **options}
    return make_trainer(folder, pair, WORDS, split=(2, 2), **settings)


def as_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[int]:
    """The ids of the text that these ids are, without the special ones."""
    return list(tokenizer(tokenizer.decode(list(token_ids), skip_special_tokens=True))["input_ids"])


def test_the_teachers_text_is_trained_on_under_the_original_prompt(tmp_path: Path) -> None:
    pair = tiny_pair("llama", layers=1, dtype=torch.float64, tokenizer=TOKENIZER)
    trainer = rewriting_trainer(tmp_path, pair)
    engine = RecordingEngine(trainer)
    trainer.train()
    attempts, texts = engine.calls
    assert not any(any(each.written_by_teacher) for each in attempts)
    assert all(all(each.written_by_teacher) for each in texts)
    for attempt, text in zip(attempts, texts, strict=True):
        assert list(text.prompt.token_ids) == [SAYS, *attempt.prompt.token_ids, AND, *as_text(attempt.token_ids), COLON]
        # An address of its own, which no step's rollout has.
        assert text.prompt.prompt_id == attempt.prompt.prompt_id
        assert text.prompt.sample_id < -1000 < attempt.prompt.sample_id
    trained = [Example(a.prompt, t.token_ids) for a, t in zip(attempts, texts, strict=True)]
    losses = [loss for each in trained for loss in position_losses(pair, each, reverse=False)]
    # transformers adds the losses of a step up in float32.
    assert first_loss(trainer) == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_the_teacher_is_asked_in_its_chat_template(tmp_path: Path) -> None:
    template = (
        "red {{ messages[0]['role'] }} {{ messages[0]['content'] }}{% if add_generation_prompt %} {{ ends }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(["user", "says", "and", "red", "blue"], chat_template=template)
    pair = tiny_pair("llama", layers=1, tokenizer=tokenizer)
    trainer = rewriting_trainer(tmp_path, pair, chat_template_kwargs={"ends": "blue"})
    engine = RecordingEngine(trainer)
    trainer.train()
    red, user, says, conjunction, blue, colon = (
        tokenizer.get_vocab()[word] for word in ("red", "user", "says", "and", "blue", ":")
    )
    for attempt, text in zip(*engine.calls, strict=True):
        middle = [says, *attempt.prompt.token_ids, conjunction, *as_text(attempt.token_ids, tokenizer), colon]
        assert list(text.prompt.token_ids) == [red, user, *middle, blue]


def test_the_teacher_is_asked_in_its_own_template_or_as_plain_prompts_begin(tmp_path: Path) -> None:
    made = tiny_pair("llama", layers=1, tokenizer=TOKENIZER)
    args = make_trainer(tmp_path, made, method="trd", rewrite={"template": TEMPLATE}).args
    attempts = ReferenceEngine(made).generate([each.prompt for each in WORDS], Student(), Sampling(5))

    def asked(tokenizer: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast | None) -> list[int]:
        pair = ModelPair(made.student, made.teacher, tokenizer, theirs)
        seen: list[Prompt] = []

        class Engine:
            def generate(self, prompts: Sequence[Prompt], **named: Any) -> list[Rollout]:
                seen.extend(prompts)
                return attempts

        rewritten(Rewrite(TEMPLATE), attempts, {"": pair}, Engine(), args, 5)
        return [prompt.token_ids[0] for prompt in seen]

    template = "red {{ messages[0]['content'] }}"
    speaking = tiny_tokenizer(chat_template=template)
    assert set(asked(TOKENIZER, speaking)) == {TOKENIZER.get_vocab()["red"]}
    assert set(asked(TOKENIZER, None)) == {SAYS}
    args.add_bos = "always"
    beginning = tiny_tokenizer()
    beginning.bos_token = "blue"
    assert set(asked(beginning, None)) == {TOKENIZER.get_vocab()["blue"]}


def test_an_attempt_without_room_loses_its_end(tmp_path: Path) -> None:
    """22 positions without 10 new ones leave 12 to a request, of which 7 are prompt and template."""
    pair = tiny_pair("gpt2", layers=1, tokenizer=TOKENIZER, max_position_embeddings=22)
    trainer = rewriting_trainer(tmp_path, pair, max_steps=3)
    engine = RecordingEngine(trainer)
    trainer.train()
    cut = 0
    for attempts, texts in zip(engine.calls[::2], engine.calls[1::2], strict=True):
        for attempt, text in zip(attempts, texts, strict=True):
            request = list(text.prompt.token_ids)
            assert len(request) <= 12
            assert request[:6] == [SAYS, *attempt.prompt.token_ids, AND]
            assert request[-1] == COLON
            shown, whole = request[6:-1], as_text(attempt.token_ids)
            # A mark may have stood behind another that was cut, and then is a token of its own.
            assert shown == whole[: len(shown)]
            assert len(shown) == len(whole) or len(request) >= 11
            cut += len(shown) < len(whole)
    assert cut > 3


def test_a_teacher_that_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rewrite asks the teacher in words, but the pair has no tokenizer; give one"):
        rewriting_trainer(tmp_path, tiny_pair("llama", layers=1))
    short = tiny_pair("gpt2", layers=1, tokenizer=TOKENIZER, max_position_embeddings=21)
    with pytest.raises(UserError, match="7 tokens besides the attempt, but a model has room for 11 before 10 new ones"):
        rewriting_trainer(tmp_path, short)


def test_two_runs_are_rewritten_alike(tmp_path: Path) -> None:
    pair, trained = tiny_pair("llama", layers=1, tokenizer=TOKENIZER), []
    for _ in range(2):
        trainer = rewriting_trainer(tmp_path, pair, max_steps=2)
        engine = RecordingEngine(trainer)
        trainer.train()
        trained.append((copy.deepcopy(weights(trainer)), [[each.token_ids for each in call] for call in engine.calls]))
    assert trained[0][1] == trained[1][1]
    assert_same_weights(trained[0][0], trained[1][0])
    # Rewritten at each step.
    assert trained[0][1][1] != trained[0][1][3]


def test_what_is_rewritten_is_no_longer_than_the_step_allows(tmp_path: Path) -> None:
    pair = tiny_pair("llama", layers=1, tokenizer=TOKENIZER)
    trainer = rewriting_trainer(tmp_path, pair, length_growth={"start": 2, "steps_per_token": 1.0}, max_steps=2)
    engine = RecordingEngine(trainer)
    trainer.train()
    longest = [max(len(rollout.token_ids) for rollout in call) for call in engine.calls]
    # The attempts and what the teacher makes of them, at both steps.
    assert longest == [2, 2, 3, 3]
