"""What an answer is worth: ROUGE-L, exact match by text or by value, or a function of one's own."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, Literal

from switchkd.errors import UserError, did_you_mean
from switchkd.settings.components import imported

Match = Literal["text", "numeric", "lines"]
# A sign belongs to a number only where no word or number ends before it: 5-3 has none.
_NUMBER = re.compile(r"((?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?)", re.ASCII)


# Scripts without spaces between words: kana, Han, and Han's compatibility forms.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ANY_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


class _AnyWords:
    """A tokenizer for rouge_score: words of any script, and each character of a script that has no spaces."""

    def tokenize(self, text: str) -> list[str]:
        """The words in their order, in lower case."""
        return _ANY_WORD.findall(text.lower())


@cache
def _rouge_scorer(*, any_script: bool) -> Any:
    # It brings in nltk, which is slow to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_AnyWords()) if any_script else RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The ROUGE-L F-measure, 0 to 100, against the reference that suits the answer best.

    Source: Lin 2004, computed by the package rouge_score with its stemmer, as in the scripts of MiniLLM and DistiLLM. That reads
    a to z and digits alone. Where most letters of a reference are others, words of any script count, without a stemmer, and
    characters where the script has no spaces.
    """
    scores = (_rouge_scorer(any_script=_is_foreign(each)).score(each, answer) for each in references)
    return 100 * max(float(score["rougeL"].fmeasure) for score in scores)


def _is_foreign(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return 2 * sum(not c.isascii() for c in letters) > len(letters)


def exact_match(answer: str, references: Sequence[str], match: Match = "text") -> bool:
    """Whether the answer is one of the references but for case, punctuation and spaces.

    With `match` "numeric", numbers count by their value: -5 is not 5, 3.5 is not 35, and 1,000.0 is 1000. With "lines", lines
    may come in any order. Texts of punctuation alone, of which nothing would be left, are compared as they are.
    """

    def read(text: str) -> Any:
        return _READ_AS[match](text) or text.strip()

    return read(answer) in [read(reference) for reference in references]


def _lines(text: str) -> list[str]:
    return sorted(normal for line in text.splitlines() if (normal := _normalized(line)))


def _words_and_numbers(text: str) -> list[str | Decimal]:
    """The normalized words between the numbers, and the numbers' values."""
    parts = _NUMBER.split(text.replace("\u2212", "-"))
    # Of a split by one group, every second part is a number.
    found = [Decimal(each.replace(",", "")) if place % 2 else _normalized(each) for place, each in enumerate(parts)]
    return [each for each in found if each != ""]


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


_READ_AS: dict[Match, Callable[[str], Any]] = {"text": _normalized, "numeric": _words_and_numbers, "lines": _lines}


@dataclass(frozen=True)
class AnswerScore:
    """A score of answers. `function` takes the prompt, the answer and the references, and returns a number.

    `of_references` says whether it compares with references, so that it needs one.
    """

    name: str
    function: Callable[[str, str, Sequence[str]], float]
    of_references: bool = False

    def __call__(self, prompt: str, answer: str, references: Sequence[str]) -> float:
        """The score of one answer. Raises UserError where a function of one's own fails or returns no number."""
        try:
            return float(self.function(prompt, answer, references))
        except Exception as error:
            raise UserError(
                f"the score {self.name} failed with {type(error).__name__}: {error}; it is called with the prompt, the answer "
                f"{answer[:40]!r} and a list of references, and has to return a number"
            ) from error


SCORES = {
    "rouge_l": AnswerScore("rouge_l", lambda _, answer, references: rouge_l(answer, references), True),
    "exact_match": AnswerScore(
        "exact_match", lambda _, answer, references: 100 * exact_match(answer, references), True
    ),
    "numeric_match": AnswerScore(
        "numeric_match", lambda _, answer, references: 100 * exact_match(answer, references, "numeric"), True
    ),
}


def scores_named(names: str | Sequence[str] | None) -> tuple[AnswerScore, ...]:
    """The scores of these names: ours, from 0 to 100, or module:FUNCTION. Raises UserError for one that is not there."""
    scores = tuple(_score_named(name) for name in ([names] if isinstance(names, str) else names or ()))
    called = [score.name for score in scores]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise UserError(f"two scores are called {twice!r}; leave one out, or rename its function")
    return scores


def _score_named(name: str) -> AnswerScore:
    if ":" not in name:
        if name not in SCORES:
            raise UserError(
                f"there is no score {name!r}{did_you_mean(name, SCORES)} (or module:FUNCTION, one of your own)"
            )
        return SCORES[name]
    function: Any = imported("score", name)
    if not callable(function):
        raise UserError(
            f"score {name!r} leads to {function!r}; it has to be a function of prompt, answer and references"
        )
    return AnswerScore(name.partition(":")[2], function)
