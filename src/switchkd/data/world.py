"""A small world of our own: instructions with exact answers that grow long.

A task is a function of a random generator and a size (the number of items). It gives a prompt and the one right
completion. A new task is a function and a row in `TASKS`. Rows are sorted into `BUCKETS` by the number of response tokens.
Tasks with more than one right answer are in free_world.py.
A stable hash of the prompt splits them into train and test, so the two never share a prompt.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Literal

Split = Literal["train", "test"]
# Where there is more than one right completion, they follow the prompt, and the first is that to train on.
Task = Callable[[Random, int], tuple[str, ...]]

BUCKETS: dict[str, tuple[int, int]] = {"short": (1, 32), "medium": (33, 96), "long": (97, 224)}
PAD, END, UNK = "<|pad|>", "<|end|>", "<unk>"
# One token: a word, a digit, or a run of marks, each with the blank before it. The shipped tokenizers split in the same way.
TOKEN_PATTERN = r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]+|\s"

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "sun rain snow wind leaf tree river stone bird horse mouse fish bread apple honey salt lamp chair table door "
    "window house garden road bridge boat train wheel paper book music dance green blue silver winter"
).split()
NAMES = "Ann Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Karl Lena Max Nora Otto Pia".split()
CITIES = "Rome Paris Oslo Lima Cairo Delhi Tokyo Bern Quito Prague Dublin Vienna".split()


def check_size(size: int, low: int, high: int) -> None:
    """Raise ValueError where a task has no rows of a size."""
    if not low <= size <= high:
        raise ValueError(f"size {size} is outside {low}..{high}")


def take(rng: Random, size: int) -> tuple[str, str]:
    """Take lettered digits from a number one by one: a line for each."""
    check_size(size, 2, len(LETTERS))
    number = 9 * size + rng.randint(10, 99)
    digits = [(LETTERS[i], rng.randint(1, 9)) for i in range(size)]
    prompt = f"Take from {number}: {', '.join(f'{label} {digit}' for label, digit in digits)}.\n"
    lines = []
    for label, digit in digits:
        lines.append(f"{label}: {number} - {digit} = {number - digit}")
        number -= digit
    return prompt, "\n".join(lines)


def sort(rng: Random, size: int) -> tuple[str, str]:
    """Insert letters one by one into a sorted row: a line for each."""
    check_size(size, 2, len(LETTERS))
    letters = rng.sample(LETTERS, size)
    lines = [f"{letters[i]}: {' '.join(sorted(letters[: i + 1]))}" for i in range(size)]
    return f"Sort by insertion: {' '.join(letters)}.\n", "\n".join(lines)


def add(rng: Random, size: int) -> tuple[str, str]:
    """Add two numbers column by column, lowest first: a line for each column."""
    check_size(size, 2, len(LETTERS))
    columns = [(LETTERS[i], rng.randint(0, 9), rng.randint(0, 9)) for i in range(size)]
    lines, carry = [], 0
    for label, upper, lower in columns:
        total = upper + lower + carry
        lines.append(f"{label}: {upper} + {lower} + {carry} = {total}, carry {total // 10}")
        carry = total // 10
    asked = ", ".join(f"{label} {upper} {lower}" for label, upper, lower in columns)
    return f"Add column by column: {asked}.\n", "\n".join(lines)


def spell(rng: Random, size: int) -> tuple[str, str]:
    """Spell distinct words letter by letter: a line for each word."""
    check_size(size, 2, len(WORDS))
    words = rng.sample(WORDS, size)
    return f"Spell: {', '.join(words)}.\n", "\n".join(f"{w}: {' '.join(w)}" for w in words)


def extract(rng: Random, size: int) -> tuple[str, str]:
    """Pull fields out of sentences about people: a JSON list."""
    check_size(size, 1, len(CITIES))
    keys = rng.choice((("name", "city"), ("name", "age", "city")))
    people: list[dict[str, str | int]] = [
        {"name": name, "age": rng.randint(10, 99), "city": city}
        for name, city in zip(rng.sample(NAMES, size), rng.sample(CITIES, size), strict=True)
    ]
    asked = " ".join(f"{p['name']} is {p['age']} and lives in {p['city']}." for p in people)
    answer = json.dumps([{key: person[key] for key in keys} for person in people])
    return f"Extract {', '.join(keys)} as JSON: {asked}\n", answer


def order(rng: Random, size: int) -> tuple[str, str]:
    """Put lettered rows in alphabetical order."""
    check_size(size, 2, len(LETTERS))
    rows = [(x, rng.choice(WORDS), rng.randint(0, 9)) for x in rng.sample(LETTERS, size)]
    asked = ", ".join(f"{x} {word} {number}" for x, word, number in rows)
    return f"Order by letter: {asked}.\n", "\n".join(f"{x}: {word} {number}" for x, word, number in sorted(rows))


def reverse(rng: Random, size: int) -> tuple[str, str]:
    """Reverse letters by putting each in front: the growing row at each step."""
    check_size(size, 2, len(LETTERS))
    letters = rng.sample(LETTERS, size)
    lines = [" ".join(reversed(letters[: i + 1])) for i in range(size)]
    return f"Reverse: {' '.join(letters)}.\n", "\n".join(lines)


TASKS: dict[str, Task] = {
    "take": take,
    "sort": sort,
    "add": add,
    "spell": spell,
    "json": extract,
    "order": order,
    "reverse": reverse,
}


@dataclass(frozen=True)
class World:
    """Tasks under a name. With a `match`, rows have several completions, and an answer is compared to them in that way."""

    name: str
    tasks: Mapping[str, Task]
    match: str | None = None


PLAIN = World("world", TASKS)


def token_count(completion: str) -> int:
    """The number of tokens of a completion in the world's tokenizer, the end included."""
    return len(re.findall(TOKEN_PATTERN, completion)) + 1


def bucket_of(completion: str) -> str | None:
    """The length bucket of a completion, or None if it is longer than all of them."""
    length = token_count(completion)
    return next((name for name, (low, high) in BUCKETS.items() if low <= length <= high), None)


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: one in eight is test, by a stable hash."""
    # Not hash(), which differs from process to process.
    return "test" if zlib.crc32(prompt.encode()) % 8 == 0 else "train"


@cache
def _sizes(task: Task, bucket: str) -> tuple[int, ...]:
    """The sizes at which a task can give a completion in a bucket, found by trying."""
    rng, found = Random(0), []
    for size in range(1, 1 + BUCKETS["long"][1]):
        try:
            # A size has no one length, so it counts for every bucket that some of eight draws reach.
            made = [task(rng, size)[1] for _ in range(8)]
        except ValueError:
            continue
        if any(bucket_of(completion) == bucket for completion in made):
            found.append(size)
    return tuple(found)


def stream(
    split: Split, seed: int, *, bucket: str | None = None, task: str | None = None, world: World = PLAIN
) -> Iterator[dict[str, Any]]:
    """Rows of one split, as `make_rows` describes them, without end; rows may repeat.

    Where no bucket or task is given, buckets and then tasks take turns, so that each gets an equal share.
    """
    if bucket is not None and bucket not in BUCKETS:
        raise ValueError(f"unknown bucket {bucket!r}: one of {', '.join(BUCKETS)}")
    tasks = world.tasks
    if task is not None and task not in tasks:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(tasks)}")
    # Text seeds the generator alike in every process.
    rng = Random(f"{split}/{seed}/{bucket}/{task}")
    buckets = list(BUCKETS) if bucket is None else [bucket]
    turns = {b: [t for t in tasks if task in (None, t) and _sizes(tasks[t], b)] for b in buckets}
    number = 0
    while True:
        turn, place = divmod(number, len(buckets))
        wanted = buckets[place]
        if not turns[wanted]:
            raise ValueError(f"task {task!r} gives no {wanted} completion")
        name = turns[wanted][turn % len(turns[wanted])]
        # A task knows neither split nor bucket, so its rows are drawn until one lies in both.
        while True:
            prompt, *completions = tasks[name](rng, rng.choice(_sizes(tasks[name], wanted)))
            if split_of(prompt) == split and bucket_of(completions[0]) == wanted:
                break
        source = f"{world.name}/{split}/{seed}/{bucket or 'all'}/{number}"
        number += 1
        row = {"prompt": prompt, "completion": completions[0], "task": name, "bucket": wanted, "source_id": source}
        yield {**row, "completion": completions, "match": world.match} if world.match else row


def make_rows(
    split: Split, count: int, *, seed: int, bucket: str | None = None, world: World = PLAIN
) -> list[dict[str, Any]]:
    """`count` rows of a split with distinct prompts, the same for the same arguments.

    Each row has "prompt", "completion", "task", "bucket" and "source_id"; where the world has a match, the row has it as
    "match", and "completion" is a list. Without a bucket the three take turns; the tasks take turns within each. Raises
    ValueError where the bucket has fewer rows.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: train or test")
    if bucket is None:
        share = -(-count // len(BUCKETS))
        each = [make_rows(split, share, seed=seed, bucket=name, world=world) for name in BUCKETS]
        return [row for turn in zip(*each, strict=True) for row in turn][:count]
    rows: dict[str, dict[str, Any]] = {}
    repeats = 0
    for row in stream(split, seed, bucket=bucket, world=world):
        if len(rows) >= count:
            break
        # A bucket has a finite number of prompts, and a long run of repeats means that it is used up.
        repeats = repeats + 1 if row["prompt"] in rows else 0
        if repeats > 10_000:
            raise ValueError(f"there are fewer than {count} {split} rows in bucket {bucket}")
        rows.setdefault(row["prompt"], row)
    return list(rows.values())
