"""`switchkd demo`: the embedded student distilled with prompts alone, SWITCH beside plain on-policy text; see assets/demo.yaml."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from switchkd.data.sets import resolve
from switchkd.errors import UserError
from switchkd.evaluation.intervals import Interval
from switchkd.files import write_atomically
from switchkd.models.load import load_pair
from switchkd.positions import ByPosition
from switchkd.report.plots import save_demo
from switchkd.report.terminal import print_rollouts
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.study import launch
from switchkd.study.file import StudyConfig, study_from_values
from switchkd.study.plan import StudyRun, plan_of
from switchkd.study.pool import place_of
from switchkd.study.rows import CSV_FILE, ROWS_FILE, RUNS, TRAINING, finished_rows
from switchkd.study.summary import ALL, Line, summarize_study
from switchkd.study.tables import bounds, scores_grid
from switchkd.training.dataset import tokenized

START, ON_POLICY, SWITCH, TEACHER = "start", "on_policy", "switch", "teacher"
SHOWN = (START, ON_POLICY, SWITCH, TEACHER)
# In the demo's folder: the study that it is, which marks the folder, and its result, written last.
STUDY_FILE, RESULT_FILE, PLOT_FILE = "demo.yaml", "demo.json", "demo.png"
_OURS = (STUDY_FILE, RESULT_FILE, PLOT_FILE, RUNS, ROWS_FILE, CSV_FILE, launch.REPORT_FILE, launch.PLOT_FILE)
_MARK = "# The study of a switchkd demo, as it wrote it: "
SHOWN_ROLLOUTS = 2
# Enough for a curve by position, in a second or two.
_ROLLOUTS = 48


def run_demo(changes: Mapping[str, Any], console: Console) -> None:
    """Run the study of assets/demo.yaml with some of its values changed, and show what came of it.

    `changes` may hold output_dir, steps, seed, device and limit. A folder with a finished demo and nothing else is replaced, a
    demo that was stopped goes on, and any other folder is refused (UserError).
    """
    values = _values(changes)
    study = study_from_values(values, "of the demo")
    planned, folder = plan_of(study), Path(study.output_dir)
    make_room(folder, yaml.safe_dump(values, sort_keys=False))
    console.print(
        Text(
            f"SWITCH beside plain on-policy text: the same student, loss, prompts and {study.budget}, one core each. "
            f"No answer of the data set is used."
        ),
        soft_wrap=True,
    )
    rows = launch.run_study(study, console)
    (set_name,) = study.evaluation.sets
    by_name = {line.name: line for line in summarize_study(rows, set_name, "exact_match", ON_POLICY)}
    lines = {name: by_name[name] for name in SHOWN}
    switch = next(row for row in planned if row.method == SWITCH)
    console.print("\nWhat the student is first trained on, written by student and teacher together:")
    shares = _show_training_text(switch, folder, console)
    console.print(scores_grid([*lines.values()], f"{set_name}, greedy: exact match, % ± 95 % over rows").table())
    console.print(Text(verdict(lines)), soft_wrap=True)
    plot = _keep(lines, shares, folder)
    console.print(Text(_next_steps(folder, switch, study, plot)), soft_wrap=True)


def _values(changes: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((Path(str(files("switchkd"))) / "assets" / "demo.yaml").read_text("utf-8"))
    values["output_dir"] = changes.get("output_dir", "runs/demo")
    for key, (part, name) in {
        "steps": ("budget", "steps"),
        "limit": ("evaluation", "limit"),
        "device": ("run", "device"),
    }.items():
        if key in changes:
            values[part][name] = changes[key]
    if "seed" in changes:
        values["seeds"] = [changes["seed"]]
    return values


def make_room(folder: Path, study: str) -> None:
    """Make the folder that of a demo of this study. A demo that is finished, or of another study, is removed.

    Raises UserError, and removes nothing, where the folder holds anything that no demo wrote.
    """
    text = _marked(study)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with --output")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there:
        file = folder / STUDY_FILE
        found = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not found.startswith(_MARK):
            raise UserError(
                f"{folder} is not empty ({_few(there)}) and holds no demo; give another folder with --output"
            )
        # A study made of a demo goes into the demo's folder, and is somebody's own work.
        if found != _marked(found.partition("\n")[2]):
            raise UserError(
                f"{file} was changed since the demo wrote it, so its runs may be yours; go on with "
                f"switchkd compare {file}, or give another folder with --output"
            )
        if (folder / RESULT_FILE).is_file() or found != text:
            _check_all_ours(folder, study_from_values(yaml.safe_load(found), f"in {file}"))
            shutil.rmtree(folder)
    try:
        write_atomically(folder / STUDY_FILE, text)
    except OSError as error:
        raise UserError(f"nothing can be written to {folder} ({error.strerror}); give another --output") from None


def _check_all_ours(folder: Path, study: StudyConfig) -> None:
    """Raise UserError where the folder holds more than the demo of this study wrote."""
    planned = plan_of(study)
    ours = {folder / name for name in _OURS} | {place_of(row, folder / RUNS) for row in planned}
    others = [
        str(path.relative_to(folder)) for path in [*folder.iterdir(), *(folder / RUNS).glob("*")] if path not in ours
    ]
    # Where `switchkd eval` writes.
    others += [str(path.relative_to(folder)) for path in (folder / RUNS).glob(f"*/{TRAINING}/eval")]
    if finished_rows(folder).keys() - {row.identity for row in planned}:
        others.append(f"rows of other runs in {ROWS_FILE}")
    if others:
        raise UserError(
            f"{folder} holds what the demo did not write ({_few(sorted(others))}), so it is not replaced; move that elsewhere, "
            f"or give another folder with --output"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _marked(study: str) -> str:
    """The text of the demo's study file: a first line that says what it is, with the hash of all others."""
    return f"{_MARK}{hashlib.sha256(study.encode()).hexdigest()[:16]}\n{study}"


def _show_training_text(row: StudyRun, folder: Path, console: Console) -> ByPosition:
    """Print two rollouts of the run's first prompts, and return the teacher's share of some more by position."""
    run = row.run(folder)
    config = run.config()
    pair = load_pair(run.student, run.teacher, placement=config.placement)
    assert pair.tokenizer is not None
    rows = resolve(run.train_data, limit=_ROLLOUTS)
    prompts = [each.prompt for each in tokenized(rows, pair.tokenizer, config, need_response=False)]
    engine = SpeculativeEngine(pair, config.block_size, max_rows=config.rollout_rows)
    rollouts = engine.generate(prompts, config.plan.policy, config.sampling, seed=config.seed)
    print_rollouts(rollouts[:SHOWN_ROLLOUTS], pair.tokenizer, console)
    return ByPosition.of([list(map(float, rollout.written_by_teacher)) for rollout in rollouts])


def verdict(lines: Mapping[str, Line]) -> str:
    """What happened, in plain words: whether SWITCH helped, whether it beat on-policy text, and where."""
    means = {name: line.scores[ALL].mean for name, line in lines.items()}
    gain, difference = means[SWITCH] - means[START], lines[SWITCH].difference[ALL]
    told = (
        f"With prompts alone, SWITCH took the student from {means[START]:.1f} to {means[SWITCH]:.1f} % exact ({gain:+.1f}), "
        f"and plain on-policy text to {means[ON_POLICY]:.1f} ({means[ON_POLICY] - means[START]:+.1f}). "
        f"SWITCH minus on-policy: {bounds(difference).replace('**', '')} points. "
    )
    return told + _judged(gain, difference) + _where(lines)


def _judged(gain: float, difference: Interval) -> str:
    if difference.excludes_zero and difference.mean > 0 and gain > 0:
        return "So it worked: more than chance lies between the two. "
    if difference.excludes_zero and difference.mean > 0:
        return "So SWITCH kept the student from the harm of its own text, but did not improve it. "
    if difference.excludes_zero:
        return "So it did not work here: on-policy text did better. "
    return "So it did not work here, or too short: what lies between the two may be chance. "


def _where(lines: Mapping[str, Line]) -> str:
    parts = [part for part, each in lines[SWITCH].difference.items() if part != ALL and each.mean]
    if not parts:
        return ""
    most = max(parts, key=lambda part: abs(lines[SWITCH].difference[part].mean))
    three = ", ".join(f"{name} {lines[name].scores[most].mean:.1f}" for name in (START, ON_POLICY, SWITCH))
    return f"The two differ most on {most} answers: {three}."


def _keep(lines: Mapping[str, Line], shares: ByPosition, folder: Path) -> Path | None:
    """Draw the picture and write the result, last, since it marks the demo as finished."""
    scores = {name: {part: (s.mean, s.low, s.high) for part, s in line.scores.items()} for name, line in lines.items()}
    plot = save_demo(scores, "exact match, %", shares, folder / PLOT_FILE)
    result = {
        "exact_match": {name: {part: each[0] for part, each in parts.items()} for name, parts in scores.items()},
        "interval": {name: {part: each[1:] for part, each in parts.items()} for name, parts in scores.items()},
        "teacher_share_by_position": {"mean": shares.mean, "rows": shares.rows},
    }
    write_atomically(folder / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    return plot


def _next_steps(folder: Path, switch: StudyRun, study: StudyConfig, plot: Path | None) -> str:
    model = folder / RUNS / switch.folder_name / TRAINING
    lengths = " ".join(f"--{key.replace('_', '-')} {study.run[key]}" for key in ("max_prompt_tokens", "max_new_tokens"))
    return (
        f"The numbers are in {folder / RESULT_FILE}{f', drawn in {plot}' if plot else ''}. SWITCH's run is in {model}: its model "
        f"(AutoModelForCausalLM.from_pretrained reads it), run.yaml, log.jsonl.\n"
        f"Try next:\n"
        f"  switchkd rollout --student {model} --teacher world:teacher --data world:test --limit 4 {lengths}\n"
        f"  switchkd diagnose --student world:student --teacher world:teacher --data world:train --limit 16 {lengths}\n"
        f"  switchkd compare {folder / STUDY_FILE} --dry-run\n"
        f"  switchkd methods"
    )
