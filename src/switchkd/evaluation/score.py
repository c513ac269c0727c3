"""ROUGE-L and exact match over sets and seeds, and the record of an evaluation."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.table import Table

from switchkd.data.examples import Loaded, Rendering, prompt_text, to_examples
from switchkd.data.faults import BadRow
from switchkd.data.rows import SourceRow
from switchkd.data.shapes import row_text
from switchkd.errors import UserError
from switchkd.evaluation.generate import Answer, generate_answers
from switchkd.files import now, write_atomically
from switchkd.progress import progress_bar
from switchkd.records import FinishReason, Sampling
from switchkd.rollout.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Those of MiniLLM's evaluation scripts.
SEEDS = (10, 20, 30, 40, 50)
RESULT_FILE = "eval.json"
Match = Literal["text", "numeric"]
# A sign belongs to a number only where no word or number ends before it: 5-3 has none.
_NUMBER = re.compile(r"((?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?)", re.ASCII)


@cache
def _rouge_scorer() -> Any:
    # It brings in nltk, which is slow to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The ROUGE-L F-measure, 0 to 100, against the reference that suits the answer best.

    Source: Lin 2004, computed by the package rouge_score with its stemmer, as in the scripts of MiniLLM and DistiLLM.
    """
    return 100 * max(float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure) for reference in references)


def exact_match(answer: str, references: Sequence[str], match: Match = "text") -> bool:
    """Whether the answer is one of the references but for case, punctuation and spaces.

    With `match` "numeric", numbers count by their value: -5 is not 5, 3.5 is not 35, and 1,000.0 is 1000.
    """
    read = _normalized if match == "text" else _words_and_numbers
    return read(answer) in [read(reference) for reference in references]


def _words_and_numbers(text: str) -> list[str | Decimal]:
    """The normalized words between the numbers, and the numbers' values."""
    parts = _NUMBER.split(text.replace("\u2212", "-"))
    # Of a split by one group, every second part is a number.
    found = [Decimal(each.replace(",", "")) if place % 2 else _normalized(each) for place, each in enumerate(parts)]
    return [each for each in found if each != ""]


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


@dataclass(frozen=True)
class EvaluationSettings:
    """How answers are drawn, and which prompts are answered, rendered and matched how. Raises UserError where there is no seed."""

    sampling: Sampling = Sampling()
    seeds: tuple[int, ...] = SEEDS
    max_prompt_tokens: int = 256
    rendering: Rendering = Rendering()
    match: Match = "text"

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise UserError(f"match is {self.match!r}; choose one of {', '.join(get_args(Match))}")
        if not self.seeds:
            raise UserError("seeds is empty; give at least one seed")

    @property
    def used_seeds(self) -> tuple[int, ...]:
        """The seeds without repeats; the first alone for greedy decoding, which is the same under every seed."""
        return self.seeds[:1] if self.sampling.greedy else tuple(dict.fromkeys(self.seeds))


@dataclass(frozen=True)
class ScoredAnswer:
    """One line of the answers file. `rouge_l` is 0 to 100; `tokens` counts the end-of-text token."""

    where: str
    prompt_id: int
    seed: int
    bucket: str | None
    prompt: str
    answer: str
    references: tuple[str, ...]
    rouge_l: float
    exact_match: bool
    tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Scores:
    """Means over rows: ROUGE-L and exact match from 0 to 100, tokens per response, share that ended with end-of-text."""

    rouge_l: float
    exact_match: float
    response_tokens: float
    ended_share: float


@dataclass(frozen=True)
class Summary:
    """Scores of some rows: mean and sample deviation over seeds (no deviation for one seed), and each seed's."""

    rows: int
    mean: Scores
    deviation: Scores | None
    per_seed: dict[int, Scores]


@dataclass(frozen=True)
class SetResult:
    """Scores of all rows of a set, and of each `bucket` where rows have one; and the rows that were left out."""

    overall: Summary
    by_bucket: dict[str, Summary]
    skipped: list[BadRow]


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, how, when (UTC), and what came out for each set. `save` and `table` show it."""

    model: str
    date: str
    sampling: Sampling
    seeds: tuple[int, ...]
    max_prompt_tokens: int
    sets: dict[str, SetResult]

    def save(self, folder: Path) -> Path:
        """Write eval.json into the folder, whole or not at all, and return its path."""
        path = folder / RESULT_FILE
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        return path

    def table(self) -> Table:
        """The mean ± deviation over seeds, a line for each set and each of its buckets."""
        title = f"{self.model}: {len(self.seeds)} seed(s), temperature {self.sampling.temperature:g}"
        table = Table("set", title=title)
        for heading in ("rows", "ROUGE-L", "exact match", "tokens", "ended"):
            table.add_column(heading, justify="right")
        for name, result in self.sets.items():
            for label, summary in {name: result.overall, **{f"  {b}": s for b, s in result.by_bucket.items()}}.items():
                means, deviations = astuple(summary.mean), astuple(summary.deviation) if summary.deviation else None
                cells = [f"{mean:.2f}" for mean in means]
                if deviations:
                    cells = [f"{cell} ± {deviation:.2f}" for cell, deviation in zip(cells, deviations, strict=True)]
                table.add_row(label, str(summary.rows), *cells)
        return table


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[SourceRow]],
    *,
    model_name: str,
    settings: EvaluationSettings = EvaluationSettings(),
    out_folder: str | Path | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """The scores of the student's answers to the rows of each set.

    Rows without a reference or with too long a prompt are left out and named in the result. With `out_folder`, eval.json
    and a file of answers for each set are written there. Raises UserError, before anything is generated, for a set without
    a row to use. Source: the evaluation of MiniLLM and DistiLLM, whose settings are the defaults.
    """
    # All sets are read before the first is answered, so that a bad one does not cost hours.
    loaded = {
        name: to_examples(
            rows,
            tokenizer,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_response_tokens=settings.sampling.max_new_tokens,
            need_response=True,
            skip_bad_rows=True,
            rendering=replace(settings.rendering, prompts_alone=True),
        )
        for name, rows in sets.items()
    }
    seeds, results = settings.used_seeds, dict[str, SetResult]()
    with progress_bar(shown=show_progress) as progress:
        task = progress.add_task("answers", total=len(seeds) * sum(len(each.examples) for each in loaded.values()))
        for name, each in loaded.items():
            answers: list[Answer] = []
            for seed in seeds:
                count = progress.counter(task)
                answers += generate_answers(engine, tokenizer, each.examples, settings.sampling, seed, count)
            scored = _score(answers, sets[name], tokenizer, settings)
            results[name] = _set_result(scored, each)
            if out_folder is not None:
                _write_answers(scored, name, Path(out_folder))
    evaluation = Evaluation(model_name, now(), settings.sampling, seeds, settings.max_prompt_tokens, results)
    if out_folder is not None:
        evaluation.save(Path(out_folder))
    return evaluation


def _score(
    answers: Sequence[Answer],
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
) -> list[ScoredAnswer]:
    by_index = {row.index: row for row in rows}
    scored = []
    for answer in answers:
        # A prompt's id is its row's index.
        row = by_index[answer.prompt_id]
        text = row_text(row)
        scored.append(
            ScoredAnswer(
                where=row.where,
                prompt_id=answer.prompt_id,
                seed=answer.seed,
                bucket=row.columns.get("bucket"),
                prompt=prompt_text(text, tokenizer, settings.rendering),
                answer=answer.text,
                references=text.references,
                rouge_l=rouge_l(answer.text, text.references),
                exact_match=exact_match(answer.text, text.references, settings.match),
                tokens=answer.tokens,
                finish_reason=answer.finish_reason,
            )
        )
    return scored


def _set_result(scored: Sequence[ScoredAnswer], loaded: Loaded) -> SetResult:
    buckets = dict.fromkeys(answer.bucket for answer in scored if answer.bucket is not None)
    by_bucket = {bucket: summarize([answer for answer in scored if answer.bucket == bucket]) for bucket in buckets}
    return SetResult(summarize(scored), by_bucket, loaded.skipped)


def summarize(scored: Sequence[ScoredAnswer]) -> Summary:
    """The scores of answers to the same rows under one or more seeds."""
    by_seed: dict[int, list[ScoredAnswer]] = {}
    for answer in scored:
        by_seed.setdefault(answer.seed, []).append(answer)
    per_seed = {seed: _mean_scores(answers) for seed, answers in by_seed.items()}
    columns = list(zip(*map(astuple, per_seed.values()), strict=True))
    deviation = Scores(*map(stdev, columns)) if len(per_seed) > 1 else None
    return Summary(len(scored) // len(per_seed), Scores(*map(fmean, columns)), deviation, per_seed)


def _mean_scores(answers: Sequence[ScoredAnswer]) -> Scores:
    return Scores(
        rouge_l=fmean(answer.rouge_l for answer in answers),
        exact_match=100 * fmean(answer.exact_match for answer in answers),
        response_tokens=fmean(answer.tokens for answer in answers),
        ended_share=fmean(answer.finish_reason is FinishReason.END_OF_TEXT for answer in answers),
    )


def answers_file(folder: Path, set_name: str) -> Path:
    """Where an evaluation into the folder keeps the answers to a set, a `ScoredAnswer` a line."""
    # A set's name can be a path, or hold a colon.
    return folder / f"answers_{re.sub(r'[^A-Za-z0-9.-]+', '_', set_name)}.jsonl"


def _write_answers(scored: Sequence[ScoredAnswer], set_name: str, folder: Path) -> None:
    lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in scored)
    write_atomically(answers_file(folder, set_name), lines)
