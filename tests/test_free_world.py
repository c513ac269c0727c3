"""The world with more than one right answer, checked from its prompts alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from random import Random
from typing import Any

import pytest

from switchkd.data import world
from switchkd.data.free_world import FREE
from switchkd.data.rows import read_rows
from switchkd.data.sets import resolve
from switchkd.data.shapes import row_text
from switchkd.evaluation.measures import exact_match
from switchkd.evaluation.score import EvaluationSettings, evaluate
from switchkd.records import Sampling
from test_evaluation import Parrot
from test_world import ASSETS

ROWS: dict[str, list[dict[str, Any]]] = {
    bucket: world.make_rows("train", 40, seed=3, bucket=bucket, world=FREE) for bucket in world.BUCKETS
}


def triples(prompt: str, pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, prompt)


# From a prompt, the two lines that are right about each of its items.
RIGHT: dict[str, Callable[[str], list[set[str]]]] = {
    "spell": lambda prompt: [
        {f"{word}: {' '.join(word)}", f"{' '.join(word)}: {word}"} for word in re.findall(r"\w+", prompt.split(": ")[1])
    ],
    "people": lambda prompt: [
        {f"{name}: {age}, {city}", f"{name}: {city}, {age}"}
        for name, age, city in triples(prompt, r"(\w+) is (\d+) and lives in (\w+)\.")
    ],
    "add": lambda prompt: [
        {f"{x}: {a} + {b} = {int(a) + int(b)}", f"{x}: {int(a) + int(b)} = {a} + {b}"}
        for x, a, b in triples(prompt, r"\b([a-z]) (\d) (\d)")
    ],
    "take": lambda prompt: [
        {f"{x}: {n} - {d} = {int(n) - int(d)}", f"{x}: {int(n) - int(d)} = {n} - {d}"}
        for n in re.findall(r"from (\d+):", prompt)
        for x, d in triples(prompt, r"\b([a-z]) (\d)[,.]")
    ],
    "turn": lambda prompt: [
        {f"{x}: {word} {digit}", f"{x}: {digit} {word}"} for x, word, digit in triples(prompt, r"\b([a-z]) (\w+) (\d)")
    ],
}


@pytest.mark.parametrize("bucket", ROWS)
def test_every_answer_has_a_right_line_about_each_item_and_both_styles_are_references(bucket: str) -> None:
    low, high = world.BUCKETS[bucket]
    assert {row["task"] for row in ROWS[bucket]} == FREE.tasks.keys() == RIGHT.keys()
    for row in ROWS[bucket]:
        right = RIGHT[row["task"]](row["prompt"])
        first, second = row["completion"]
        assert low <= world.token_count(first) <= high
        for answer in (first, second):
            lines = answer.split("\n")
            assert len(lines) == len(set(lines)) == len(right)
            assert all(len(both & set(lines)) == 1 for both in right)
        assert not set(first.split("\n")) & set(second.split("\n"))


def test_order_and_style_are_drawn() -> None:
    task = FREE.tasks["add"]
    drawn = [task(Random(seed), 2) for seed in range(200)]
    orders = [(first.startswith("a"), " = " in first[:8]) for _, first, _ in drawn]
    # Of 200 draws each of four kinds has 50 in the mean, with a deviation of 6.
    assert all(25 < orders.count(kind) < 75 for kind in set(orders))
    assert len(set(orders)) == 4


def test_an_answer_is_right_in_any_order_of_its_lines_and_in_no_mixture_of_styles() -> None:
    for row in ROWS["medium"]:
        references = row_text(read_rows([row])[0]).references
        assert references == tuple(row["completion"])
        for style in references:
            lines = style.split("\n")
            assert exact_match("\n".join(reversed(lines)), references, row["match"])
            assert not exact_match("\n".join([*lines, lines[0]]), references, row["match"])
            assert not exact_match("\n".join(lines[1:]), references, row["match"])
        mixture = [references[0].split("\n")[0], *references[1].split("\n")[1:]]
        assert not exact_match("\n".join(mixture), references, row["match"])


def test_an_evaluation_takes_the_match_that_a_row_says() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    # Sets of others may have a column "match" about something else.
    first, *others = (
        {**row, "match": match} for row, match in zip(ROWS["medium"], ("lines", "text", "final"), strict=False)
    )
    reversed_lines = {row["prompt"]: "\n".join(reversed(row["completion"][1].split("\n"))) for row in (first, *others)}
    engine = Parrot(tokenizer, lambda prompt, seed: reversed_lines[prompt])
    settings = EvaluationSettings(Sampling(max_new_tokens=96))
    sets = {"lines": read_rows([first]), "others": read_rows(others)}
    results = evaluate(engine, tokenizer, sets, model_name="m", settings=settings).sets
    assert [results[name].overall.mean.exact_match for name in sets] == [100, 0]


def test_it_is_a_data_set_by_name_with_splits_and_buckets() -> None:
    rows = resolve("world-free:test:long", limit=5)
    assert [row.columns for row in rows] == world.make_rows("test", 5, seed=0, bucket="long", world=FREE)
    assert {row.columns["bucket"] for row in resolve("world-free:train", limit=6)} == world.BUCKETS.keys()


def test_both_worlds_speak_the_tokens_of_the_shipped_models() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    for row in (row for rows in ROWS.values() for row in rows):
        for answer in row["completion"]:
            prompt, whole = tokenizer.encode(row["prompt"]), tokenizer.encode(row["prompt"] + answer)
            assert whole[: len(prompt)] == prompt
            assert tokenizer.unk_token_id not in whole
            assert len(whole) - len(prompt) + 1 == world.token_count(answer)
            assert len(whole) + 1 <= 512


def test_the_rows_of_the_usual_world_are_those_that_its_models_were_trained_on() -> None:
    digest = sha256()
    for split in ("train", "test"):
        for seed in (0, 1):
            digest.update(json.dumps(world.make_rows(split, 90, seed=seed)).encode())  # type: ignore[arg-type]
    stream = world.stream("train", 1003, bucket="long")
    digest.update(json.dumps([next(stream) for _ in range(60)]).encode())
    # Taken before there was a second world.
    assert digest.hexdigest() == "2acfa3516af39e1c757c6d1127097ed60393f9c06c429ea4e7b5342e703918f6"
