"""The small world with more than one right answer, so that a teacher's distribution holds more than one sample shows.

Each task asks for one line about each item of its prompt. The lines may come in any order, and are written in either of two
styles, the same for all lines of an answer. So an answer about k items is one of 2 k! right ones, all equally likely in the
data. An answer is right if its lines are those of a style, in any order: the match "lines".
"""

from __future__ import annotations

from random import Random

from switchkd.data.world import CITIES, LETTERS, NAMES, PLAIN, WORDS, World, check_size

Lines = list[tuple[str, str]]


def _answers(rng: Random, lines: Lines) -> tuple[str, str]:
    """A right answer drawn from all of them, and one in the other style."""
    styles = ["\n".join(style) for style in zip(*rng.sample(lines, len(lines)), strict=True)]
    rng.shuffle(styles)
    first, second = styles
    return first, second


def spell(rng: Random, size: int) -> tuple[str, str, str]:
    """Spell distinct words: the word and its letters, or the letters and their word."""
    check_size(size, 2, len(WORDS))
    words = rng.sample(WORDS, size)
    lines = [(f"{word}: {' '.join(word)}", f"{' '.join(word)}: {word}") for word in words]
    return f"Spell by letter: {', '.join(words)}.\n", *_answers(rng, lines)


def people(rng: Random, size: int) -> tuple[str, str, str]:
    """Say of people how old they are and where they live, or where they live and how old they are."""
    check_size(size, 1, len(NAMES))
    known = [(name, rng.randint(10, 99), rng.choice(CITIES)) for name in rng.sample(NAMES, size)]
    asked = " ".join(f"{name} is {age} and lives in {city}." for name, age, city in known)
    lines = [(f"{name}: {age}, {city}", f"{name}: {city}, {age}") for name, age, city in known]
    return f"Extract by name: {asked}\n", *_answers(rng, lines)


def add(rng: Random, size: int) -> tuple[str, str, str]:
    """Add pairs of digits: the sum last, or first."""
    check_size(size, 2, len(LETTERS))
    pairs = [(label, rng.randint(0, 9), rng.randint(0, 9)) for label in LETTERS[:size]]
    lines = [(f"{x}: {a} + {b} = {a + b}", f"{x}: {a + b} = {a} + {b}") for x, a, b in pairs]
    return f"Add by letter: {', '.join(f'{x} {a} {b}' for x, a, b in pairs)}.\n", *_answers(rng, lines)


def take(rng: Random, size: int) -> tuple[str, str, str]:
    """Take each digit from the same number: the rest last, or first."""
    check_size(size, 2, len(LETTERS))
    number = rng.randint(10, 99)
    digits = [(label, rng.randint(1, 9)) for label in LETTERS[:size]]
    lines = [(f"{x}: {number} - {d} = {number - d}", f"{x}: {number - d} = {number} - {d}") for x, d in digits]
    return f"Take by letter from {number}: {', '.join(f'{x} {d}' for x, d in digits)}.\n", *_answers(rng, lines)


def turn(rng: Random, size: int) -> tuple[str, str, str]:
    """Write labelled rows of a word and a digit: the word first, or the digit."""
    check_size(size, 2, len(LETTERS))
    rows = [(x, rng.choice(WORDS), rng.randint(0, 9)) for x in rng.sample(LETTERS, size)]
    asked = ", ".join(f"{x} {word} {digit}" for x, word, digit in rows)
    lines = [(f"{x}: {word} {digit}", f"{x}: {digit} {word}") for x, word, digit in rows]
    return f"Order by column: {asked}.\n", *_answers(rng, lines)


FREE = World("world-free", {"spell": spell, "people": people, "add": add, "take": take, "turn": turn}, match="lines")
WORLDS = {world.name: world for world in (PLAIN, FREE)}
