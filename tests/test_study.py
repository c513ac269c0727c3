"""Studies: what a file may say, which runs are the same, what tables hold, and that a kill changes nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from runs import save_pair, switchkd, write_rows, write_run
from switchkd.analysis.distance import distance_to_teacher
from switchkd.errors import UserError
from switchkd.models.load import load_pair
from switchkd.report.terminal import duration
from switchkd.run.callbacks import read_log
from switchkd.run.launch import train_run
from switchkd.study import plan as plan_module
from switchkd.study.file import StudyConfig, StudyEvaluation, read_study, study_from_values
from switchkd.study.launch import run_study
from switchkd.study.plan import StudyRun, plan_of
from switchkd.study.pool import place_of
from switchkd.study.rows import RUNS, Row, as_csv, finished_rows, kept_models
from switchkd.study.summary import summarize_study
from switchkd.study.tables import Grid, grids
from switchkd.study.worker import carry_out
from switchkd.training import trainer as trainer_module
from switchkd.training.trainer import SwitchTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    rows = [{"prompt": f"w{30 + n} says", "completion": "sun", "bucket": "even" if n % 2 else "odd"} for n in range(6)]
    write_rows(folder / "test.jsonl", rows)
    return folder


def values_of(models: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    run = {
        "student": str(models / "student"),
        "teacher": str(models / "teacher"),
        "train_data": str(models / "data.jsonl"),
        "max_new_tokens": 6,
        "max_prompt_tokens": 16,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    return {
        "run": run,
        "methods": {"on-policy": {"method": "imitkd"}, "switch": {"threshold": 0.3}},
        "seeds": [1, 2],
        "budget": {"steps": 3},
        "evaluation": {"sets": [str(models / "test.jsonl")]},
        "output_dir": str(folder / "study"),
        **changes,
    }


def write_study(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def study_of(models: Path, folder: Path, **changes: Any) -> StudyConfig:
    return study_from_values(values_of(models, folder, **changes), "of a test")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metods": {}}, "did you mean 'methods'?"),
        ({"budget": {"steps": 3, "seconds": 2}}, "exactly one of steps, seconds and tokens"),
        ({"budget": {"step": 3}}, "did you mean 'steps'?"),
        ({"budget": {"seconds": "long"}}, "seconds is 'long'"),
        ({"baseline": "swich"}, "did you mean 'switch'?"),
        ({"methods": {"a": {"max_steps": 3}}}, "budget says how long a run is"),
        ({"methods": {"a": {"treshold": 3}}}, "did you mean 'threshold'?"),
        ({"methods": {"start": {"method": "kd"}}}, "give another name"),
        ({"seeds": [1, 1]}, "give each once"),
        ({"evaluation": {"sets": ["world:test"], "limits": 2}}, "did you mean 'limit'?"),
        ({"evaluation": {"limit": 2}}, "sets is missing"),
    ],
)
def test_a_study_file_is_checked(models: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        study_of(models, tmp_path, **changes)
    assert said in str(error.value)


def test_a_plan_names_the_method_that_does_not_fit(models: Path, tmp_path: Path) -> None:
    wrong = study_of(models, tmp_path, methods={"kd": {"method": "kd", "student_share": 0.5}})
    with pytest.raises(UserError, match=r"method 'kd': student_share is 0\.5"):
        plan_of(wrong)
    endless = study_of(models, tmp_path, methods={"sft": {"method": "sft"}}, budget={"tokens": 9})
    with pytest.raises(UserError, match="a step of such a run may write nothing"):
        plan_of(endless)
    # Its text is written once, before the first step.
    once = study_of(models, tmp_path, methods={"seqkd": {"method": "seqkd"}}, budget={"tokens": 9})
    with pytest.raises(UserError, match="method 'seqkd': the budget is 9 tokens, but a step of such a run may write"):
        plan_of(once)
    same = study_of(models, tmp_path, methods={"a": {"method": "kd"}, "b": {"method": "kd", "logging_steps": 2}})
    with pytest.raises(UserError, match="a, seed 1 and b, seed 1 are the same run"):
        plan_of(same)


def test_a_plan_reads_the_same_data_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    resolve = plan_module.resolve
    monkeypatch.setattr(plan_module, "resolve", lambda *args, **how: (read.append(args[:2]), resolve(*args, **how))[1])
    shorter = {"method": "kd", "train_data": str(models / "test.jsonl")}
    plan_of(study_of(models, tmp_path, methods={"on-policy": {"method": "imitkd"}, "switch": {}, "kd": shorter}))
    test, data = (str(models / name) for name in ("test.jsonl", "data.jsonl"))
    assert read == [(test, "eval"), (data, "train"), (test, "train")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"seeds": []}}, "seeds is empty"),
        ({"evaluation": {"temperature": -1.0}}, "temperature is -1"),
        ({"evaluation": {"limit": 0}}, r"evaluation\.limit is 0"),
        ({"evaluation": {"sets": []}}, r"evaluation\.sets is empty"),
        ({"evaluation": {"sets": ["prompts.jsonl"]}}, "no row of .*prompts.jsonl has a response to compare"),
        ({"methods": {"kd": {"method": "kd", "train_data": "nowhere.jsonl"}}}, "method 'kd': there is no file"),
        ({"methods": {"kd": {"method": "kd", "student": "runs/pairs/nope"}}}, "method 'kd': .*runs/pairs/nope"),
        ({"methods": {"a": {"warmup_steps": 5}}, "budget": {"seconds": 9}}, "method 'a': warmup_steps is 5"),
        ({"methods": {"a": {"save_steps": 0.1}}, "budget": {"seconds": 9}}, "method 'a': save_steps is a part"),
        ({"methods": {"a": {"method": "trd"}}, "budget": {"seconds": 9}}, None),
    ],
)
def test_nothing_is_trained_that_could_not_be_measured(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    evaluation = {"sets": [str(models / "test.jsonl")], **changes.get("evaluation", {})}
    if said is None:
        plan_of(study_of(models, tmp_path, **changes))
        return
    with pytest.raises(UserError, match=said):
        plan_of(study_of(models, tmp_path, **{**changes, "evaluation": evaluation}))


def test_a_plan_has_seeds_in_turn_then_start_and_teacher(models: Path, tmp_path: Path) -> None:
    names = [row.name for row in plan_of(study_of(models, tmp_path))]
    of_runs = ["on-policy, seed 1", "switch, seed 1", "on-policy, seed 2", "switch, seed 2"]
    assert names == [*of_runs, "start", "teacher"]


def test_an_identity_holds_what_decides_and_nothing_else(models: Path, tmp_path: Path) -> None:
    def identities(**changes: Any) -> list[str]:
        return [row.identity for row in plan_of(study_of(models, tmp_path, **changes))]

    plain = identities()
    renamed = {"p": {"method": "imitkd"}, "q": {"threshold": 0.3}}
    assert identities(workers=7, output_dir="elsewhere", keep_models=True, methods=renamed) == plain
    assert not {*identities(budget={"steps": 4})[:4]} & {*plain}
    assert identities(budget={"steps": 4})[4:] == plain[4:]
    sampled = {"sets": [str(models / "test.jsonl")], "temperature": 1.0}
    assert not {*identities(evaluation=sampled)} & {*plain}
    assert identities(seeds=[2, 3])[:2] == plain[2:4]
    # Where several steps are written at once, no text goes over a checkpoint.
    saved = [identities(methods={"a": {"rollout_steps": 8, "save_steps": each}})[0] for each in (20, 500)]
    assert saved[0] != saved[1]
    assert identities(methods={"a": {"threshold": 0.3, "save_steps": 20}})[0] == plain[1]


def test_a_start_is_measured_against_the_teacher_that_it_is_measured_against(models: Path, tmp_path: Path) -> None:
    def start(*, distance: bool, teacher: str) -> StudyRun:
        values = values_of(models, tmp_path, evaluation={"sets": [str(models / "test.jsonl")], "distance": distance})
        values["run"]["teacher"] = str(models / teacher)
        return next(row for row in plan_of(study_from_values(values, "of a test")) if row.kind == "start")

    assert len({start(distance=True, teacher=each).identity for each in ("teacher", "student")}) == 2
    assert len({start(distance=False, teacher=each).identity for each in ("teacher", "student")}) == 1


def test_starts_of_one_name_say_under_which_setting_they_are_measured(models: Path, tmp_path: Path) -> None:
    lengths = {"short": {"max_new_tokens": 4}, "long": {"max_new_tokens": 6}, "rates": {"learning_rate": 1e-3}}
    names = [row.name for row in plan_of(study_of(models, tmp_path, settings=lengths, seeds=[1]))]
    assert names[-4:] == ["start, short", "teacher, short", "start, long and rates", "teacher, long and rates"]


def row_of(method: str, seed: int | None, exact: str, **more: Any) -> Row:
    """A finished row of four rows to answer, the last two in the bucket long."""
    kept = {"rows": [0, 1, 2, 3], "buckets": ["short", "long"], "bucket_of": [0, 0, 1, 1]}
    kept |= {"exact_match": [exact], "rouge_l": [[50.0] * 4]}
    scores = {"all": {"exact_match": 25.0 * exact.count("1"), "rouge_l": 50.0}}
    kind = method if method in ("start", "teacher") else "run"
    names = ("steps", "student_forwards", "teacher_forwards", "generated_tokens", "training_seconds")
    costs = dict.fromkeys(names, 100 + (seed or 0)) | {"teacher_generated_tokens": 20.4} if kind == "run" else {}
    whence = dict.fromkeys(("version", "commit", "machine", "date"), "-")
    who = {"kind": kind, "method": method, "setting": "", "seed": seed, "budget": "3 steps", **whence}
    return {
        **who,
        "identity": f"{method}{seed}",
        "scores": {"set": scores},
        "sets": {"set": kept},
        "costs": costs,
        **more,
    }


ROWS = [
    row_of("on-policy", 1, "1000"), row_of("switch", 1, "1110"),
    row_of("on-policy", 2, "0100"), row_of("switch", 2, "1111"),
    row_of("switch", 3, "0000"), row_of("start", None, "1100"),
]  # fmt: skip


def test_scores_are_over_seeds_and_differences_pair_rows_under_the_same_seed() -> None:
    start, on_policy, switch = summarize_study(ROWS, "set", "exact_match", "on-policy")
    assert [line.name for line in (start, on_policy, switch)] == ["start", "on-policy", "switch"]
    assert switch.seeds == (1, 2, 3)
    assert switch.scores["all"].mean == pytest.approx(100 * (0.75 + 1 + 0) / 3)
    assert switch.scores["long"].mean == pytest.approx(100 * (0.5 + 1 + 0) / 3)
    # Seed 3 has no partner.
    assert switch.difference["all"].mean == pytest.approx(100 * (0.5 + 0.75) / 2)
    assert switch.difference["short"].mean == pytest.approx(50.0)
    assert not on_policy.difference
    # What has no seed is compared with each: 50 % against 25 % and 25 %.
    assert start.difference["all"].mean == pytest.approx(25.0)
    assert switch.costs["steps"] == pytest.approx(102)
    assert not start.costs


def test_tables_and_csv_hold_the_same_numbers(models: Path, tmp_path: Path) -> None:
    evaluation = replace(study_of(models, tmp_path).evaluation, sets=["set"])
    study = replace(study_of(models, tmp_path, baseline="on-policy"), evaluation=evaluation)
    tables = {grid.title: grid for grid in grids(study, ROWS)}
    assert tables["set: exact match, %"].lines[2][:2] == ("switch", "3")
    difference = tables["set: exact match, %, minus on-policy"].lines[1]
    assert difference[1].startswith("**+62.5 (")
    costs = "Costs of a run, means over seeds"
    assert "| switch | 102 | 102 | 102 | 102 | 20% | 1 min 42 s |" in tables[costs].markdown()
    # One of an earlier version did not say who wrote how much.
    old = row_of("switch", 4, "0000")
    del old["costs"]["teacher_generated_tokens"]
    assert grids(study, [*ROWS, old])[-1].lines[1][-2:] == ("", "1 min 42 s")
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert [line["set all exact_match"] for line in lines] == ["25.0", "75.0", "25.0", "100.0", "0.0", "50.0"]
    assert lines[5]["seed"] == lines[5]["training_seconds"] == ""


def test_only_rows_that_all_answered_are_compared(models: Path, tmp_path: Path) -> None:
    kept = {"rows": [3, 1, 2], "buckets": ["long", "short"], "bucket_of": [0, 1, 0]}
    fewer = row_of("on-policy", 1, "", sets={"set": {**kept, "exact_match": ["101"], "rouge_l": [[1.0, 2.0, 3.0]]}})
    base, switch = summarize_study([fewer, row_of("switch", 1, "1101")], "set", "exact_match", "on-policy")
    # Rows 1, 2 and 3: 0, 1 and 1 against 1, 0 and 1.
    assert (base.scores["all"].mean, switch.scores["all"].mean) == pytest.approx((200 / 3, 200 / 3))
    assert (base.scores["short"].mean, switch.scores["short"].mean) == (0, 100)
    assert switch.difference["long"].mean == -50
    study = replace(study_of(models, tmp_path, baseline="on-policy"), evaluation=StudyEvaluation(["set"]))
    assert (
        "(without 1 row(s) that not every model answered)"
        in grids(study, [fewer, row_of("switch", 1, "1101")])[0].title
    )
    other = row_of("switch", 1, "1", sets={"set": {**kept, "rows": [7, 8, 9], "exact_match": ["101"]}})
    with pytest.raises(UserError, match="no answered row in common"):
        summarize_study([fewer, other], "set", "exact_match", "on-policy")


def test_costs_name_every_method_and_bars_break_no_table(models: Path, tmp_path: Path) -> None:
    far = row_of("switch", 1, "1110")
    far["sets"]["set"] |= {"reverse_kl": [[1.0] * 4]}
    study = replace(study_of(models, tmp_path, baseline="switch"), evaluation=StudyEvaluation(["set"]))
    *_, costs = grids(study, [far, row_of("sft", 1, "1000")])
    assert [line[0] for line in costs.lines] == ["switch", "sft"]
    table = Grid("t", ("method", "a|b"), (("c|d", "1"),))
    assert [line.count(" | ") for line in table.markdown().splitlines()[2:]] == [1, 1, 1]


def test_rows_of_other_machines_are_taken_as_done(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(models, tmp_path)
    folder = Path(study.output_dir)
    folder.mkdir()
    made_elsewhere = [row_of(row.method, row.seed, "1000", identity=row.identity) for row in plan_of(study)[:3]]
    made_elsewhere[1]["costs"]["training_seconds"] = 500
    # Of another budget.
    made_elsewhere.append(row_of("switch", 2, "1000", identity="other", budget="9 steps"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_elsewhere))
    path = write_study(tmp_path / "study.yaml", values_of(models, tmp_path))
    assert switchkd("compare", path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "1 trainings and 2 evaluations of start and teacher to do, 3 rows are there" in shown
    # What switch took with seed 1.
    assert "Training will take about 8 min 20 s of one core, judging by finished rows;" in shown
    timed = values_of(models, tmp_path, budget={"seconds": 60}, seeds=[5])
    assert switchkd("compare", write_study(path, timed), "--dry-run") == 0
    assert "Training will take about 2 min 0 s of one core; loading" in capsys.readouterr().out
    with_kd = {"kd": {"method": "kd"}, **values_of(models, tmp_path)["methods"]}
    assert switchkd("compare", write_study(path, values_of(models, tmp_path, methods=with_kd)), "--dry-run") == 0
    # Switch as before, and twice the mean of all for kd, of which no row tells.
    assert f"about {duration(500 + 2 * (101 + 500 + 102) / 3)} of one core" in capsys.readouterr().out
    assert [line.split("  ")[1] for line in shown.splitlines() if line.startswith("  ")] == ["done"] * 3 + ["to do"] * 3
    (folder / "rows.jsonl").write_text("no row\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1 is no finished row"):
        finished_rows(folder)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def wait_for(folder: Path, pattern: str, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until, f"no {pattern} after {seconds} s"
        time.sleep(0.02)


STEPS = 16


@pytest.fixture
def killed_study(models: Path, tmp_path: Path) -> StudyConfig:
    """A study of two runs, of which the second cannot run, whose process was killed in the middle of the first."""
    # A checkpoint every second step; the kill comes within a fraction of one of the first.
    too_long = write_rows(tmp_path / "long.jsonl", [{"prompt": "one " * 40, "completion": "two"}])
    methods = {"switch": {"threshold": 0.3}, "broken": {"method": "kd", "train_data": str(too_long)}}
    values = values_of(models, tmp_path, methods=methods, seeds=[1], budget={"steps": STEPS}, workers=1)
    values["run"]["save_steps"] = 2
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    study = read_study(path)
    # A fork, since a Python of its own would import torch for this command, which only waits for its worker.
    process = os.fork()
    if process == 0:
        try:
            switchkd("compare", path)
        finally:
            os._exit(1)
    try:
        wait_for(Path(study.output_dir) / RUNS, "switch-*/run/checkpoint-*/trainer_state.json")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return study


# Three processes import torch: that takes its time, and nothing less shows it.
# From Python 3.12 on a fork beside threads, such as those of pytest-xdist, warns.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_study_ends_as_one_that_was_not(killed_study: StudyConfig, tmp_path: Path) -> None:
    study, folder = killed_study, Path(killed_study.output_dir)
    switch, _, *untrained = plan_of(study)
    place = folder / RUNS / switch.folder_name
    assert not (place / "row.json").is_file()
    for row in untrained:
        # Without processes, since these two train nothing.
        (folder / RUNS / row.folder_name).mkdir()
        carry_out(row, folder / RUNS / row.folder_name, keep_model=False)
    with pytest.raises(UserError) as failed:
        run_study(replace(study, workers=2), quiet())
    assert "1 of 4 runs failed" in str(failed.value)
    assert "broken, seed 1: 1 of 1 rows cannot be used" in str(failed.value)
    assert "Goes on from" in (place / "output.txt").read_text()
    # What is left of a run is what was measured.
    assert not [*place.glob("run/checkpoint-*"), *place.glob("run/*.safetensors")]
    alone = tmp_path / "alone"
    alone.mkdir()
    carry_out(switch, alone, keep_model=False)
    expected, found = (json.loads((each / "row.json").read_text()) for each in (alone, place))
    for row in (expected, found):
        assert row["costs"].pop("training_seconds") > 0
        row.pop("date")
    assert found == expected
    assert found["costs"]["steps"] == STEPS
    assert found["costs"]["student_forwards"] > STEPS
    assert {row["kind"] for row in finished_rows(folder).values()} == {"run", "start", "teacher"}
    assert (folder / "study.md").read_text().count("| switch | 1 |") == 2


def test_a_run_whose_row_was_deleted_is_done_again(models: Path, tmp_path: Path) -> None:
    row = plan_of(study_of(models, tmp_path))[0]
    place = tmp_path / "place"
    place.mkdir()
    carry_out(row, place, keep_model=False)
    # Killed before it was tidy.
    (place / "run" / "model.safetensors").write_text("left")
    carry_out(row, place, keep_model=False)
    assert not (place / "run" / "model.safetensors").exists()
    first = json.loads((place / "row.json").read_text())
    (place / "row.json").unlink()
    carry_out(row, place, keep_model=False)
    assert json.loads((place / "row.json").read_text())["sets"] == first["sets"]


def test_a_study_that_was_moved_or_renamed_goes_on(models: Path, tmp_path: Path) -> None:
    row = plan_of(study_of(models, tmp_path))[0]
    place = tmp_path / "study" / RUNS / row.folder_name
    train_run(replace(row.run(place / "run"), training=row.run(place).training | {"max_steps": 2}), quiet())
    moved = tmp_path / "elsewhere"
    (tmp_path / "study").rename(moved)
    renamed = replace(row, method="another name")
    found = place_of(renamed, moved / RUNS)
    assert found.name == row.folder_name
    assert place_of(replace(row, identity="f" * 16), moved / RUNS).name.startswith("on_policy-1-ffff")
    train_run(renamed.run(found / "run"), quiet(), resume=True)
    assert read_log(found / "run" / "log.jsonl")[-1]["step"] == 3


def test_what_is_done_is_not_run_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(models, tmp_path, methods={"switch": {"threshold": 0.3}}, seeds=[1])
    (row, *_) = plan_of(study)
    place = Path(study.output_dir) / RUNS / row.folder_name
    place.mkdir(parents=True)
    carry_out(row, place, keep_model=False)
    asked: list[StudyRun] = []
    monkeypatch.setattr("switchkd.study.launch.run_all", lambda rows, *_, **__: asked.extend(rows) or [])
    drawn: list[str] = []
    monkeypatch.setattr("switchkd.study.launch.save_scores", lambda scores, label, path: drawn.append(label))
    (kept,) = run_study(study, quiet())
    assert [each.name for each in asked] == ["start", "teacher"]
    kept["scores"][str(models / "test.jsonl")]["all"]["exact_match"] = 50.0
    (place / "row.json").write_text(json.dumps(kept))
    run_study(study, quiet())
    assert drawn == ["ROUGE-L", "exact match, %"]
    assert kept["scores"][str(models / "test.jsonl")]["even"]["rows"] == 3
    assert len(kept["sets"][str(models / "test.jsonl")]["exact_match"][0]) == 6


def test_another_evaluation_measures_the_models_that_were_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"switch": {"threshold": 0.3}, "kd": {"method": "kd"}}
    study = study_of(models, tmp_path, methods=methods, seeds=[1])
    runs = Path(study.output_dir) / RUNS
    for row, keep_model in zip(plan_of(study)[:2], (True, False), strict=True):
        (runs / row.folder_name).mkdir(parents=True)
        carry_out(row, runs / row.folder_name, keep_model=keep_model)
    first = list(finished_rows(Path(study.output_dir)).values())
    again = replace(study, evaluation=replace(study.evaluation, distance=True))
    said = io.StringIO()
    run_study(again, Console(file=said, width=200), dry_run=True)
    told = said.getvalue()
    assert "1 trainings and 3 evaluations of start and teacher, and of models that are there, to do" in told
    assert "to do  switch, seed 1 (its model is there: only to be measured)" in told
    assert "to do  kd, seed 1\n" in told
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "switchkd.study.launch.run_all",
        lambda rows, folder, workers, progress, **_: (
            asked.append([each.method for each in progress.to_train.values()]) or []
        ),
    )
    run_study(again, quiet())
    assert asked == [["kd"]]
    switch = plan_of(again)[0]
    place = runs / switch.folder_name
    place.mkdir()
    monkeypatch.setattr("switchkd.study.worker.train_run", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("switchkd.study.worker.git_commit", lambda: "a later one")
    carry_out(switch, place, keep_model=False)
    found, before = (
        json.loads((place / "row.json").read_text()),
        next(row for row in first if row["method"] == "switch"),
    )
    (name,) = found["sets"]
    assert found["sets"][name]["rouge_l"] == before["sets"][name]["rouge_l"]
    assert found["sets"][name]["reverse_kl"]
    # Of the training, not of what measured it.
    assert all(found[key] == before[key] for key in ("costs", "commit", "date", "training"))
    assert found["identity"] != before["identity"]
    # What was kept stays for the next evaluation.
    assert [*runs.glob("*/run/*.safetensors")] == [runs / plan_of(study)[0].folder_name / "run" / "model.safetensors"]
    # Of a run that was killed before it was tidy.
    (runs / plan_of(study)[1].folder_name / "run" / "model.safetensors").write_text("left")
    assert [*kept_models(runs)] == [switch.training]
    assert plan_of(replace(again, seeds=(2,)))[0].training != switch.training


def test_the_distance_to_the_teacher_is_a_measure_like_the_others(models: Path, tmp_path: Path) -> None:
    name = str(models / "test.jsonl")
    methods, evaluation = {"on-policy": {"method": "imitkd"}}, {"sets": [name], "distance": True}
    study = study_of(models, tmp_path, methods=methods, seeds=[1], baseline="start", evaluation=evaluation)
    rows = []
    for row in plan_of(study):
        place = tmp_path / row.folder_name
        place.mkdir()
        carry_out(row, place, keep_model=True)
        rows.append(json.loads((place / "row.json").read_text()))
    tables = {grid.title: grid for grid in grids(study, rows)}
    table = tables[f"{name}: KL(student || teacher), nats a response"]
    # Not of the teacher itself.
    assert [line[0] for line in table.lines] == ["start", "on-policy"]
    assert [*tables].count(f"{name}: KL(teacher || student), nats a response, minus start") == 1
    pair = load_pair(str(tmp_path / plan_of(study)[0].folder_name / "run"), str(models / "teacher"))
    asked = [json.loads(line)["prompt"] for line in (models / "test.jsonl").read_text().splitlines()]
    assert pair.tokenizer is not None
    prompts = [pair.tokenizer(prompt)["input_ids"] for prompt in asked]
    expected = distance_to_teacher(pair, prompts, max_new_tokens=6, seed=10)
    # Kept to five places.
    assert rows[0]["sets"][name]["reverse_kl"][0] == pytest.approx(expected.reverse.per_sequence, abs=1e-5)
    assert rows[0]["scores"][name]["odd"]["forward_kl"] == pytest.approx(expected.forward.by(list("oeoeoe"))["o"].mean)
    (line, *_) = csv.DictReader(io.StringIO(as_csv(rows)))
    assert float(line[f"{name} all reverse_kl"]) == pytest.approx(expected.reverse.mean, abs=5e-4)
    assert float(line[f"{name} all forward_kl_per_token"]) == pytest.approx(expected.forward.per_token, abs=5e-4)
    answers = [json.loads(text) for text in next(tmp_path.glob("on_policy*/answers/*.jsonl")).read_text().splitlines()]
    of_odd = [answer["finish_reason"] == "eos" for answer in answers if answer["bucket"] == "odd"]
    assert float(line[f"{name} odd ended_share"]) == pytest.approx(sum(of_odd) / 3, abs=5e-4)


def events_of(models: Path, tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    run = write_run(models, tmp_path, max_steps=50, learning_rate=1e-3, lr_scheduler_type="linear", **changes)
    assert switchkd("train", run) == 0
    return read_log(tmp_path / "out" / "log.jsonl")


def test_a_budget_of_tokens_ends_a_run_and_the_rate_follows_it(models: Path, tmp_path: Path) -> None:
    events = events_of(models, tmp_path, max_generated_tokens=60)
    steps = [event for event in events if "loss" in event]
    assert events[-1]["generated_tokens"] >= 60
    # No text of these ended before its sixth token, so that each step's share is of twelve.
    assert events[-1]["generated_tokens"] == 12 * len(steps)
    of_steps = sum(12 * step["teacher_share"] for step in steps)
    assert events[-1]["teacher_generated_tokens"] == pytest.approx(of_steps)
    assert of_steps > 0
    # Each step writes at most 2 x 6 tokens, and the one that crosses the line is the last.
    assert events[-1]["generated_tokens"] < 72
    assert [step["budget_used"] for step in steps] == sorted(step["budget_used"] for step in steps)
    assert steps[-2]["budget_used"] < 1 <= steps[-1]["budget_used"]
    # A step's rate is set at the end of the one before. The schedule is laid out over the 50 steps that there could be, and stands
    # at a whole one of them.
    for before, step in pairwise(steps):
        assert 1 - step["learning_rate"] / 1e-3 == pytest.approx(before["budget_used"], abs=1 / 50)
    assert len(steps) < 15


class Clock:
    """A clock that stands still but for what it is told takes seconds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.patch = patch
        patch.setattr("switchkd.training.costs.time.process_time", lambda: self.now)

    def takes(self, owner: Any, name: str, seconds: float) -> None:
        """From now on each call of a function takes these seconds."""
        function = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            self.now += seconds
            return function(*given, **named)

        self.patch.setattr(owner, name, timed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Each batch of training takes a second."""
    made = Clock(monkeypatch)
    made.takes(SwitchTrainer, "training_step", 1)
    return made


def test_the_teachers_writing_is_part_of_the_budget(models: Path, tmp_path: Path, clock: Clock) -> None:
    clock.takes(trainer_module, "teacher_text", 1)
    events = events_of(models, tmp_path, method="seqkd", threshold=None, max_seconds=3)
    assert [event["budget_used"] for event in events if "loss" in event] == pytest.approx([2 / 3, 1])
    assert events[-1]["training_seconds"] == 3
    assert events[-1]["teacher_generated_tokens"] == events[-1]["generated_tokens"] > 0


def test_an_evaluation_is_no_part_of_what_training_costs(models: Path, tmp_path: Path, clock: Clock) -> None:
    clock.takes(SwitchTrainer, "prediction_step", 100)
    evaluated = {"eval_data": str(models / "data.jsonl"), "eval_strategy": "steps", "eval_steps": 1}
    run = write_run(models, tmp_path, method="kd", threshold=None, max_steps=3, **evaluated)
    assert switchkd("train", run) == 0
    ended = read_log(tmp_path / "out" / "log.jsonl")[-1]
    assert clock.now > 300
    assert (ended["training_seconds"], ended["student_forwards"], ended["teacher_forwards"]) == (3, 3, 3)


@pytest.mark.usefixtures("clock")
def test_a_budget_of_seconds_ends_a_run(models: Path, tmp_path: Path) -> None:
    events = events_of(models, tmp_path, max_seconds=3)
    assert [event["budget_used"] for event in events if "loss" in event] == pytest.approx([1 / 3, 2 / 3, 1])
    assert events[-1]["training_seconds"] == 3
