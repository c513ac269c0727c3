"""ROUGE-L and exact match over sets and seeds, and the record of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, get_args

from rich import box
from rich.table import Table
from rich.text import Text

from switchkd.data.examples import Loaded, Rendering, prompt_text, to_examples
from switchkd.data.faults import BadRow
from switchkd.data.rows import SourceRow
from switchkd.data.shapes import has_answers, is_readable, row_text
from switchkd.errors import UserError
from switchkd.evaluation.answers import ScoredAnswer, answers_file, check_files, write_answers
from switchkd.evaluation.generate import Answer, generate_answers
from switchkd.evaluation.measures import AnswerScore, Match, exact_match, rouge_l
from switchkd.files import json_text, now, write_atomically
from switchkd.progress import progress_bar
from switchkd.records import FinishReason, Sampling
from switchkd.rollout.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Those of MiniLLM's evaluation scripts.
SEEDS = (10, 20, 30, 40, 50)
RESULT_FILE = "eval.json"
_COLUMNS = ("rouge_l", "exact_match", "response_tokens", "ended_share")


@dataclass(frozen=True)
class EvaluationSettings:
    """How answers are drawn, and which prompts are answered, rendered and matched how. Raises UserError where there is no seed.

    `scores` are taken beside ROUGE-L and exact match. A row whose column "match" holds a kind of match is compared in that way
    instead, as those of world-free are.
    """

    sampling: Sampling = Sampling()
    seeds: tuple[int, ...] = SEEDS
    max_prompt_tokens: int = 256
    rendering: Rendering = Rendering()
    match: Match = "text"
    scores: tuple[AnswerScore, ...] = ()

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise UserError(f"match is {self.match!r}; choose one of {', '.join(get_args(Match))}")
        if not self.seeds:
            raise UserError("seeds is empty; give at least one seed")
        if taken := next((score.name for score in self.scores if score.name in _COLUMNS), None):
            raise UserError(
                f"the score {taken!r} has the name of a column that every table has; leave it out, or rename it"
            )

    @property
    def used_seeds(self) -> tuple[int, ...]:
        """The seeds without repeats; the first alone for greedy decoding, which is the same under every seed."""
        return self.seeds[:1] if self.sampling.greedy else tuple(dict.fromkeys(self.seeds))


@dataclass(frozen=True)
class Scores:
    """Means over rows: ROUGE-L and exact match from 0 to 100, tokens per response, share that ended with end-of-text.

    ROUGE-L and exact match are NaN where no row has references. `own` holds the scores that were asked for beside them.
    """

    rouge_l: float
    exact_match: float
    response_tokens: float
    ended_share: float
    own: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All means by name."""
        values = asdict(self)
        own = values.pop("own")
        return {**values, **own}

    @classmethod
    def of_flat(cls, values: Mapping[str, float]) -> Scores:
        """The scores of these means by name."""
        own = dict(values)
        rouge_l, exact_match = own.pop("rouge_l"), own.pop("exact_match")
        return cls(rouge_l, exact_match, own.pop("response_tokens"), own.pop("ended_share"), own)


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
    """What was evaluated, how, when (UTC), and what came out for each set. `save` and `table` show it.

    `limit` says that the first rows of each set were taken alone, this many.
    """

    model: str
    date: str
    sampling: Sampling
    seeds: tuple[int, ...]
    max_prompt_tokens: int
    sets: dict[str, SetResult]
    match: Match = "text"
    rendering: Rendering = Rendering()
    limit: int | None = None

    def save(self, folder: Path) -> Path:
        """Write eval.json into the folder, whole or not at all, and return its path."""
        path = folder / RESULT_FILE
        write_atomically(path, json_text(asdict(self), indent=2) + "\n")
        return path

    def table(self) -> Table:
        """The mean ± deviation over seeds, a line for each set and each of its buckets."""
        title = f"{self.model}: {len(self.seeds)} seed(s), temperature {self.sampling.temperature:g}"
        table = Table(title=Text(title), box=box.SIMPLE)
        table.add_column("set", overflow="fold")
        own = dict.fromkeys(name for result in self.sets.values() for name in result.overall.mean.own)
        for heading in ("rows", "ROUGE-L", "exact match", "tokens", "ended (%)", *own):
            table.add_column(heading, justify="right")
        # Beside scores from 0 to 100, a share would be read as one of these.
        percent = {"ended_share": 100.0}
        for name, result in self.sets.items():
            for label, summary in {name: result.overall, **{f"  {b}": s for b, s in result.by_bucket.items()}}.items():
                deviations = summary.deviation.flat() if summary.deviation else {}
                cells = []
                for key, mean in summary.mean.flat().items():
                    unit = percent.get(key, 1.0)
                    spread = f" ± {unit * deviations[key]:.2f}" if deviations else ""
                    cells.append("-" if math.isnan(mean) else f"{unit * mean:.2f}{spread}")
                table.add_row(Text(label), str(summary.rows), *cells)
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

    Rows without a reference or with too long a prompt are left out and named in the result; a set without any reference needs
    a score that compares with none. With `out_folder`, eval.json and a file of answers for each set are written there. Raises
    UserError, before anything is generated, for a set without a row to use. Source: the evaluation of MiniLLM and DistiLLM,
    whose settings are the defaults.
    """
    if out_folder is not None:
        check_files(sets, Path(out_folder))
    # All sets are read before the first is answered, so that a bad one does not cost hours.
    loaded = {
        name: to_examples(
            rows,
            tokenizer,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_response_tokens=settings.sampling.max_new_tokens,
            need_response=_needs_answers(name, rows, settings),
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
            path = None if out_folder is None else answers_file(Path(out_folder), name)
            results[name] = _set_result(_kept_and_scored(answers, sets[name], tokenizer, settings, path), each)
    how = settings.sampling, seeds, settings.max_prompt_tokens
    evaluation = Evaluation(model_name, now(), *how, results, settings.match, settings.rendering)
    if out_folder is not None:
        evaluation.save(Path(out_folder))
    return evaluation


def _needs_answers(name: str, rows: Sequence[SourceRow], settings: EvaluationSettings) -> bool:
    """Whether each row needs a reference: not where none has one, and all scores beside ours do without.

    Raises UserError for prompts alone that nothing would score.
    """
    if has_answers(rows):
        return True
    without = bool(settings.scores) and not any(score.of_references for score in settings.scores)
    if not without and any(map(is_readable, rows)):
        raise UserError(
            f"no row of {name} has a response to compare answers with; give rows that have, or score the answers by a function "
            f"of your own (--eval-scores module:FUNCTION)"
        )
    return not without


def _kept_and_scored(
    answers: Sequence[Answer],
    rows: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    path: Path | None,
) -> list[ScoredAnswer]:
    # A prompt's id is its row's index.
    by_index = {row.index: row for row in rows}
    texts = [_unscored(answer, by_index[answer.prompt_id], tokenizer, settings) for answer in answers]
    # Written before too: a score of one's own that fails must not cost the answers.
    write_answers(texts, path)
    scored = [_scored(text, by_index[text.prompt_id], settings) for text in texts]
    write_answers(scored, path)
    return scored


def _unscored(
    answer: Answer, row: SourceRow, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings
) -> ScoredAnswer:
    text, bucket = row_text(row), row.columns.get("bucket")
    return ScoredAnswer(
        where=row.where,
        prompt_id=answer.prompt_id,
        seed=answer.seed,
        # Sets of others may have a column of that name, about something else; and "all" is every table's name for all rows.
        bucket=bucket if isinstance(bucket, str) and bucket != "all" else None,
        prompt=prompt_text(text, tokenizer, settings.rendering),
        answer=answer.text,
        references=text.references,
        rouge_l=None,
        exact_match=None,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
    )


def _scored(text: ScoredAnswer, row: SourceRow, settings: EvaluationSettings) -> ScoredAnswer:
    answer, references = text.answer, text.references
    return replace(
        text,
        rouge_l=rouge_l(answer, references) if references else None,
        exact_match=exact_match(answer, references, _match_of(row, settings)) if references else None,
        scores={score.name: score(text.prompt, answer, references) for score in settings.scores},
    )


def _match_of(row: SourceRow, settings: EvaluationSettings) -> Match:
    # Sets of others may have a column of that name, about something else.
    said: Match | None = next((each for each in get_args(Match) if each == row.columns.get("match")), None)
    return said or settings.match


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
    of_seeds = [each.flat() for each in per_seed.values()]
    columns = {name: [each[name] for each in of_seeds] for name in of_seeds[0]}
    mean = Scores.of_flat({name: fmean(column) for name, column in columns.items()})
    deviation = None
    if len(of_seeds) > 1:
        # Of NaN, the standard library has none.
        spread = {
            name: stdev(column) if all(map(math.isfinite, column)) else math.nan for name, column in columns.items()
        }
        deviation = Scores.of_flat(spread)
    return Summary(len(scored) // len(per_seed), mean, deviation, per_seed)


def _mean_scores(answers: Sequence[ScoredAnswer]) -> Scores:
    compared = [answer for answer in answers if answer.references]
    return Scores(
        rouge_l=fmean(answer.rouge_l or 0.0 for answer in compared) if compared else math.nan,
        exact_match=100 * fmean(bool(answer.exact_match) for answer in compared) if compared else math.nan,
        response_tokens=fmean(answer.tokens for answer in answers),
        ended_share=fmean(answer.finish_reason is FinishReason.END_OF_TEXT for answer in answers),
        own={name: _mean([answer.scores[name] for answer in answers]) for name in answers[0].scores},
    )


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers: a score of one's own may have nothing to say of an answer."""
    said = [value for value in values if math.isfinite(value)]
    return fmean(said) if said else math.nan
