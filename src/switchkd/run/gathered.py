"""What the report shows of runs, gathered from what they have written. Nothing heavy is imported, and nothing is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import yaml

from switchkd.errors import UserError
from switchkd.files import now
from switchkd.report.curves import Chart, charts
from switchkd.report.packed import PackedRollout, Packer
from switchkd.report.tables import Table, csv_table, evaluation_table, values_table
from switchkd.run.written import (
    DEFAULTS_MARK,
    ENVIRONMENT_FILE,
    FINISHED_FILE,
    LOG_FILE,
    ROLLOUTS_FILE,
    RUN_FILE,
    read_lines,
    read_log,
)

EVALUATION_FILE, STUDY_FILE = "eval.json", "study.csv"
# The runs that a folder stands for; a study of more shows its table, and the runs that are named.
_MOST_RUNS = 8
# In a folder of runs, and in that of a study.
_RUNS_INSIDE = ("*", "runs/*/run")


class RunFacts(TypedDict):
    """What stands about a run at the top of the page: (label, value) pairs."""

    name: str
    finished: bool
    facts: list[tuple[str, str]]


class ReportData(TypedDict):
    """All that the page shows. `rollouts_left_out`: how many rollouts there are beyond those shown, and lines that are none."""

    title: str
    made: str
    version: str
    follow: bool
    runs: list[RunFacts]
    charts: list[Chart]
    scores: list[Table]
    settings: list[Table]
    strings: list[str]
    rollouts: list[PackedRollout]
    rollouts_beyond: int
    lines_left_out: int


@dataclass(frozen=True)
class Source:
    """What a report is made of: a run's folder, or a file of rollouts, with the name that it has there."""

    name: str
    path: Path

    @property
    def rollouts(self) -> Path:
        """Its file of rollouts."""
        return self.path if self.path.is_file() else self.path / ROLLOUTS_FILE


def sources_of(paths: Sequence[Path]) -> list[Source]:
    """What the paths hold, each with a name of its own: a folder of runs stands for its runs.

    Raises UserError for a path that holds nothing to report.
    """
    found = list(dict.fromkeys(chain.from_iterable(map(_found_at, paths))))
    names = [_name(path.resolve()) for path in found]
    longer = [f"{path.resolve().parent.name}/{name}" for path, name in zip(found, names, strict=True)]
    unique = [name if names.count(name) == 1 else long for name, long in zip(names, longer, strict=True)]
    # Two of one name in two folders of one name.
    named = [name if unique.count(name) == 1 else str(path) for name, path in zip(unique, found, strict=True)]
    return [Source(name, path) for name, path in zip(named, found, strict=True)]


def _name(path: Path) -> str:
    if path.is_file():
        return path.stem
    # In a study, a run's folder has its name, and its training is in "run".
    return path.parent.name if path.name == "run" and path.parent.parent.name == "runs" else path.name


def _found_at(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".jsonl":
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is no run's folder and no .jsonl file of rollouts; give one or the other")
    here = (RUN_FILE, LOG_FILE, ROLLOUTS_FILE)
    if any((path / name).is_file() for name in here):
        return [path]
    inside = sorted(place.parent for pattern in _RUNS_INSIDE for place in path.glob(f"{pattern}/{RUN_FILE}"))
    if any(_scores_in(path)):
        return [path, *(inside if len(inside) <= _MOST_RUNS else [])]
    if inside:
        return inside
    raise UserError(
        f"there is nothing to report in {path}: no {RUN_FILE}, no {EVALUATION_FILE} and no {ROLLOUTS_FILE}; "
        f"give the folder of a run, or a file of rollouts"
    )


def _scores_in(folder: Path) -> Iterator[Path]:
    for name in (EVALUATION_FILE, STUDY_FILE):
        yield from (path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file())


def files_read(sources: Sequence[Source]) -> list[Path]:
    """The files that a report of these reads, as far as they are there."""
    names = (RUN_FILE, ENVIRONMENT_FILE, LOG_FILE, FINISHED_FILE)
    found = [source.path / name for source in sources for name in names]
    scores = [path for source in sources if source.path.is_dir() for path in _scores_in(source.path)]
    return [path for path in (*found, *(source.rollouts for source in sources), *scores) if path.is_file()]


def gather(sources: Sequence[Source], *, most_rollouts: int, version: str, follow: bool = False) -> ReportData:
    """The data of the page. At most `most_rollouts` are taken, at even steps from all of them."""
    runs = [source for source in sources if source.path.is_dir()]
    logs = {source.name: read_log(source.path / LOG_FILE) for source in runs}
    packer = Packer()
    lines = [(number, line) for number, source in enumerate(sources) for line in _rollout_lines(source.rollouts)]
    taken = _evenly(lines, most_rollouts)
    packed = [packer.pack(line, number) for number, line in taken]
    chosen = {source.name: _settings(source.path) for source in runs}
    environments = {source.name: _mapping(source.path / ENVIRONMENT_FILE) for source in runs}
    return {
        "title": ", ".join(source.name for source in sources),
        "made": now(),
        "version": version,
        "follow": follow,
        "runs": [_facts(source, chosen.get(source.name, ({}, {})), logs.get(source.name, [])) for source in sources],
        "charts": charts({name: events for name, events in logs.items() if events}),
        "scores": list(_score_tables(sources)),
        "settings": _settings_tables(chosen, environments),
        "strings": packer.strings,
        "rollouts": [each for each in packed if each is not None],
        "rollouts_beyond": len(lines) - len(taken),
        "lines_left_out": packer.left_out,
    }


def _rollout_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of rollouts. Where a resumed run wrote one again, the later stands for it."""
    found: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(read_lines(path)):
        address = tuple(json.dumps(line.get(key)) for key in ("stage", "step", "prompt_id", "sample_id"))
        # What has no address is nobody's repeat.
        key = address if line.get("prompt_id") is not None else number
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def _evenly(lines: Sequence[tuple[int, Any]], most: int) -> list[tuple[int, Any]]:
    """At most `most` of them, always with the first and the last."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(at * (len(lines) - 1) / max(1, most - 1))] for at in range(most)]


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What run.yaml says that was chosen, and what it says is in force besides."""
    path = folder / RUN_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    first, _, rest = text.partition(DEFAULTS_MARK)
    try:
        chosen, defaults = yaml.safe_load(first), yaml.safe_load(rest)
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as YAML ({error}); mend it, or leave this run out") from error
    return (chosen if isinstance(chosen, dict) else {}), (defaults if isinstance(defaults, dict) else {})


def _mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if no such file can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _facts(
    source: Source, settings: tuple[Mapping[str, Any], Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> RunFacts:
    values = {**settings[1], **settings[0]}
    steps = [event for event in events if "loss" in event]
    evaluated = [event["eval_loss"] for event in events if "eval_loss" in event]
    last = steps[-1] if steps else {}
    known = {
        "method": values.get("method"),
        "student": values.get("student"),
        "teacher": values.get("teacher") or _teachers(values.get("teachers")),
        "steps": last.get("step"),
        "loss at the last step": last.get("loss"),
        "evaluation loss": evaluated[-1] if evaluated else None,
        "teacher's share": last.get("teacher_share"),
    }
    facts = [(label, _fact(label, value)) for label, value in known.items() if value is not None]
    return {"name": source.name, "finished": (source.path / FINISHED_FILE).is_file(), "facts": facts}


def _teachers(value: Any) -> str | None:
    return ", ".join(f"{name}: {each}" for name, each in value.items()) if isinstance(value, dict) else None


def _fact(label: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0%}" if label.endswith("share") else f"{value:.4f}"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else str(value["name"] if isinstance(value, dict) and "name" in value else value)
    )


def _score_tables(sources: Sequence[Source]) -> Iterator[Table]:
    evaluations: dict[str, dict[str, Any]] = {}
    studies: list[Table] = []
    for source in sources:
        for path in _scores_in(source.path) if source.path.is_dir() else ():
            inside = path.relative_to(source.path).parent
            name = source.name if str(inside) in (".", "eval") else f"{source.name}/{inside}"
            if path.name == EVALUATION_FILE:
                evaluations[name] = _mapping(path)
            else:
                text = path.read_text(encoding="utf-8", errors="replace")
                studies.append(csv_table(f"Study: {path.resolve().parent.name}", text))
    yield from (table for table in studies if table["rows"])
    table = evaluation_table(evaluations)
    if table["rows"]:
        yield table


def _settings_tables(
    settings: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], environments: Mapping[str, Mapping[str, Any]]
) -> list[Table]:
    tables = [
        values_table("Chosen", {name: chosen for name, (chosen, _) in settings.items()}),
        values_table("In force by default", {name: defaults for name, (_, defaults) in settings.items()}),
        values_table("Environment", environments),
    ]
    return [table for table in tables if table["rows"]]
