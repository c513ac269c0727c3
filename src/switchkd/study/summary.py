"""From finished rows to numbers with intervals: each method's scores, and its difference from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from switchkd.errors import UserError
from switchkd.evaluation.intervals import Interval, Values, over_rows, over_rows_and_seeds, over_seeds
from switchkd.study.rows import COSTS, Row

Measure = Literal["exact_match", "rouge_l", "reverse_kl", "forward_kl"]
MEASURES: dict[Measure, str] = {
    "exact_match": "exact match, %",
    "rouge_l": "ROUGE-L",
    "reverse_kl": "KL(student || teacher), nats a response",
    "forward_kl": "KL(teacher || student), nats a response",
}
ALL = "all"
Key = tuple[str, str]


@dataclass(frozen=True)
class Line:
    """A method under a setting: its seeds, its scores by part (all, then buckets), and what it cost on average.

    `scores` are over seeds where there are two or more, else over rows. `difference` is the paired one to the baseline under the
    same setting, over rows and seeds; it is empty for the baseline itself and where nothing pairs.
    """

    method: str
    setting: str
    kind: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Interval]
    difference: Mapping[str, Interval]
    costs: Mapping[str, float]

    @property
    def name(self) -> str:
        """Method and setting."""
        return ", ".join(filter(None, (self.method, self.setting)))


def summarize_study(rows: Sequence[Row], set_name: str, measure: Measure, baseline: str) -> list[Line]:
    """The lines of a table: starts, methods in the order of the rows, teachers; of rows that have the measure.

    Exact match and ROUGE-L are 0 to 100. Of the set, the rows count that all of them answered. Raises UserError where there are
    none.
    """
    groups: dict[Key, list[Row]] = {}
    for row in _on_common_rows(measured(rows, set_name, measure), set_name):
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    order = sorted(groups.items(), key=lambda item: ("start", "run", "teacher").index(item[1][0]["kind"]))
    return [_line(group, _baseline_of(groups, key, baseline), set_name, measure) for key, group in order]


def measured(rows: Sequence[Row], set_name: str, measure: Measure) -> list[Row]:
    """The finished rows that have a measure of a set."""
    return [row for row in rows if measure in row["sets"][set_name]]


def left_out(rows: Sequence[Row], set_name: str) -> int:
    """How many rows of a set one of these answered and another did not."""
    answered = [set(row["sets"][set_name]["rows"]) for row in rows]
    return len(set().union(*answered)) - len(answered[0].intersection(*answered))


def _on_common_rows(rows: Sequence[Row], set_name: str) -> list[Row]:
    """The finished rows with what they answered to the rows of a set that all of them answered, in one order."""
    answered = [row["sets"][set_name]["rows"] for row in rows]
    if all(each == answered[0] for each in answered):
        return [*rows]
    common = sorted(set(answered[0]).intersection(*answered))
    if not common:
        raise UserError(
            f"{set_name}: the finished runs have no answered row in common; compare them in studies of their own"
        )
    return [row | {"sets": {set_name: _picked(row["sets"][set_name], common)}} for row in rows]


def _picked(kept: Mapping[str, Any], common: Sequence[int]) -> dict[str, Any]:
    place = {number: at for at, number in enumerate(kept["rows"])}
    at = [place[number] for number in common]
    of_seeds = {key: kept[key] for key in MEASURES if key in kept}
    return {
        "rows": [*common],
        "buckets": kept["buckets"],
        "bucket_of": [kept["bucket_of"][each] for each in at],
        **{key: [[seed[each] for each in at] for seed in seeds] for key, seeds in of_seeds.items()},
    }


def _baseline_of(groups: Mapping[Key, list[Row]], key: Key, baseline: str) -> list[Row]:
    """The rows that a group is compared with: the baseline under its setting, else the only one of that name."""
    if key[0] == baseline:
        return []
    of_setting = groups.get((baseline, key[1]))
    named = [rows for (method, _), rows in groups.items() if method == baseline]
    return of_setting or (named[0] if len(named) == 1 else [])


def _line(rows: list[Row], baseline: list[Row], set_name: str, measure: Measure) -> Line:
    parts = _parts(rows[0], set_name)
    values = {row["seed"]: by_row(row, set_name, measure) for row in rows}
    per_seed = np.stack([*values.values()])
    differences = _differences(values, baseline, set_name, measure)
    return Line(
        rows[0]["method"],
        rows[0]["setting"],
        rows[0]["kind"],
        tuple(seed for seed in values if seed is not None),
        {
            part: over_seeds(per_seed[:, at].mean(axis=1)) if len(values) > 1 else over_rows(per_seed[:, at])
            for part, at in parts.items()
        },
        {part: over_rows_and_seeds(differences[:, at]) for part, at in parts.items()} if len(differences) else {},
        {
            cost: fmean(row["costs"][cost] for row in rows)
            for cost in COSTS
            if all(cost in row["costs"] for row in rows)
        },
    )


def _differences(values: Mapping[Any, Values], baseline: list[Row], set_name: str, measure: Measure) -> Values:
    """Values minus the baseline's, (seeds, rows), for the seeds that both have; what has no seed is compared with each."""
    others = {row["seed"]: by_row(row, set_name, measure) for row in baseline}
    if None in others or None in values:
        pairs = [(mine, other) for mine in values.values() for other in others.values()]
    else:
        pairs = [(mine, others[seed]) for seed, mine in values.items() if seed in others]
    return np.stack([mine - other for mine, other in pairs]) if pairs else np.empty((0, 0))


def by_row(row: Row, set_name: str, measure: Measure) -> Values:
    """A finished row's measure of each row of a set, the mean over the seeds of its sampling."""
    kept = row["sets"][set_name][measure]
    if measure == "exact_match":
        kept = [[100 * int(digit) for digit in digits] for digits in kept]
    mean: Values = np.array(kept, dtype=np.float64).mean(axis=0)
    return mean


def _parts(row: Row, set_name: str) -> dict[str, Any]:
    """Where the rows of each part are: all of them, and those of each bucket."""
    kept = row["sets"][set_name]
    bucket_of = np.array(kept["bucket_of"])
    named = {name: np.flatnonzero(bucket_of == at) for at, name in enumerate(kept["buckets"]) if name is not None}
    return {ALL: np.arange(len(bucket_of)), **named}
