import json
import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from switchkd.data.examples import to_examples
from switchkd.data.rows import read_rows
from switchkd.errors import UserError
from switchkd.evaluation.generate import generate_answers
from switchkd.evaluation.kept import read_evaluation
from switchkd.evaluation.measures import SCORES, AnswerScore, exact_match, rouge_l, scores_named
from switchkd.evaluation.score import SEEDS, EvaluationSettings, evaluate
from switchkd.records import FinishReason, Rollout, Sampling
from switchkd.rollout.law import Student

WORDS = ["say", "one", "two", "three", "four", "red", "blue", "and", "then", "stop"]
ONCE = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each word; padding and end-of-text are the same id."""
    words = {word: i for i, word in enumerate(["<|end|>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>", pad_token="<|end|>")


class Parrot:
    """An engine whose student answers `answer(prompt text, seed)`, one row finished after the other."""

    def __init__(self, tokenizer, answer=lambda prompt, seed: prompt.removeprefix("say "), end="<|end|>"):
        self.tokenizer, self.answer, self.calls = tokenizer, answer, []
        self.end_id = tokenizer.convert_tokens_to_ids(end)

    def generate(self, prompts, policy, sampling=ONCE, seed=0, keep_teacher=None, on_progress=None):
        self.calls.append((len(prompts), policy, sampling, seed))
        rollouts = []
        for prompt in prompts:
            words = self.answer(self.tokenizer.decode(prompt.token_ids), seed)
            ids = self.tokenizer(words, add_special_tokens=False)["input_ids"] + [self.end_id]
            ids = tuple(ids[: sampling.max_new_tokens])
            ended = ids[-1] == self.end_id
            reason = FinishReason.END_OF_TEXT if ended else FinishReason.LENGTH
            nothing = (math.nan,) * len(ids)
            rollouts.append(Rollout(prompt, ids, (False,) * len(ids), nothing, nothing, nothing, nothing, reason))
            if on_progress:
                on_progress(len(rollouts))
        return rollouts


def rows_of(*answers, **columns):
    return read_rows([{"prompt": f"say {answer}", "completion": answer, **columns} for answer in answers])


# ------ the two measures


def test_rouge_l_by_hand():
    # Longest common subsequence 3 of 3 and of 4 words: precision 1, recall 3/4, F = 6/7.
    assert rouge_l("the cat sat", ["the cat sat down"]) == pytest.approx(600 / 7, rel=1e-12)
    # The stemmer makes "jumping" and "jumps" the same word; "was" stays a difference: 2 of 3 and of 3.
    assert rouge_l("Jumping he was!", ["jumps he did"]) == pytest.approx(200 / 3, rel=1e-12)


def test_the_best_reference_counts():
    assert rouge_l("one two", ["red", "one two", "blue"]) == 100
    assert exact_match("One, two.", ["red", "one  TWO"])


def test_rouge_l_reads_any_script():
    # Han counts by characters: 4 of 8 and of 5 in common.
    assert rouge_l("北京是中国的首都。", ["北京是中国的首都。"]) == 100
    assert rouge_l("北京是首都", ["北京是中国的首都"]) == pytest.approx(100 * 2 * 5 / (5 + 8), rel=1e-12)
    assert rouge_l("Москва большая", ["москва, столица"]) == 50
    # What English scores is published, and stays: rouge_score reads "caf" of "café", and nothing of a Greek letter.
    assert rouge_l("a caf", ["a café"]) == 100
    assert rouge_l("is wide", ["π is wide"]) == 100


def test_texts_of_punctuation_alone_are_compared_as_they_are():
    assert exact_match(" != ", ["!="])
    for match in ("text", "numeric", "lines"):
        assert not exact_match("!=", ["=="], match)
        assert not exact_match("", ["?"], match)
    assert exact_match("one.", ["one"])


def test_an_empty_answer_scores_nothing():
    assert rouge_l("", ["one"]) == 0
    assert not exact_match("", ["one"])


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("A: b\n c.", "a b c", True),
        ("it's", "its", True),
        ("a b", "ab", False),
        ("1 2", "1 2 3", False),
        ("naïve", "naive", False),
    ],
)
def test_exact_match_but_for_case_punctuation_and_spaces(answer, reference, same):
    assert exact_match(answer, [reference]) is same


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("-5", "5", False),
        ("3.5", "35", False),
        ("x is -5.", "X is \u22125.0", True),
        ("1,000", "1000.00", True),
        ("5-3", "5 3", True),
        (".5", "0.50", True),
        ("1, 2", "12", False),
        ("Five!", "five", True),
        ("a 5", "b 5", False),
    ],
)
def test_numeric_exact_match_goes_by_value(answer, reference, same):
    assert exact_match(answer, [reference], "numeric") is same


def test_the_match_of_an_evaluation_is_that_of_its_settings(tokenizer):
    with pytest.raises(UserError, match="match is 'number'; choose one of text, numeric"):
        EvaluationSettings(match="number")


def longest_common_subsequence(left, right):
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + longest_common_subsequence(left[:-1], right[:-1])
    return max(longest_common_subsequence(left[:-1], right), longest_common_subsequence(left, right[:-1]))


# Words of up to three letters, which the stemmer leaves alone.
sentences = st.lists(st.sampled_from(["a", "b", "cat"]), min_size=1, max_size=6)


@given(sentences, st.lists(sentences, min_size=1, max_size=3))
def test_rouge_l_is_the_definition_and_the_maximum_over_references(answer, references):
    scores = [200 * longest_common_subsequence(answer, one) / (len(answer) + len(one)) for one in references]
    # 2PR / (P + R) against 2L / (m + n): a few roundings in float64.
    assert rouge_l(" ".join(answer), [" ".join(one) for one in references]) == pytest.approx(max(scores), rel=1e-12)


def stemmed_words(text):
    """As rouge_score splits text: runs of a-z and 0-9 in lower case, those of more than three letters stemmed."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [PorterStemmer().stem(word) if len(word) > 3 else word for word in words]


def length_of_subsequence(left, right):
    longest = [0] * (len(right) + 1)
    for word in left:
        before = list(longest)
        for place, other in enumerate(right, start=1):
            longest[place] = before[place - 1] + 1 if word == other else max(before[place], longest[place - 1])
    return longest[-1]


def test_rouge_l_on_fifty_rows_is_that_of_an_independent_computation():
    forms = "The cats; flies flying! dies, relational generously Ångström's café 3.5 x-ray\trivers RIVERS running runs a of was"
    draw = random.Random(15)

    def text(fewest, most):
        return " ".join(draw.choices(forms.split(), k=draw.randint(fewest, most)))

    scores = []
    for _ in range(50):
        answer, references = text(0, 25), [text(1, 25) for _ in range(draw.randint(2, 4))]
        words = stemmed_words(answer)
        each = []
        for reference in map(stemmed_words, references):
            common = length_of_subsequence(words, reference)
            each.append(200 * common / (len(words) + len(reference)))
        # Against 2PR / (P + R): a few roundings in float64.
        assert rouge_l(answer, references) == pytest.approx(max(each), rel=1e-12)
        scores.append((max(each), each[0]))
    # Neither the maximum over references nor the score itself is the same everywhere.
    assert len({best for best, _ in scores}) > 30
    assert sum(best > first for best, first in scores) > 20


# ------ answers


def examples_of(rows, tokenizer):
    limits = {"max_prompt_tokens": 20, "max_response_tokens": 8}
    return to_examples(rows, tokenizer, need_response=True, **limits).examples


def test_answers_come_in_the_order_of_the_examples(tokenizer):
    rows = rows_of("one", "one two three", "red", "one two", "blue")
    engine, told = Parrot(tokenizer), []
    answers = generate_answers(engine, tokenizer, examples_of(rows, tokenizer), ONCE, 3, told.append)
    assert [answer.text for answer in answers] == [row.columns["completion"] for row in rows]
    assert [answer.prompt_id for answer in answers] == [0, 1, 2, 3, 4]
    # One call: the engine fills the places of finished rows itself.
    assert engine.calls == [(5, Student(), ONCE, 3)]
    assert told == [1, 2, 3, 4, 5]


def test_the_end_token_is_counted_but_not_in_the_text(tokenizer):
    (example,) = examples_of(rows_of("one two three"), tokenizer)
    for limit, text, tokens, reason in (
        (8, "one two three", 4, FinishReason.END_OF_TEXT),
        (4, "one two three", 4, FinishReason.END_OF_TEXT),
        (3, "one two three", 3, FinishReason.LENGTH),
        (2, "one two", 2, FinishReason.LENGTH),
    ):
        (answer,) = generate_answers(Parrot(tokenizer), tokenizer, [example], Sampling(limit), 0)
        assert (answer.text, answer.tokens, answer.finish_reason) == (text, tokens, reason)


def test_an_end_token_that_the_tokenizer_does_not_know_as_one_is_left_out_too(tokenizer):
    engine = Parrot(tokenizer, end="stop")
    (answer,) = generate_answers(engine, tokenizer, examples_of(rows_of("one"), tokenizer), ONCE, 0)
    assert (answer.text, answer.tokens) == ("one", 2)


def test_special_tokens_inside_an_answer_are_not_text(tokenizer):
    engine = Parrot(tokenizer, lambda prompt, seed: "one <|end|> two", end="stop")
    (answer,) = generate_answers(engine, tokenizer, examples_of(rows_of("one"), tokenizer), ONCE, 0)
    assert answer.text == "one two"


# ------ evaluations


def evaluated(engine, tokenizer, sets, out_folder=None, show_progress=False, **settings):
    settings = EvaluationSettings(**settings)
    return evaluate(
        engine,
        tokenizer,
        sets,
        model_name="tiny",
        settings=settings,
        out_folder=out_folder,
        show_progress=show_progress,
    )


def right_on_seed_10(prompt, seed):
    return prompt.removeprefix("say ") if seed == 10 else "stop"


def test_mean_and_deviation_over_seeds(tokenizer):
    engine, rows = Parrot(tokenizer, right_on_seed_10), rows_of("one two", "red")
    result = evaluated(engine, tokenizer, {"x": rows}, sampling=ONCE, seeds=(10, 20)).sets["x"].overall
    assert result.rows == 2
    assert result.per_seed[10].exact_match == result.per_seed[10].rouge_l == 100
    assert result.per_seed[20].exact_match == result.per_seed[20].rouge_l == 0
    assert result.mean.exact_match == 50
    # Sample deviation of 100 and 0: 100 / sqrt(2); of the mean response tokens 2.5 and 2: 0.5 / sqrt(2).
    assert result.deviation.exact_match == pytest.approx(100 / math.sqrt(2), rel=1e-12)
    assert result.deviation.response_tokens == pytest.approx(0.5 / math.sqrt(2), rel=1e-12)
    assert result.mean.ended_share == 1


def test_buckets_are_scored_each_for_itself(tokenizer):
    rows = read_rows(
        [
            {"prompt": f"say {answer}", "completion": answer, "bucket": "long" if " " in answer else "short"}
            for answer in ("one", "red", "one two three")
        ]
    )
    result = evaluated(Parrot(tokenizer), tokenizer, {"world": rows}, sampling=Sampling(2), seeds=(1,)).sets["world"]
    assert {name: (one.rows, one.mean.exact_match, one.mean.ended_share) for name, one in result.by_bucket.items()} == {
        "short": (2, 100, 1),
        "long": (1, 0, 0),
    }
    assert result.overall.mean.exact_match == pytest.approx(200 / 3, rel=1e-12)
    assert result.overall.deviation is None
    assert evaluated(Parrot(tokenizer), tokenizer, {"x": rows_of("one")}).sets["x"].by_bucket == {}


def test_what_is_written_is_what_is_returned(tokenizer, tmp_path):
    sampling = Sampling(max_new_tokens=8, top_p=0.9)
    folder = tmp_path / "new" / "run"
    engine, sets = Parrot(tokenizer, right_on_seed_10), {"owner/x:test": rows_of("one two", "red")}
    evaluation = evaluated(engine, tokenizer, sets, folder, sampling=sampling, seeds=(10, 20))
    assert {path.name for path in folder.iterdir()} == {"eval.json", "answers_owner_x_test.jsonl"}

    saved = json.loads((folder / "eval.json").read_text())
    overall = evaluation.sets["owner/x:test"].overall
    assert (saved["model"], saved["seeds"], saved["date"]) == ("tiny", [10, 20], evaluation.date)
    assert saved["sampling"] == {
        "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "no_repeat_ngram_size": 0,
    }  # fmt: skip
    assert saved["sets"]["owner/x:test"]["overall"]["mean"]["rouge_l"] == overall.mean.rouge_l
    assert saved["sets"]["owner/x:test"]["overall"]["per_seed"]["20"]["ended_share"] == 1

    lines = [json.loads(line) for line in (folder / "answers_owner_x_test.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["prompt_id"], line["answer"]) for line in lines] == [
        (10, 0, "one two"), (10, 1, "red"), (20, 0, "stop"), (20, 1, "stop"),
    ]  # fmt: skip
    assert lines[2] | {} == {
        "where": "row 0", "prompt_id": 0, "seed": 20, "bucket": None, "prompt": "say one two", "answer": "stop",
        "references": ["one two"], "rouge_l": 0.0, "exact_match": False, "tokens": 2, "finish_reason": "end_of_text",
        "scores": {},
    }  # fmt: skip


def test_prompts_alone_are_scored_by_a_function_of_ones_own(tokenizer, tmp_path):
    words = AnswerScore("words", lambda prompt, answer, references: len(answer.split()) + 10 * len(references))
    prompts = read_rows([{"prompt": "say one two"}, {"prompt": "say red"}])
    engine, settings = Parrot(tokenizer), {"sampling": ONCE, "seeds": (1,), "scores": (words,)}
    evaluation = evaluated(engine, tokenizer, {"x": prompts, "y": rows_of("one")}, tmp_path, **settings)
    assert evaluation.sets["x"].overall.mean.own == {"words": 1.5}
    assert evaluation.sets["y"].overall.mean.own == {"words": 11}
    assert math.isnan(evaluation.sets["x"].overall.mean.rouge_l)
    # JSON has no NaN, and many readers take none.
    saved = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert saved["sets"]["x"]["overall"]["mean"]["exact_match"] is None
    # What is read is what was saved: NaN, buckets, seeds and all.
    read_evaluation(tmp_path / "eval.json").save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == saved
    console = Console(width=120)
    with console.capture() as captured:
        console.print(evaluation.table())
    (line,) = [line for line in captured.get().splitlines() if " x " in line]
    assert line.split() == ["x", "2", "-", "-", "2.50", "100.00", "1.50"]
    with pytest.raises(UserError, match="no row of x has a response to compare answers with"):
        evaluated(engine, tokenizer, {"x": prompts}, scores=(words, SCORES["numeric_match"]))


def test_a_score_that_fails_costs_no_answer(tokenizer, tmp_path):
    def broken(prompt, answer, references):
        return None if answer == "red" else 1.0

    with pytest.raises(UserError, match="the score broken failed"):
        evaluated(
            Parrot(tokenizer),
            tokenizer,
            {"x": rows_of("one", "red")},
            tmp_path,
            scores=(AnswerScore("broken", broken),),
        )
    lines = [json.loads(line) for line in (tmp_path / "answers_x.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines[:2]] == ["one", "red"]


def test_a_score_may_have_nothing_to_say_of_an_answer(tokenizer):
    scores = (AnswerScore("length", lambda prompt, answer, references: math.nan if answer == "red" else 4.0),)
    result = evaluated(Parrot(tokenizer), tokenizer, {"x": rows_of("one", "red")}, seeds=(1,), scores=scores)
    assert result.sets["x"].overall.mean.own == {"length": 4.0}


def test_no_score_takes_the_place_of_another():
    with pytest.raises(UserError, match="'exact_match' has the name of a column"):
        EvaluationSettings(scores=(SCORES["exact_match"],))
    with pytest.raises(UserError, match="two scores are called 'sqrt'"):
        scores_named(["math:sqrt", "cmath:sqrt"])


def test_no_two_sets_share_a_file(tokenizer, tmp_path):
    engine, rows = Parrot(tokenizer), rows_of("one")
    evaluated(engine, tokenizer, {"一.jsonl": rows, "二.jsonl": rows, f"{'far/' * 80}x": rows}, tmp_path, seeds=(1,))
    assert len([*tmp_path.glob("answers_*.jsonl")]) == 3
    engine.calls.clear()
    with pytest.raises(UserError, match=r"the answers to a/b\.jsonl and a_b\.jsonl would share a file"):
        evaluated(engine, tokenizer, {"a/b.jsonl": rows, "a_b.jsonl": rows}, tmp_path)
    assert not engine.calls


def test_a_bucket_is_a_name_and_not_all_rows(tokenizer):
    rows = read_rows([{"prompt": "say one", "completion": "one", "bucket": each} for each in (["a"], "all", "b")])
    assert [*evaluated(Parrot(tokenizer), tokenizer, {"x": rows}, seeds=(1,)).sets["x"].by_bucket] == ["b"]


def test_rows_that_cannot_be_used_are_left_out_and_named(tokenizer):
    rows = read_rows([{"prompt": "say " * 9, "completion": "one"}, {"prompt": "say two", "completion": "two"}])
    result = evaluated(Parrot(tokenizer), tokenizer, {"x": rows}, seeds=(1,), max_prompt_tokens=8)
    assert [(bad.where, bad.reason) for bad in result.sets["x"].skipped] == [
        ("row 0", "the prompt has 9 tokens; max_prompt_tokens is 8")
    ]
    assert result.sets["x"].overall.rows == 1
    assert result.sets["x"].overall.mean.exact_match == 100


def test_nothing_is_generated_when_one_set_has_no_row_to_use(tokenizer):
    engine = Parrot(tokenizer)
    with pytest.raises(UserError, match="no row of y has a response"):
        evaluated(engine, tokenizer, {"x": rows_of("one"), "y": read_rows([{"prompt": "say"}])})
    with pytest.raises(UserError, match="No row is left"):
        evaluated(engine, tokenizer, {"x": rows_of("one"), "y": read_rows([{"answer": "say"}])})
    assert engine.calls == []
    with pytest.raises(UserError, match="seeds is empty"):
        EvaluationSettings(seeds=())


@pytest.mark.parametrize(
    ("temperature", "seeds", "used"), [(1.0, SEEDS, SEEDS), (1.0, (3, 3, 4), (3, 4)), (0.0, SEEDS, SEEDS[:1])]
)
def test_seeds_are_used_once_and_greedy_decoding_needs_one(tokenizer, temperature, seeds, used):
    engine = Parrot(tokenizer)
    evaluation = evaluated(engine, tokenizer, {"x": rows_of("one")}, sampling=Sampling(8, temperature), seeds=seeds)
    assert evaluation.seeds == used == tuple(seed for *_, seed in engine.calls)


def test_the_table_shows_sets_buckets_and_deviations(tokenizer):
    engine, rows = Parrot(tokenizer, right_on_seed_10), rows_of("one", bucket="short")
    evaluation = evaluated(engine, tokenizer, {"x": rows}, sampling=ONCE, seeds=(10, 20))
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(evaluation.table())
    text = captured.get()
    assert "tiny: 2 seed(s), temperature 1" in text
    assert text.count("50.00 ± 70.71") == 4
    assert "  short" in text


def test_names_in_a_table_are_no_markup(tokenizer):
    rows = read_rows([{"prompt": "say one", "completion": "one", "bucket": "hard [/b]"}])
    console = Console(width=120)
    with console.capture() as captured:
        console.print(evaluated(Parrot(tokenizer), tokenizer, {"[a.jsonl, b.jsonl]": rows}, seeds=(1,)).table())
    assert "hard [/b]" in captured.get()
    assert "[a.jsonl, b.jsonl]" in captured.get()


def test_the_progress_bar_counts_all_answers(tokenizer, capsys):
    sets = {"x": rows_of("one", "two"), "y": rows_of("red")}
    evaluated(Parrot(tokenizer), tokenizer, sets, seeds=(1, 2), show_progress=True)
    assert "6/6" in capsys.readouterr().out
    evaluated(Parrot(tokenizer), tokenizer, sets, seeds=(1, 2))
    assert capsys.readouterr().out == ""
