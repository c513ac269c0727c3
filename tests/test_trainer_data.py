"""The models and the data that the trainer takes, and what it refuses before the first forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from switchkd.errors import UserError
from switchkd.evaluation.measures import AnswerScore, exact_match, rouge_l
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Rollout
from switchkd.training.trainer import SwitchTrainer
from tiny import tiny_pair, tiny_tokenizer
from trainers import (
    EXAMPLES,
    PROMPTS_ONLY,
    TEXT_ROWS,
    RecordingEngine,
    assert_same_weights,
    make_examples,
    make_trainer,
    weights,
)


def refused(folder: Path, pair: ModelPair, rows: Any, **options: Any) -> str:
    """What the trainer says against the data; fails where it ran a model first."""
    handles = [
        model.register_forward_pre_hook(lambda module, inputs: pytest.fail("a model ran before the data was checked"))
        for model in (pair.student, pair.teacher)
        if model is not None
    ]
    with pytest.raises(UserError) as caught:
        make_trainer(folder, pair, rows, **options)
    for handle in handles:
        handle.remove()
    return str(caught.value)


@pytest.mark.parametrize(
    "method", [{"method": "switch"}, {"method": "gkd", "student_share": 1.0}], ids=lambda method: method["method"]
)
@pytest.mark.parametrize("rows", [[{"prompt": row["prompt"]} for row in TEXT_ROWS], PROMPTS_ONLY], ids=["text", "ids"])
def test_prompts_alone_are_enough_where_all_text_is_rolled_out(
    method: dict[str, Any], rows: list[Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama", tokenizer=tiny_tokenizer()), rows, **method)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    "method",
    [{"method": "sft"}, {"method": "kd"}, {"method": "gkd", "student_share": 0.5}],
    ids=lambda method: method["method"],
)
@pytest.mark.parametrize("rows", [[{"prompt": row["prompt"]} for row in TEXT_ROWS], PROMPTS_ONLY], ids=["text", "ids"])
def test_prompts_alone_are_refused_before_any_forward_where_text_is_trained_on(
    method: dict[str, Any], rows: list[Any], tmp_path: Path
) -> None:
    message = refused(tmp_path, tiny_pair("llama", tokenizer=tiny_tokenizer()), rows, **method)
    assert "no response" in message


def test_a_set_of_prompts_is_evaluated_on_the_students_own_text(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainer = make_trainer(tmp_path, pair, eval_dataset=PROMPTS_ONLY, method="kd")
    engine = RecordingEngine(trainer)
    first, again = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == again > 0
    # The same text as a set with responses has the same loss.
    written = [Example(rollout.prompt, rollout.token_ids) for rollout in engine.calls[0]]
    given = make_trainer(tmp_path, pair, eval_dataset=written, method="kd").evaluate()["eval_loss"]
    assert first == pytest.approx(given, rel=1e-5)


def test_the_loss_of_an_evaluation_leaves_out_the_long_term_term_which_has_no_value(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    of_minillm, of_reverse_kl = (
        make_trainer(tmp_path, pair, eval_dataset=PROMPTS_ONLY, **method).evaluate()["eval_loss"]
        for method in ({"method": "minillm"}, {"method": "imitkd", "divergence": "reverse_kl"})
    )
    assert of_minillm == pytest.approx(of_reverse_kl, rel=1e-5)


def test_an_evaluation_in_which_no_token_would_count_is_refused(tmp_path: Path) -> None:
    weight = {"name": "by_writer", "student": 0}
    with pytest.raises(UserError, match="a weight leaves its tokens out"):
        make_trainer(tmp_path, tiny_pair("llama"), eval_dataset=PROMPTS_ONLY, weight=weight)


def test_answers_are_scored_by_our_measures_and_by_a_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grading.py").write_text(
        "def words(prompt, answer, references):\n    return len(prompt) + 100 * len(answer) + len(references) / 8\n"
    )
    monkeypatch.chdir(tmp_path)
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    assert pair.tokenizer is not None
    prompts = [{"prompt": "one two"}, {"prompt": "sun"}]
    trainer = make_trainer(tmp_path, pair, eval_dataset=prompts, method="gkd", eval_scores="grading:words")
    engine = RecordingEngine(trainer)
    assert {"eval_loss", "eval_words"} <= trainer.evaluate().keys()
    written = [rollout.token_ids for call in engine.calls for rollout in call]
    answers = [pair.tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in written]

    # The same draws once more: the first answer is its own reference.
    references = [[answers[0]], ["red"]]
    rows = [{**row, "completion": each[0]} for row, each in zip(prompts, references, strict=True)]
    scores = ["rouge_l", "numeric_match", "grading:words"]
    trainer = make_trainer(tmp_path, pair, eval_dataset=rows, method="gkd", eval_scores=scores)
    metrics = trainer.evaluate()
    expected = {
        "rouge_l": (100 + rouge_l(answers[1], references[1])) / 2,
        "numeric_match": (100 + 100 * exact_match(answers[1], references[1], "numeric")) / 2,
        "words": sum(
            (len(row["prompt"]) + 100 * len(answer) + 1 / 8) / 2 for row, answer in zip(rows, answers, strict=True)
        ),
    }
    # The same sums in another order: rounding of float64.
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-12)
    # The loss is that on the data set's responses, as without scores.
    alone = make_trainer(tmp_path, pair, eval_dataset=rows, method="gkd").evaluate()
    assert metrics["eval_loss"] == alone["eval_loss"]
    # Rows that are given later are read in the same way.
    later = make_trainer(tmp_path, pair, method="gkd", eval_scores=scores)
    assert later.evaluate(rows)["eval_words"] == metrics["eval_words"]
    with pytest.raises(UserError, match="the score words failed with ZeroDivisionError: division by zero"):
        AnswerScore("words", lambda prompt, answer, references: 1 / 0)("one", "sun", ())


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ("rouge", "there is no score 'rouge'"),
        ("exact_mach", "did you mean 'exact_match'?"),
        ("nowhere:f", "score 'nowhere:f' cannot be imported"),
        ("json:__name__", "it has to be a function"),
        ("rouge_l", "eval_scores has rouge_l, which compares with answers, but no row of the evaluation data has one"),
    ],
)
def test_scores_that_cannot_be_are_refused(scores: str, said: str, tmp_path: Path) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    prompts = [{"prompt": "one two"}, {"prompt": "sun"}]
    assert said in refused(tmp_path, pair, EXAMPLES, eval_dataset=prompts, eval_scores=scores)


def test_evaluation_data_has_responses_in_all_rows_or_in_none_and_without_a_teacher_in_all(tmp_path: Path) -> None:
    some = [*EXAMPLES[:2], *PROMPTS_ONLY[2:]]
    assert "6 of 8 examples have no response" in refused(tmp_path, tiny_pair("llama"), EXAMPLES, eval_dataset=some)
    message = refused(tmp_path, tiny_pair("llama"), EXAMPLES, eval_dataset=PROMPTS_ONLY, method="sft")
    assert "no row of the evaluation data has a response" in message


def test_what_no_set_is_gets_a_sentence(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(TEXT_ROWS)
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    for given, sentence in (
        (rows.to_iterable_dataset(), "an IterableDataset, whose rows cannot be counted"),
        (
            datasets.DatasetDict(train=rows, test=rows),
            "a DatasetDict of train, test; pass one of them, such as ds['train']",
        ),
    ):
        assert sentence.removeprefix("an ").removeprefix("a ") in refused(tmp_path, pair, given)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    student = tiny_pair("llama").student
    with pytest.raises(UserError, match="tokenizer"):
        SwitchTrainer(student, args=SwitchConfig(output_dir=str(tmp_path), method="sft"), train_dataset=TEXT_ROWS)


def test_several_evaluation_sets_are_evaluated_each(tmp_path: Path) -> None:
    sets = {"short": EXAMPLES[:3], "rest": EXAMPLES[3:]}
    trainer = make_trainer(tmp_path, tiny_pair("llama"), eval_dataset=sets, method="kd")
    each = trainer.evaluate()
    for name, examples in sets.items():
        alone = make_trainer(tmp_path, tiny_pair("llama"), eval_dataset=examples, method="kd").evaluate()
        assert each[f"eval_{name}_loss"] == alone["eval_loss"]


def test_models_and_data_go_by_name(tmp_path: Path) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    assert pair.teacher is not None
    assert pair.tokenizer is not None
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in TEXT_ROWS))
    named = SwitchTrainer(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        args=make_trainer(tmp_path, pair, TEXT_ROWS).args,
        train_dataset=data,
    )
    named.train()
    given = make_trainer(tmp_path, pair, TEXT_ROWS)
    given.train()
    assert_same_weights(weights(named), weights(given))


def test_a_pair_is_taken_as_it_is(tmp_path: Path) -> None:
    pair, same = tiny_pair("llama"), tiny_pair("llama")
    taken = SwitchTrainer(pair, args=make_trainer(tmp_path, same).args, train_dataset=EXAMPLES)
    assert taken.pair is pair
    apart = make_trainer(tmp_path, same)
    for trainer in (taken, apart):
        trainer.train()
    assert_same_weights(weights(taken), weights(apart))


def test_a_pair_of_the_student_alone_takes_itself_as_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trained, config = [], peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    args = make_trainer(tmp_path, tiny_pair("llama")).args
    for as_pair in (True, False):
        student = tiny_pair("llama").student
        torch.manual_seed(0)
        trainer = SwitchTrainer(ModelPair(student) if as_pair else student, "self", args, EXAMPLES, peft_config=config)
        trainer.train()
        trained.append(weights(trainer))
    assert_same_weights(*trained)


def test_a_pair_beside_another_teacher_or_tokenizer_is_refused(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    for more in ({"teacher_model": pair.teacher}, {"teacher_model": "self"}, {"processing_class": tiny_tokenizer()}):
        with pytest.raises(UserError, match=r"model is a pair.*leave teacher_model and processing_class out"):
            SwitchTrainer(pair, args=SwitchConfig(output_dir=str(tmp_path)), train_dataset=EXAMPLES, **more)


def test_keywords_of_transformers_reach_its_trainer(tmp_path: Path) -> None:
    pair, args = tiny_pair("llama"), SwitchConfig(output_dir=str(tmp_path), method="sft")
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=0.1)
    trainer = SwitchTrainer(pair, args=args, train_dataset=EXAMPLES, optimizers=(optimizer, None))
    assert trainer.optimizer is optimizer
    with pytest.raises(UserError, match="SwitchTrainer takes no no_such_option"):
        SwitchTrainer(pair, args=args, train_dataset=EXAMPLES, no_such_option=1)


def test_a_named_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    assert pair.teacher is not None
    pair.teacher.save_pretrained(tmp_path)
    tiny_tokenizer(words=("three", "two", "one")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizers of student and teacher differ"):
        SwitchTrainer(pair.student, str(tmp_path), processing_class=pair.tokenizer, train_dataset=TEXT_ROWS)


def test_sft_needs_no_teacher_and_every_other_method_says_that_it_does(tmp_path: Path) -> None:
    student_alone = ModelPair(tiny_pair("llama").student)
    with_teacher = make_trainer(tmp_path, tiny_pair("llama"), method="sft")
    without = make_trainer(tmp_path, student_alone, method="sft")
    without.train()
    with_teacher.train()
    assert_same_weights(weights(without), weights(with_teacher))
    for method in ("kd", "gkd", "switch"):
        with pytest.raises(UserError, match="but none was given; set teacher_model"):
            make_trainer(tmp_path, student_alone, method=method)


class NoEngine:
    def generate(self, *arguments: Any, **named: Any) -> list[Rollout]:
        pytest.fail("rolled out")


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_methods_on_given_text_roll_nothing_out(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), method=method, engine=NoEngine())
    trainer.train()
    assert "response_tokens" not in trainer.state.log_history[0]


def test_the_student_share_is_a_coin_for_each_sequence(tmp_path: Path) -> None:
    pair, examples = tiny_pair("llama", layers=1), make_examples(200)
    chosen = {}
    for split in ((40, 1), (8, 5)):
        trainer = make_trainer(
            tmp_path, pair, examples, split=split, method="gkd", student_share=0.3, max_new_tokens=1, max_steps=10
        )
        engine = RecordingEngine(trainer)
        trainer.train()
        chosen[split] = [[rollout.prompt.prompt_id for rollout in call] for call in engine.calls]
    first, second = chosen.values()
    assert first == second
    # 400 coins of 0.3 in all have a deviation of 9.2.
    assert abs(sum(map(len, first)) - 120) < 3 * 9.2
    # Each row comes up once in five steps; a new coin in the second epoch picks others.
    assert {row for call in first[:5] for row in call} != {row for call in first[5:] for row in call}


@pytest.mark.parametrize(("method", "fits"), [("switch", False), ("kd", True)])
def test_sequences_that_do_not_fit_are_refused_before_training(method: str, fits: bool, tmp_path: Path) -> None:
    pair = tiny_pair("gpt2", max_position_embeddings=24)
    if fits:
        make_trainer(tmp_path, pair, method=method, max_new_tokens=40)
    else:
        with pytest.raises(UserError, match="knows 24 positions"):
            make_trainer(tmp_path, pair, method=method, max_new_tokens=40)
