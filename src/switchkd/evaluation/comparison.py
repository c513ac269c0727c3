"""Several models' answers to the same rows: scores side by side, with paired differences and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich import box
from rich.table import Table
from rich.text import Text

from switchkd.errors import UserError, did_you_mean
from switchkd.evaluation.answers import ScoredAnswer, same_row
from switchkd.evaluation.intervals import Interval, over_rows
from switchkd.files import json_text, write_atomically

RESULT_FILE = "comparison.json"
ALL = "all"
_HEADINGS = {"rouge_l": "ROUGE-L", "exact_match": "exact\nmatch"}
_MEANING = (
    "difference: the mean over the same rows of this model's score less the baseline's, with its 95 % interval\n"
    "(bootstrap over rows); an interval without 0 is a difference that other rows would hardly undo"
)

Answers = Mapping[str, Sequence[ScoredAnswer]]


@dataclass(frozen=True)
class ModelLine:
    """A model on some rows: its mean scores and tokens, and the scores' differences to the baseline (None for the baseline)."""

    model: str
    rows: int
    means: dict[str, float]
    tokens: float
    differences: dict[str, Interval] | None


@dataclass(frozen=True)
class Comparison:
    """For each set and each of its buckets ("all" first) a line for each model; `left_out` counts rows by set.

    A row is left out where a model did not answer it, such as for its prompt's length under another tokenizer.
    """

    baseline: str
    sets: dict[str, dict[str, list[ModelLine]]]
    left_out: dict[str, int]

    def save(self, folder: Path) -> Path:
        """Write comparison.json into the folder, whole or not at all, and return its path."""
        path = folder / RESULT_FILE
        write_atomically(path, json_text(asdict(self), indent=2) + "\n")
        return path

    def table(self) -> Table:
        """A line for each set, bucket and model."""
        left_out = "".join(
            f"\n{name}: {count} row(s) are left out, since not every model could answer them"
            for name, count in self.left_out.items()
            if count
        )
        meaning = Text(_MEANING + left_out)
        table = Table(box=box.SIMPLE, title=Text(f"baseline: {self.baseline}"), caption=meaning, caption_justify="left")
        table.add_column("set")
        table.add_column("model", overflow="fold")
        scores = list(dict.fromkeys(name for sets in self.sets.values() for name in sets[ALL][0].means))
        with_difference = [part for name in scores for part in (_HEADINGS.get(name, name), "difference")]
        for heading in ("rows", *with_difference, "tokens"):
            table.add_column(heading, justify="right")
        for name, buckets in self.sets.items():
            for bucket, lines in buckets.items():
                for number, line in enumerate(lines):
                    label = "" if number else name if bucket == ALL else f"  {bucket}"
                    table.add_row(Text(label), Text(line.model), str(line.rows), *_cells(line, scores))
                table.add_section()
        return table


def _cells(line: ModelLine, scores: Sequence[str]) -> list[str]:
    cells = []
    for name in scores:
        cells.append(f"{line.means[name]:.2f}" if name in line.means else "-")
        difference = (line.differences or {}).get(name)
        cells.append(_in_words(difference) if difference else "")
    return [*cells, f"{line.tokens:.1f}"]


def _in_words(difference: Interval) -> str:
    ends = f" [{difference.low:+.2f}, {difference.high:+.2f}]" if difference.known else ""
    return f"{difference.mean:+.2f}{ends}"


def compare_answers(models: Mapping[str, Answers], baseline: str | None = None) -> Comparison:
    """The comparison of models by their answers to each set, on the rows that all of them answered under the same seeds.

    `baseline` is a model's name, the first one's by default. Sampled answers to different rows are drawn independently, so that
    resampling the rows, each with the mean over its seeds, covers the chance of the sampling too. Raises UserError for an
    unknown baseline, sets without a common row, and a row that is not the same for all.
    """
    baseline = next(iter(models)) if baseline is None else baseline
    if baseline not in models:
        raise UserError(f"the baseline {baseline!r} is not among the models{did_you_mean(baseline, models)}")
    sets, left_out = {}, {}
    for name in models[baseline]:
        by_key = {model: _by_row_and_seed(answers[name]) for model, answers in models.items()}
        common = _common(by_key, name)
        left_out[name] = len({row for each in by_key.values() for row, _ in each}) - len({row for row, _ in common})
        buckets: dict[str, list[tuple[int, int]]] = {ALL: common}
        for key in common:
            # An earlier evaluation may have kept that name.
            if (bucket := by_key[baseline][key].bucket) not in (None, ALL):
                buckets.setdefault(bucket, []).append(key)
        sets[name] = {bucket: _lines(by_key, keys, baseline) for bucket, keys in buckets.items()}
    return Comparison(baseline, sets, left_out)


_ByKey = Mapping[str, Mapping[tuple[int, int], ScoredAnswer]]


def _by_row_and_seed(answers: Sequence[ScoredAnswer]) -> dict[tuple[int, int], ScoredAnswer]:
    return {(answer.prompt_id, answer.seed): answer for answer in answers}


def _common(by_key: _ByKey, set_name: str) -> list[tuple[int, int]]:
    """Row and seed of what all models answered, in the order of the rows; raises UserError where rows differ."""
    first, *others = by_key.values()
    common = [key for key in first if all(key in each for each in others)]
    if not common:
        raise UserError(f"{set_name}: the models have no row and seed in common; evaluate them with the same --seeds")
    for key in common:
        if not all(same_row(each[key], first[key]) for each in others):
            raise UserError(f"{set_name}: {first[key].where} is not the same for all models; evaluate them on one file")
    return common


def _lines(by_key: _ByKey, keys: Sequence[tuple[int, int]], baseline: str) -> list[ModelLine]:
    by_row = {model: _by_row([answers[key] for key in keys]) for model, answers in by_key.items()}
    lines = []
    for model, scores in by_row.items():
        differences = None
        if model != baseline:
            theirs = by_row[baseline]
            pairs = {name: zip(ours, theirs[name], strict=True) for name, ours in scores.items() if name in theirs}
            differences = {name: over_rows([a - b for a, b in each]) for name, each in pairs.items()}
        means = {name: fmean(each) for name, each in scores.items()}
        tokens = fmean(by_key[model][key].tokens for key in keys)
        lines.append(ModelLine(model, len({row for row, _ in keys}), means, tokens, differences))
    return lines


def _by_row(answers: Sequence[ScoredAnswer]) -> dict[str, list[float]]:
    """For each score that all of the answers have, each row's mean over its seeds, in the order of the rows."""
    rows: dict[int, list[dict[str, float]]] = {}
    for answer in answers:
        rows.setdefault(answer.prompt_id, []).append(_scores_of(answer))
    names = [name for name in _scores_of(answers[0]) if all(name in each for row in rows.values() for each in row)]
    return {name: [fmean(each[name] for each in row) for row in rows.values()] for name in names}


def _scores_of(answer: ScoredAnswer) -> dict[str, float]:
    exact = None if answer.exact_match is None else 100.0 * answer.exact_match
    scores: dict[str, float | None] = {"rouge_l": answer.rouge_l, "exact_match": exact, **answer.scores}
    # Of a row without references, and of a function of one's own that has nothing to say.
    return {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
