"""The small world: exact answers, disjoint splits, lengths, its tokenizer and its models."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

import switchkd
from switchkd.data import world

ASSETS = Path(switchkd.__file__).parent / "assets" / "world"
BUCKETS = list(world.BUCKETS)
FIRST_PROMPT = "Take from 55: a 1, b 4, c 4.\n"
Row = dict[str, str]


def rows_of(task: str, each: int = 12) -> list[Row]:
    found: list[Row] = []
    for bucket in BUCKETS:
        rows = world.stream("train", 3, bucket=bucket, task=task)
        found += [next(rows) for _ in range(each)]
    return found


def test_there_are_six_kinds_of_task_and_every_kind_reaches_every_bucket() -> None:
    assert len(world.TASKS) >= 6
    for task in world.TASKS:
        assert {row["bucket"] for row in rows_of(task, 1)} == set(BUCKETS)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_rows_are_distinct_lie_in_their_bucket_and_share_it_out_evenly(bucket: str) -> None:
    low, high = world.BUCKETS[bucket]
    rows = world.make_rows("test", 140, seed=1, bucket=bucket)
    assert len({row["prompt"] for row in rows}) == len(rows) == 140
    assert len({row["source_id"] for row in rows}) == 140
    tasks = [row["task"] for row in rows]
    for row in rows:
        assert set(row) == {"prompt", "completion", "task", "bucket", "source_id"}
        assert row["bucket"] == bucket
        assert low <= world.token_count(row["completion"]) <= high
        assert row["prompt"].endswith("\n")
        assert row["completion"] == row["completion"].strip()
    assert all(tasks.count(task) >= 12 for task in world.TASKS)


def test_rows_depend_on_the_arguments_alone() -> None:
    assert world.make_rows("train", 30, seed=4) == world.make_rows("train", 30, seed=4)
    assert world.make_rows("train", 30, seed=4) != world.make_rows("train", 30, seed=5)
    mixed = world.make_rows("test", 10, seed=4)
    assert [row["bucket"] for row in mixed] == (BUCKETS * 4)[:10]
    assert world.make_rows("test", 6, seed=4) == mixed[:6]
    # The same on every machine and in every process.
    assert world.split_of("Spell: sun, rain.\n") == "train"
    assert world.make_rows("train", 1, seed=0, bucket="short")[0]["prompt"] == FIRST_PROMPT


def test_train_and_test_never_share_a_prompt() -> None:
    train = {row["prompt"] for row in world.make_rows("train", 3000, seed=1)}
    test = {row["prompt"] for row in world.make_rows("test", 600, seed=1)}
    assert not train & test
    assert {world.split_of(prompt) for prompt in train} == {"train"}
    assert {world.split_of(prompt) for prompt in test} == {"test"}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown bucket"):
        world.make_rows("train", 1, seed=0, bucket="huge")
    with pytest.raises(ValueError, match="unknown split"):
        world.make_rows("dev", 1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown task"):
        next(world.stream("train", 0, task="dance"))
    with pytest.raises(ValueError, match="outside"):
        world.TASKS["sort"](Random(0), 27)


def test_take_takes_each_digit_from_what_is_left() -> None:
    for row in rows_of("take"):
        number = int(re.findall(r"from (\d+):", row["prompt"])[0])
        asked = re.findall(r"([a-z]) (\d)[,.]", row["prompt"])
        lines = [re.fullmatch(r"([a-z]): (\d+) - (\d) = (\d+)", x) for x in row["completion"].split("\n")]
        found = [line.groups() for line in lines if line]
        assert [(label, digit) for label, _, digit, _ in found] == asked
        assert len(found) == len(lines)
        for _, before, digit, after in found:
            assert int(before) == number
            number -= int(digit)
            assert int(after) == number


def test_sort_inserts_each_letter_and_ends_sorted() -> None:
    for row in rows_of("sort"):
        letters = row["prompt"].removesuffix(".\n").split(": ")[1].split()
        lines = [line.split(": ") for line in row["completion"].split("\n")]
        assert [label for label, _ in lines] == letters
        seen: set[str] = set()
        for label, shown in lines:
            seen.add(label)
            parts = shown.split()
            assert set(parts) == seen
            assert len(parts) == len(seen)
            assert all(a < b for a, b in pairwise(parts))


def test_add_gives_the_sum_of_the_two_numbers() -> None:
    for row in rows_of("add"):
        columns = re.findall(r"([a-z]) (\d) (\d)", row["prompt"])
        upper = int("".join(c[1] for c in reversed(columns)))
        lower = int("".join(c[2] for c in reversed(columns)))
        lines = [
            re.fullmatch(r"([a-z]): (\d) \+ (\d) \+ (\d) = (\d+), carry (\d)", line)
            for line in row["completion"].split("\n")
        ]
        found = [line.groups() for line in lines if line]
        assert [f[:3] for f in found] == columns
        assert len(found) == len(lines)
        assert [f[3] for f in found] == ["0", *(f[5] for f in found[:-1])]
        digits = "".join(f[4][-1] for f in reversed(found))
        assert int(found[-1][5] + digits) == upper + lower


def test_spell_gives_the_letters_of_each_word() -> None:
    for row in rows_of("spell"):
        words = row["prompt"].removesuffix(".\n").split(": ")[1].split(", ")
        lines = [line.split(": ") for line in row["completion"].split("\n")]
        assert [word for word, _ in lines] == words
        assert ["".join(letters.split(" ")) for _, letters in lines] == words


def test_json_is_json_and_says_what_the_sentences_say() -> None:
    for row in rows_of("json"):
        asked, told = row["prompt"].split(" as JSON: ")
        keys = asked.removeprefix("Extract ").split(", ")
        people = re.findall(r"([A-Z]\w+) is (\d+) and lives in ([A-Z]\w+)\.", told)
        answer = json.loads(row["completion"])
        assert [list(record) for record in answer] == [keys] * len(people)
        for record, (name, age, city) in zip(answer, people, strict=True):
            truth = {"name": name, "age": int(age), "city": city}
            assert record == {key: truth[key] for key in keys}


def test_order_keeps_the_rows_and_sorts_their_letters() -> None:
    for row in rows_of("order"):
        given = row["prompt"].removesuffix(".\n").split(": ")[1].split(", ")
        lines = [line.replace(":", "", 1) for line in row["completion"].split("\n")]
        assert len(set(given)) == len(lines)
        assert set(given) == set(lines)
        assert all(a[0] < b[0] for a, b in pairwise(lines))


def test_reverse_ends_with_the_letters_backwards() -> None:
    for row in rows_of("reverse"):
        letters = row["prompt"].removesuffix(".\n").split(": ")[1].split()
        lines = [line.split() for line in row["completion"].split("\n")]
        assert lines[-1] == letters[::-1]
        assert [line[0] for line in lines] == letters
        assert all(b[1:] == a for a, b in pairwise(lines))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_tokenizer_is_lossless_and_counts_as_the_world_does(role: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / role)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (world.PAD, world.END)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for row in world.make_rows("test", 150, seed=2) + world.make_rows("train", 150, seed=2):
        whole = tokenizer.encode(row["prompt"] + row["completion"])
        prompt, answer = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        assert whole == prompt + answer, "nothing is added and the border is a token border"
        assert tokenizer.unk_token_id not in whole
        assert tokenizer.decode(prompt) == row["prompt"]
        assert tokenizer.decode(answer) == row["completion"]
        assert len(answer) + 1 == world.token_count(row["completion"])
        assert len(whole) + 1 <= 384


def test_the_vocabulary_has_every_letter_digit_and_word_with_and_without_a_blank() -> None:
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(ASSETS / "teacher").get_vocab()
    every = [*world.LETTERS, *"0123456789", *world.WORDS, *world.NAMES, *world.CITIES]
    assert {blank + item for item in every for blank in ("", " ")} <= set(vocabulary)


def test_both_models_have_one_vocabulary_and_are_small() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    limits = {"teacher": 4_000_000, "student": 500_000}
    vocabularies = []
    for role, limit in limits.items():
        model = AutoModelForCausalLM.from_pretrained(ASSETS / role)
        assert sum(p.numel() for p in model.parameters()) <= limit
        assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
        assert model.config.model_type == "llama"
        assert model.config.max_position_embeddings >= 384
        vocabularies.append(AutoTokenizer.from_pretrained(ASSETS / role).get_vocab())
        assert model.config.vocab_size == len(vocabularies[-1])
    assert vocabularies[0] == vocabularies[1]
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 12_000_000


def exact_share(role: str, bucket: str) -> float:
    """Return the share of 14 test rows that a shipped model answers exactly by greedy decoding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / role
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = world.make_rows("test", 14, seed=7, bucket=bucket)
    given = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    limit = world.BUCKETS[bucket][1]
    out = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=limit,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(t == r["completion"] for t, r in zip(texts, rows, strict=True)) / len(rows)


def test_the_shipped_teacher_solves_the_world_and_the_student_does_not_yet() -> None:
    assert exact_share("teacher", "short") >= 0.9
    assert exact_share("teacher", "medium") >= 0.8
    assert exact_share("student", "medium") < exact_share("teacher", "medium")
