"""Several teachers by a column of the data: each row is written with, and learned from, the one that it names."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from runs import save, switchkd, write_rows, write_run
from scoring_server import scoring
from switchkd.data.examples import Rendering, to_examples
from switchkd.data.rows import SourceRow
from switchkd.data.sets import resolve
from switchkd.distributions.shaping import log_probabilities
from switchkd.errors import UserError
from switchkd.loss.signals import DenseTeacher, DenseTeachers
from switchkd.methods.config import SwitchConfig
from switchkd.models.heads import Head
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Rollout, Sampling
from switchkd.rollout.by_teacher import EngineByTeacher
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import Switch
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.file import run_from_values
from switchkd.run.written import read_log
from switchkd.training.auto_threshold import calibration_prompts
from switchkd.training.machine import check_sharding
from switchkd.training.replay import ReplayBuffer
from switchkd.training.trainer import SwitchTrainer
from switchkd.training.written_step import WrittenStep
from tiny import EOS_ID, VOCABULARY, tiny_model, tiny_pair, tiny_tokenizer
from trainers import (
    EXAMPLES,
    Gradients,
    RecordingEngine,
    assert_same_weights,
    history,
    make_trainer,
    rolled_out,
    weights,
)

PAIR = tiny_pair("llama")
# Wider, so that its states go through no head but its own.
WIDE = tiny_model("llama", hidden=48, seed=7)
NAMED = [
    replace(each, prompt=replace(each.prompt, teacher=name))
    for each, name in zip(EXAMPLES, ("math", "chat", "chat", "math", "math", "chat", "math", "chat"), strict=True)
]
# Each teacher reads batches of its own, of other shapes, which differ by up to 3e-5 in a logit (tests/tiny.py).
TOLERANCE = 2e-4


def first_teacher() -> PreTrainedModel:
    assert PAIR.teacher is not None
    return PAIR.teacher


def two() -> dict[str, PreTrainedModel]:
    return {"math": first_teacher(), "chat": WIDE}


def with_teachers(folder: Path, teachers: Any, train_dataset: Any = NAMED, **options: Any) -> SwitchTrainer:
    given = {"max_grad_norm": 0.0, "max_steps": 1, **options}
    return make_trainer(folder, ModelPair(PAIR.student), train_dataset, teacher_model=teachers, **given)


def trained(folder: Path, teachers: Any, train_dataset: Any = NAMED, **options: Any) -> tuple[Any, Any, Any]:
    """Rollouts, losses and gradients of a training."""
    gradients = Gradients()
    trainer = with_teachers(folder, teachers, train_dataset, callbacks=[gradients], **options)
    texts = rolled_out(trainer)
    return texts, [line["loss"] for line in history(trainer) if "loss" in line], gradients.steps


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        atol = tolerance * float(wanted.abs().max())
        torch.testing.assert_close(
            ours[name], wanted, rtol=tolerance, atol=atol, msg=lambda text, name=name: name + text
        )


def _said(rollout: Rollout) -> tuple[Any, ...]:
    """All numbers of a rollout but its threshold, which may be NaN."""
    return (
        rollout.token_ids,
        rollout.written_by_teacher,
        rollout.divergence,
        rollout.student_logp,
        rollout.teacher_logp,
        rollout.finish_reason,
    )


# ------ rollouts


@pytest.mark.parametrize("policy", [Student(), Teacher(), Switch(threshold=0.3)], ids=lambda it: type(it).__name__)
def test_each_rollout_is_the_one_of_its_own_teacher_alone(policy: Policy) -> None:
    pairs = {name: ModelPair(PAIR.student, each) for name, each in two().items()}
    engine, sampling, told = EngineByTeacher(pairs, SpeculativeEngine), Sampling(10), list[int]()
    prompts = [each.prompt for each in NAMED]
    found = engine.generate(prompts, policy, sampling, 3, "hidden", told.append)
    assert [each.prompt for each in found] == prompts
    assert told == sorted(told)
    assert told[-1] == len(prompts)
    forwards = 0
    for name, pair in pairs.items():
        own = [prompt for prompt in prompts if prompt.teacher == name]
        alone = SpeculativeEngine(pair)
        wanted = alone.generate(own, policy, sampling, 3, "hidden")
        forwards += alone.metrics.teacher_forwards
        mine = [each for each in found if each.prompt.teacher == name]
        assert [_said(each) for each in mine] == [_said(each) for each in wanted]
        for ours, theirs in zip(mine, wanted, strict=True):
            assert ours.teacher_hidden is not None
            assert theirs.teacher_hidden is not None
            assert torch.equal(ours.teacher_hidden, theirs.teacher_hidden)
    assert engine.metrics.teacher_forwards == forwards > 0
    assert engine.metrics.tokens == sum(len(each.token_ids) for each in found)


def test_a_teacher_under_two_names_has_one_engine_and_whom_nobody_asks_needs_no_call_of_its_own() -> None:
    calls: list[int] = []

    class Counting(SpeculativeEngine):
        def generate(self, prompts: Any, *given: Any, **named: Any) -> list[Rollout]:
            calls.append(len(prompts))
            return super().generate(prompts, *given, **named)

    prompts = [each.prompt for each in NAMED]
    once = EngineByTeacher(dict.fromkeys(two(), PAIR), Counting)
    once.generate(prompts, Teacher(), Sampling(4))
    apart = EngineByTeacher({name: ModelPair(PAIR.student, each) for name, each in two().items()}, Counting)
    apart.generate(prompts, Student(), Sampling(4))
    apart.generate(prompts, Teacher(), Sampling(4))
    assert (len(once.engines), calls) == (1, [8, 8, 4, 4])
    with pytest.raises(UserError, match=r"prompt 1 names the teacher 'mth'; known are math, chat"):
        apart.generate([prompts[0], replace(prompts[1], teacher="mth")], Student())


def test_a_second_reading_is_by_the_rows_own_teacher() -> None:
    pairs = {name: ModelPair(PAIR.student, each) for name, each in two().items()}
    sampling, policy, prompts = Sampling(6), Switch(threshold=0.3), [each.prompt for each in NAMED[:2]]
    rollouts = EngineByTeacher(pairs, SpeculativeEngine).generate(prompts, policy, sampling, 3)
    # The step has the first rollout only, so the second is written again.
    found = WrittenStep(1, rollouts[:1], pairs, policy, sampling, 3).read_again(1, prompts[1:])
    assert [rollout.token_ids for rollout, _ in found] == [rollout.token_ids for rollout in rollouts]
    for rollout, reading in found:
        assert reading.teacher is not None
        assert reading.teacher.logp == pytest.approx(rollout.teacher_logp, abs=TOLERANCE)


# ------ training


# What engines and buffers keep from step to step shows in the methods with more than one.
METHODS: dict[str, dict[str, Any]] = {
    "switch": {"method": "switch", "max_steps": 2},
    "gkd": {"method": "gkd", "student_share": 0.5},
    "kd": {"method": "kd"},
    "imitkd": {"method": "imitkd"},
    "minillm": {"method": "minillm"},
    "distillm2": {"method": "distillm2"},
    "top_k": {"method": "switch", "teacher_signal": {"top_k": 8}},
    "replay": {"method": "gkd", "student_share": 1.0, "replay_capacity": 4, "replay_share": 0.5, "max_steps": 3},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_two_copies_of_a_teacher_train_as_that_teacher_alone(options: dict[str, Any], tmp_path: Path) -> None:
    copies = {"math": first_teacher(), "chat": copy.deepcopy(first_teacher())}
    texts, losses, gradients = trained(tmp_path / "several", copies, **options)
    wanted_texts, wanted_losses, wanted_gradients = trained(tmp_path / "one", first_teacher(), EXAMPLES, **options)
    assert texts == wanted_texts
    assert losses == pytest.approx(wanted_losses, rel=TOLERANCE)
    assert_close(gradients[0], wanted_gradients[0])


def reference_gradient(
    student: PreTrainedModel, teachers: Mapping[str, PreTrainedModel], texts: Sequence[Example | Rollout]
) -> dict[str, Tensor]:
    """The gradient of the mean forward KL over all tokens, from the definition: one text at a time, whole distributions."""
    student = copy.deepcopy(student).train()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for text in texts:
        response = text.token_ids if isinstance(text, Rollout) else text.response_ids
        ids = torch.tensor([[*text.prompt.token_ids, *response]])
        counted = slice(len(text.prompt.token_ids) - 1, -1)
        student_logp = student(input_ids=ids).logits[0, counted].log_softmax(-1)
        with torch.no_grad():
            teacher_logp = teachers[text.prompt.teacher](input_ids=ids).logits[0, counted].log_softmax(-1)
        total = total + (teacher_logp.exp() * (teacher_logp - student_logp)).sum()
        tokens += len(response)
    (total / tokens).backward()
    return {name: each.grad for name, each in student.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("split", [(8, 1), (2, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("method", ["kd", "switch"])
def test_a_steps_gradient_is_that_of_each_text_by_its_own_teacher(
    method: str, split: tuple[int, int], tmp_path: Path
) -> None:
    double = {name: copy.deepcopy(each).double() for name, each in two().items()}
    pair, gradients = ModelPair(copy.deepcopy(PAIR.student).double()), Gradients()
    options = {"method": method, "divergence": "forward_kl", "cross_entropy_weight": 0.0, "max_grad_norm": 0.0}
    trainer = make_trainer(
        tmp_path, pair, NAMED, teacher_model=double, callbacks=[gradients], split=split, max_steps=1, **options
    )
    engine = RecordingEngine(trainer)
    trainer.train()
    texts = engine.calls[0] if method == "switch" else NAMED
    assert {each.prompt.teacher for each in texts} == {"math", "chat"}
    # float64: what is left is the order of sums.
    assert_close(gradients.steps[0], reference_gradient(pair.student, double, texts), 1e-9)


@pytest.mark.parametrize(("chunk", "piece"), [(5, 2), (16, 16), (3, 3)])
def test_each_position_is_compared_with_its_own_head(chunk: int, piece: int) -> None:
    generator = torch.Generator().manual_seed(0)
    which_N = torch.randint(0, 3, (16,), generator=generator)
    teachers, expected_NV = [], torch.zeros(16, VOCABULARY)
    for place, model in enumerate((PAIR.student, first_teacher(), WIDE)):
        head = Head.of(model, VOCABULARY)
        hidden_NH = torch.randn(int((which_N == place).sum()), model.config.hidden_size, generator=generator)
        teachers.append(DenseTeacher(hidden_NH, head))
        with torch.no_grad():
            expected_NV[which_N == place] = log_probabilities(head(hidden_NH), 1.0)
    student_logp_NV = torch.randn(16, VOCABULARY, generator=generator).log_softmax(-1).requires_grad_()
    signal = DenseTeachers(which_N, teachers)
    for start in range(0, 16, chunk):
        of_chunk = slice(start, min(start + chunk, 16))
        for first in range(of_chunk.start, of_chunk.stop, piece):
            at = slice(first, min(first + piece, of_chunk.stop))
            student_PV, teacher_PV = signal.compare(student_logp_NV[at], at, of_chunk)
            assert torch.equal(student_PV, student_logp_NV[at])
            assert not teacher_PV.requires_grad
            # Products of another number of rows round otherwise; logits are up to 30 here.
            torch.testing.assert_close(teacher_PV, expected_NV[at], rtol=1e-5, atol=1e-4)
    assert all(each._prepared is None for each in teachers)


def test_a_resumed_run_is_the_same_bit_for_bit_with_a_replay_of_both(tmp_path: Path) -> None:
    options = {**METHODS["replay"], "replay_capacity": 6, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = with_teachers(tmp_path / "whole", two(), **options)
    whole.train()
    resumed = with_teachers(tmp_path / "whole", two(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    kept = resumed._text.replay
    assert kept is not None
    assert {each.prompt.teacher for each in kept.rollouts} == {"math", "chat"}
    kept.save(tmp_path)
    again = ReplayBuffer(6)
    again.load(tmp_path, two())
    for ours, theirs in zip(again.rollouts, kept.rollouts, strict=True):
        assert (ours.prompt, ours.token_ids) == (theirs.prompt, theirs.token_ids)
        assert ours.teacher_hidden is not None
        assert theirs.teacher_hidden is not None
        assert torch.equal(ours.teacher_hidden, theirs.teacher_hidden)
    other = with_teachers(tmp_path / "whole", {"math": WIDE}, [NAMED[0]], **options)
    with pytest.raises(UserError, match="has rollouts of the teacher 'chat', which is not there"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_an_evaluation_compares_each_row_with_its_own_teacher(tmp_path: Path) -> None:
    found = with_teachers(tmp_path / "both", two(), method="kd", eval_dataset=NAMED).evaluate()["eval_loss"]
    total, tokens = 0.0, 0
    for name, teacher in two().items():
        own = [each for each in EXAMPLES if NAMED[each.prompt.prompt_id].prompt.teacher == name]
        count = sum(len(each.response_ids) for each in own)
        alone = with_teachers(tmp_path / name, teacher, EXAMPLES, method="kd", eval_dataset=own)
        total, tokens = total + alone.evaluate()["eval_loss"] * count, tokens + count
    assert found == pytest.approx(total / tokens, rel=TOLERANCE)


def test_the_log_has_each_teachers_rows_and_divergence(tmp_path: Path) -> None:
    rows = [*NAMED[:2], NAMED[3], NAMED[4]]
    trainer = with_teachers(tmp_path, two(), rows, method="kd", max_steps=1)
    trainer.train()
    (line,) = [line for line in history(trainer) if "loss" in line]
    assert (line["teachers/math/rows"], line["teachers/chat/rows"]) == (0.75, 0.25)
    tokens = {name: sum(len(r.response_ids) for r in rows if r.prompt.teacher == name) for name in two()}
    total = sum(line[f"teachers/{name}/divergence"] * count for name, count in tokens.items())
    assert total / sum(tokens.values()) == pytest.approx(line["divergence"])
    assert line["teachers/math/divergence"] != pytest.approx(line["teachers/chat/divergence"], rel=0.1)


def test_teachers_on_the_disk_give_the_same(tmp_path: Path) -> None:
    # Copies: their weights go.
    copies = {name: copy.deepcopy(each) for name, each in two().items()}
    texts, losses, gradients = trained(tmp_path / "away", copies, teacher_offload="disk")
    wanted_texts, wanted_losses, wanted_gradients = trained(tmp_path / "here", two())
    assert texts == wanted_texts
    # In a file weights may begin at any eighth byte, and products round by where they begin.
    assert losses == pytest.approx(wanted_losses, rel=TOLERANCE)
    assert_close(gradients[0], wanted_gradients[0])
    # On the disk between the steps, both of them.
    assert [each.get_decoder().layers[0].mlp.up_proj.weight.numel() for each in copies.values()] == [0, 0]


def test_the_teachers_text_is_each_rows_own_teachers(tmp_path: Path) -> None:
    models = {name: copy.deepcopy(each) for name, each in two().items()}
    trainer = with_teachers(tmp_path, models, method="seqkd", max_steps=1)
    trainer.train()
    for name, teacher in models.items():
        engine = SpeculativeEngine(ModelPair(PAIR.student, teacher))
        own = [each.prompt for each in NAMED if each.prompt.teacher == name]
        wanted = engine.generate(own, Teacher(), trainer.args.sampling, trainer.args.seed)
        texts = {each.prompt.prompt_id: each.response_ids for each in trainer.train_dataset}
        assert [texts[each.prompt.prompt_id] for each in wanted] == [each.token_ids for each in wanted]
    swapped = [replace(each, prompt=replace(each.prompt, teacher="math")) for each in NAMED]
    again = with_teachers(tmp_path, models, swapped, method="seqkd", max_steps=1)
    with pytest.raises(UserError, match="was made with other prompts"):
        again.train()
    changed = {**models, "chat": tiny_model("llama", hidden=48, seed=8)}
    with pytest.raises(UserError, match="was made with other weights"):
        with_teachers(tmp_path, changed, method="seqkd", max_steps=1).train()


def test_a_rollout_is_rewritten_by_its_own_teacher(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    asked: list[tuple[int, str]] = []
    trainer = make_trainer(
        tmp_path, ModelPair(PAIR.student, tokenizer=tokenizer), NAMED, teacher_model=two(), method="trd", max_steps=1
    )
    generate = trainer.engine.generate

    def recorded(prompts: Any, *given: Any, **named: Any) -> list[Rollout]:
        asked.extend((each.prompt_id, each.teacher) for each in prompts if each.sample_id < 0)
        return generate(prompts, *given, **named)

    trainer.engine.generate = recorded  # type: ignore[method-assign]
    trainer.train()
    assert asked
    assert all(NAMED[row].prompt.teacher == name for row, name in asked)


def test_one_of_the_teachers_may_be_on_a_server(tmp_path: Path) -> None:
    options = {"method": "gkd", "student_share": 0.5, "teacher_signal": {"top_k": 8}, "split": (4, 2)}
    with scoring(WIDE) as server:
        begun = len(server.completions)
        theirs = trained(tmp_path / "server", {"math": first_teacher(), "chat": server.url}, **options)
        assert len(server.completions) > begun + 1
        trainer = with_teachers(tmp_path / "card", {"math": first_teacher(), "chat": server.url}, **options)
        assert f"and chat: teacher at {server.url}:" in trainer.describe()
        assert "| teacher | math: not named, chat: `teacher` |" in trainer.card()
    ours = trained(tmp_path / "here", two(), **options)
    assert theirs[0] == ours[0]
    assert theirs[1] == pytest.approx(ours[1], rel=TOLERANCE)
    assert_close(theirs[2][0], ours[2][0])


def test_a_threshold_is_calibrated_on_rows_of_all_sources() -> None:
    examples = [Example(Prompt((5,), row, teacher="math" if row < 80 else "chat"), ()) for row in range(100)]
    assert [each.prompt_id for each in calibration_prompts(examples, 5)] == [0, 20, 40, 60, 80]
    assert len(calibration_prompts(examples, 1000)) == 100


def test_all_ends_are_written_into_the_student_and_count_for_their_teachers_rows_alone(tmp_path: Path) -> None:
    other, ends = copy.deepcopy(WIDE), [EOS_ID, *range(9, VOCABULARY)]
    other.generation_config.eos_token_id = ends
    trainer = with_teachers(tmp_path, {"math": first_teacher(), "chat": other})
    assert trainer.pair.student.generation_config.eos_token_id == ends
    assert (trainer.taught["math"].pair.eos_ids, trainer.taught["chat"].pair.eos_ids) == ((EOS_ID,), (*ends,))
    # In the student's own text as well, which no teacher is asked about.
    found = trainer.engine.generate([each.prompt for each in NAMED], Student(), Sampling(10), 3)
    for name, each in trainer.taught.items():
        own = [rollout for rollout in found if rollout.prompt.teacher == name]
        wanted = SpeculativeEngine(each.pair).generate([rollout.prompt for rollout in own], Student(), Sampling(10), 3)
        assert [rollout.token_ids for rollout in own] == [rollout.token_ids for rollout in wanted]


# ------ rows


def rows_with(*columns: Mapping[str, Any]) -> list[SourceRow]:
    return [
        SourceRow({"prompt": "one two", **each}, index, f"d.jsonl:{index + 1}") for index, each in enumerate(columns)
    ]


def examples_of(rows: Sequence[SourceRow], **options: Any) -> Any:
    rendering = Rendering(teachers=("math", "chat"), **options)
    limits = {"max_prompt_tokens": 8, "max_response_tokens": 8, "need_response": False}
    return to_examples(rows, tiny_tokenizer(), rendering=rendering, **limits).examples


def test_a_column_names_each_rows_teacher() -> None:
    found = examples_of(rows_with({"teacher": "chat"}, {"teacher": "math"}, {"teacher": "chat"}))
    assert [each.prompt.teacher for each in found] == ["chat", "math", "chat"]
    found = examples_of(rows_with({"domain": "math"}), teacher_column="domain")
    assert found[0].prompt.teacher == "math"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"teacher": "mth"}, r"d.jsonl:2: teacher is 'mth', but the run's teachers are math, chat"),
        ({}, r"d.jsonl:2: no column 'teacher' names its teacher; the run's teachers are math, chat"),
        ({"teacher": 3}, r"d.jsonl:2: teacher is '3', but"),
        ({"teacher": ["math"]}, r"d.jsonl:2: teacher is \"\['math'\]\", but"),
    ],
    ids=["unknown", "missing", "number", "list"],
)
def test_a_row_of_no_known_teacher_is_a_bad_row(columns: Mapping[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        examples_of(rows_with({"teacher": "math"}, columns))


def test_a_source_names_the_teacher_of_all_its_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"question": "one", "teacher": "somebody"}])
    write_rows(tmp_path / "b.jsonl", [{"question": "two", "teacher": "chat"}] * 2)
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "teacher": "math", "weight": 2},
        {"path": str(tmp_path / "b.jsonl")},
    ]
    rows = resolve(sources, columns={"prompt": "question"})
    assert [each.prompt.teacher for each in examples_of(rows)] == ["math", "math", "chat", "chat"]
    with pytest.raises(UserError, match="set teacher_column: subject"):
        resolve(sources, columns={"prompt": "question", "teacher": "subject"})


def test_a_teacher_that_no_row_names_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with_teachers(tmp_path, two(), [NAMED[0]])
    assert "no row of the training data names the teacher chat" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with_teachers(tmp_path, two())
    assert "names the teacher" not in caplog.text


def test_records_of_no_known_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names the teacher 'chat', which is not there; .* one of math"):
        with_teachers(tmp_path, {"math": WIDE})
    with pytest.raises(UserError, match=r"names the teacher 'chat', which is not there; .* nothing, or give"):
        with_teachers(tmp_path, WIDE)
    with pytest.raises(UserError, match=r"names the teacher '', which is not there"):
        with_teachers(tmp_path, two(), EXAMPLES)
    held_out = [replace(NAMED[0], prompt=replace(NAMED[0].prompt, teacher="x"))]
    with pytest.raises(UserError, match=r"names the teacher 'x', which is not there"):
        with_teachers(tmp_path, two(), eval_dataset=held_out)


# ------ what is refused


@pytest.mark.parametrize(
    ("teachers", "options", "words"),
    [
        ({}, {}, "teachers is empty; give at least one"),
        ({"a b": WIDE}, {}, "teachers has the name 'a b'; take letters"),
        ({"math": None}, {}, "teachers names math, but no model"),
        ({"math": "self"}, {}, "the teacher math is 'self', .* stands alone; give the name"),
        (
            {"math": WIDE},
            {"vllm": "here", "teacher_signal": {"top_k": 4}},
            "several teachers, but vllm writes with one",
        ),
        ({"math": WIDE}, {"teacher_offload": "shared"}, "teacher_offload is 'shared', but there are several"),
        ({"math": WIDE}, {"template_from": "teacher"}, "template_from is 'teacher', but there are several"),
        ({"math": WIDE, "chat": "http://127.0.0.1:9"}, {}, "policy switch asks the teacher for each token"),
        ({"math": WIDE, "chat": "http://127.0.0.1:9"}, {"method": "gkd"}, "set teacher_signal"),
        (
            {"math": "http://127.0.0.1:9"},
            {"method": "gkd", "teacher_signal": {"top_k": 4}, "teacher_dtype": "float32"},
            "loaded by",
        ),
        (WIDE, {"teacher_column": "domain"}, "teacher_column is 'domain', but there is one teacher"),
        (
            {"math": WIDE, "chat": tiny_model("llama", vocab=60)},
            {},
            r"differ in the number of ids .*64 with math, 60 with",
        ),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_what_several_teachers_cannot_do_is_said(
    teachers: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        with_teachers(tmp_path, teachers, **options)


def test_an_engine_or_a_pair_of_one_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine is given, but there are several teachers"):
        with_teachers(tmp_path, two(), engine=SpeculativeEngine(PAIR))
    with pytest.raises(UserError, match=r"teacher_model is several \(math, chat\), but model is a pair with a teacher"):
        SwitchTrainer(PAIR, two(), args=SwitchConfig(output_dir=str(tmp_path)))


def test_a_student_in_parts_has_one_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchkd.training.machine.sharding_of", lambda state: "ZeRO-3")
    with pytest.raises(UserError, match=r"in parts \(ZeRO-3\), and there are several teachers"):
        check_sharding(Any, SwitchConfig(output_dir="unused"), PAIR, teachers=2)


# ------ run files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A second teacher, one of another vocabulary, and rows that name theirs."""
    folder = tmp_path_factory.mktemp("several")
    save(WIDE, tiny_tokenizer(), folder / "chat")
    save(WIDE, tiny_tokenizer(("other", "words")), folder / "foreign")
    rows = [json.loads(line) for line in (models / "data.jsonl").read_text().splitlines()]
    write_rows(
        folder / "named.jsonl", [{**row, "domain": ("math", "chat")[at // 4 % 2]} for at, row in enumerate(rows)]
    )
    return folder


def run_file(models: Path, folder: Path, tmp_path: Path, **changes: Any) -> Path:
    teachers = {"math": str(models / "teacher"), "chat": str(folder / "chat")}
    several = {"teacher": None, "teachers": teachers, "teacher_column": "domain"}
    return write_run(models, tmp_path, **{**several, "train_data": str(folder / "named.jsonl"), **changes})


def test_a_run_file_with_several_teachers(models: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    options = {"eval_data": str(folder / "named.jsonl"), "eval_strategy": "steps", "eval_steps": 2}
    run = run_file(models, folder, tmp_path, show_rollouts_every=1, max_steps=2, **options)
    assert switchkd("train", run) == 0
    out = tmp_path / "out"
    lines = [line for line in read_log(out / "log.jsonl") if "loss" in line]
    assert {line["teachers/math/rows"] + line["teachers/chat/rows"] for line in lines} == {1}
    card = (out / "README.md").read_text()
    assert "| teacher | math: `teacher`, chat: `chat` |" in card
    assert str(folder) not in card
    shown = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert {each["teacher"] for each in shown} == {"math", "chat"}
    assert all(each["teacher_favorites"] for each in shown)
    said = capsys.readouterr().out
    assert "learns from math: " in said
    assert "teacher chat " in said
    saved = yaml.safe_load((out / "run.yaml").read_text())
    assert (list(saved["teachers"]), saved["teacher_column"], saved["teacher"]) == (["math", "chat"], "domain", None)
    # A longer run goes on from what was saved; with other teachers it is another run.
    assert switchkd("train", out / "run.yaml", "--resume", "--set", "max_steps=3") == 0
    assert switchkd("train", out / "run.yaml", "--resume", "--set", f"teachers.chat={models / 'teacher'}") == 2
    assert "was started with" in capsys.readouterr().err
    assert switchkd("eval", out, "--sets", str(folder / "named.jsonl"), "--with-teacher") == 2
    assert "has several teachers (math, chat)" in capsys.readouterr().err
    assert switchkd("report", out) == 0


def test_stages_may_have_several_teachers_one_or_none(models: Path, folder: Path, tmp_path: Path) -> None:
    one = {"method": "kd", "teachers": None, "teacher": str(models / "teacher"), "teacher_column": "teacher"}
    stages = [{"method": "sft"}, {"method": "switch"}, one]
    assert switchkd("train", run_file(models, folder, tmp_path, max_steps=1, stages=stages)) == 0
    cards = [(tmp_path / "out" / place / "README.md").read_text() for place in ("1-sft", "2-switch", ".")]
    assert ["| teacher | none |" in cards[0], "chat: `chat`" in cards[1], "| teacher | `teacher` |" in cards[2]] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "x"}, "teacher and teachers are both set"),
        ({"teachers": None}, "teacher_column is 'domain', but there is one teacher"),
        ({"teachers": None, "teacher_column": None}, "needs a teacher"),
        ({"teachers": {"math": 3}}, "teachers is {'math': 3}"),
        ({"teachers": {"math": "./nowhere", "chat": "./nowhere"}}, "no such folder"),
        (
            {"teacher_column": "topic"},
            "12 rows: no column 'topic' names its teacher; the run's teachers are math, chat",
        ),
    ],
    ids=str,
)
def test_a_run_file_that_does_not_fit_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any], words: str, models: Path, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("switchkd.run.launch.load_pair", lambda *given, **named: pytest.fail("a model is loaded"))
    assert switchkd("train", run_file(models, folder, tmp_path, **changes)) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_the_teacher_with_another_tokenizer_is_named(
    models: Path, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("switchkd.run.launch.load_pair", lambda *given, **named: pytest.fail("a model is loaded"))
    teachers = {"math": str(models / "teacher"), "chat": str(folder / "foreign")}
    assert switchkd("train", run_file(models, folder, tmp_path, teachers=teachers)) == 2
    said = capsys.readouterr().err
    assert "teacher chat (" in said
    assert "the tokenizers of student and teacher differ" in said.replace("\n", " ")


def test_a_source_of_one_teacher_without_teachers_is_refused() -> None:
    values = {"student": "s", "teacher": "t", "output_dir": "o", "train_data": {"path": "d.jsonl", "teacher": "math"}}
    with pytest.raises(UserError, match=r"the data source d.jsonl says teacher: math, but there are no teachers"):
        run_from_values(values, "here").config()


def test_servers_alone_take_no_settings_of_what_is_loaded_here() -> None:
    served = {"math": "http://127.0.0.1:9", "chat": "http://127.0.0.1:8"}
    values = {
        "student": "s",
        "output_dir": "o",
        "train_data": "d.jsonl",
        "method": "gkd",
        "teacher_signal": {"top_k": 4},
    }
    run_from_values({**values, "teachers": served}, "here").config()
    run_from_values({**values, "teachers": {**served, "code": "x/y"}, "teacher_quantization": "8bit"}, "here").config()
    with pytest.raises(UserError, match="teacher_quantization is '8bit', but each teacher is loaded by its server"):
        run_from_values({**values, "teachers": served, "teacher_quantization": "8bit"}, "here").config()
