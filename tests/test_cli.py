"""The commands, called as people call them, on small models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from runs import carry_out_here, switchkd, write_rows, write_run
from switchkd import __version__
from switchkd.cli import demo
from switchkd.cli.demo import make_room, verdict
from switchkd.cli.main import app
from switchkd.errors import UserError
from switchkd.evaluation.intervals import Interval
from switchkd.methods.plan import AutoThreshold
from switchkd.models.pair import ModelPair
from switchkd.records import FinishReason, Prompt, Rollout
from switchkd.report.terminal import print_rollouts, rollout_text, visible, writer_runs
from switchkd.rollout.policies import POLICIES
from switchkd.run.callbacks import read_log
from switchkd.run.file import HINTS
from switchkd.run.recipes import recipes
from switchkd.settings.components import settings_of
from switchkd.study.file import read_study
from switchkd.study.plan import plan_of
from switchkd.study.summary import Line

COMMANDS = get_command(app).commands


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, switchkd.cli.main as cli\n"
        "for command in sys.argv[1:]:\n"
        "    try: cli.main([*command.split(), '--help'])\n"
        "    except SystemExit as exit_: assert exit_.code == 0, exit_.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    program = [sys.executable, "-c", code, "", *COMMANDS]
    result = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "rollout" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_page_says_what_options_take_and_ends_with_a_call_that_parses(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert switchkd(name, "--help") == 0
    shown = capsys.readouterr().out
    (usage,) = [line for line in shown.splitlines() if f"Usage: switchkd {name}" in line]
    # Neither braces nor doubled brackets, nor typer's types of what takes no value, nor text that is cut off.
    assert "{" not in usage
    assert "[[" not in usage
    assert not [odd for odd in ("<bool>", "<str>", "<path>", "range>", "…") if odd in shown]
    call = shown.rpartition("Example")[2]
    command, *arguments = call.split()[1:]
    assert command == name
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    COMMANDS[name].make_context(name, arguments)


def test_the_options_of_a_command_are_called_as_in_a_run_file() -> None:
    names = {option.name for command in COMMANDS.values() for option in command.params}
    # What a command alone has: what it reads or writes, and how much of it.
    own = {
        *("models", "with_start", "with_teacher", "baseline"),
        *("ours", "theirs", "url", "key_env", "body", "parallel", "references", "estimate", "cache"),
        *("max_requests", "max_total_tokens"),
        *("run_file", "assignments", "resume", "output", "show", "steps", "name", "markdown", "help", "sets", "seeds"),
        *("model", "prompt", "data", "limit", "no_repeat_ngram", "match", "force", "study_file", "workers", "dry_run"),
        *("gpus", "memory", "link", "cluster", "texts", "as_json"),
        *("runs", "rollouts", "port", "follow"),
        *("host", "max_rows", "max_tokens", "cache_gib", "weights_gib"),
    }
    assert names - own - {"teacher_share"} <= HINTS.keys()
    assert "teacher_share" in settings_of(AutoThreshold)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (("calibrate", "--share", "0.3"), "--share is now --teacher-share"),
        (("eval", "runs/x", "--sets", "world", "--batch-size=4"), "--batch-size is now --rollout-rows"),
        (("rollout", "--teacher-top-k", "3"), "--teacher-top-k is now --keep-top-k"),
        # As people type it who come from TRL, ms-swift or verl. Before: "No such option: --lr (Possible options: --help)".
        (("train", "run.yaml", "--lr", "1e-5"), "no option '--lr'; here it is learning_rate; a run's settings stand"),
        (("train", "--teacher_model=x"), "no option '--teacher_model'; here it is teacher; a run's settings stand"),
        (("train", "run.yaml", "--max_steps", "3"), "are put over it by --set KEY=VALUE"),
        (("train", "run.yaml", "max_steps=3"), "write --set max_steps=3"),
        (("eval", "runs/x", "--set", "world"), "there is no option '--set'; did you mean '--sets'?"),
    ],
)
def test_an_option_that_is_called_otherwise_is_named(
    call: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert switchkd(*call) == 2
    assert named in capsys.readouterr().err


def test_python_runs_the_package_as_the_command() -> None:
    program = [sys.executable, "-m", "switchkd", "--version"]
    result = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == f"switchkd {__version__}\n"


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("recipes") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in recipes())
    assert switchkd("recipes", "paper/gpt2") == 0
    assert capsys.readouterr().out == recipes()["paper/gpt2"].read_text()


def test_methods_lists_all_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("methods") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("sft", "kd", "gkd", "switch"))
    assert switchkd("methods", "gkd") == 0
    details = " ".join(capsys.readouterr().out.split())
    assert "arXiv 2306.13649" in details
    assert "divergence.teacher_weight 0.1" in details


@pytest.mark.curves
def test_train_leaves_a_run_that_others_read(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(models, tmp_path)
    assert switchkd("train", path, "--set", "max_steps=2") == 0
    out, folder = capsys.readouterr().out, tmp_path / "out"
    first, computes, texts, estimate, *_ = out.splitlines()
    assert first.startswith("switch: ")
    assert "2 steps x 2 sequences" in first
    # Before: "at most 2e-05M tokens".
    assert "at most 24 tokens" in first
    assert computes.startswith("Computes on cpu in float32: ")
    assert str(folder) in texts
    assert estimate.startswith("The first step took")
    assert {"1/2", "2/2"} <= {line.split()[0] for line in out.splitlines() if line.split()}
    losses = [event["loss"] for event in read_log(folder / "log.jsonl") if "loss" in event]
    assert len(losses) == 2
    assert f"{losses[0]:.4f} → {losses[1]:.4f}" in out
    assert json.loads((folder / "environment.json").read_text())["transformers"]
    assert yaml.safe_load((folder / "run.yaml").read_text())["max_steps"] == 2
    if find_spec("matplotlib"):
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    trained, student = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, models / "student"))
    assert not all((a == b).all() for a, b in zip(trained.parameters(), student.parameters(), strict=True))

    answers = ("--sets", models / "data.jsonl", "--limit", "2", "--seeds", "1,2", "--max-new-tokens", "4")
    assert switchkd("eval", folder, *answers) == 0
    assert len(json.loads((folder / "eval" / "eval.json").read_text())["seeds"]) == 2


def test_stages_run_in_turn_and_resuming_leaves_out_what_is_finished(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"method": "kd", "max_steps": 1}, {"method": "gkd", "max_steps": 1}]
    path, folder = write_run(models, tmp_path, stages=stages), tmp_path / "out"
    assert switchkd("train", path) == 0
    stages_logged = [event["stage"] for event in read_log(folder / "log.jsonl") if "loss" in event]
    assert stages_logged == ["1-kd", "2-gkd"]
    start = AutoModelForCausalLM.from_pretrained(folder / "1-kd").state_dict()
    end = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any((start[name] != end[name]).any() for name in start)
    capsys.readouterr()
    assert switchkd("train", path, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out
    kept = (folder / "run.yaml").read_text()
    assert switchkd("train", path, "--resume", "--set", "stages.0.max_steps=2") == 2
    assert "stage 1-kd is to be trained, but 2-gkd has already begun" in " ".join(capsys.readouterr().err.split())
    assert (folder / "run.yaml").read_text() == kept
    assert switchkd("train", path, "--resume", "--set", "stages.1.max_steps=2") == 0
    assert [e["step"] for e in read_log(folder / "log.jsonl") if e["stage"] == "2-gkd" and "loss" in e] == [1, 2]


def test_an_adapter_is_merged_into_the_model_that_the_run_leaves(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = write_run(models, tmp_path, max_steps=1, peft={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert switchkd("train", path) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names
    assert "adapter_config.json" not in names


def test_rollout_writes_every_field_and_shows_who_wrote(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "rollouts.jsonl"
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--output", output)
    arguments = ("--prompt", "one two", "--prompt", "sun", "--max-new-tokens", "8", "--threshold", "0.2")
    assert switchkd("rollout", *pair, *arguments) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["one two", "sun"]
    for record in records:
        numbers = ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part")
        per_token = ("tokens", "written_by_teacher", *numbers)
        assert {len(record[name]) for name in per_token} == {len(record["token_ids"])}
        by_rule = [d > t for d, t in zip(record["divergence"], record["threshold"], strict=True)]
        assert by_rule == record["written_by_teacher"]
    shown = capsys.readouterr().out
    assert "written by the teacher" in shown
    assert f"teacher {records[0]['teacher_share']:.0%}" in shown


@pytest.mark.parametrize(
    ("policy", "settings", "students"),
    [
        ("late", ("--teacher-share", "0.5"), 3),
        ("early", ("--teacher-share", "0"), 6),
        ("mix", ("--teacher-share", "1"), 0),
        # Every divergence is above 0 times the mean of those before it.
        ("adaswitch", ("--factor", "0", "--window", "2"), 2),
    ],
)
def test_a_policy_takes_its_settings_and_refuses_others(
    models: Path,
    tmp_path: Path,
    policy: str,
    settings: tuple[str, ...],
    students: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "rollouts.jsonl"
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--output", output)
    call = ("rollout", *pair, "--prompt", "one two", "--max-new-tokens", "6", "--policy", policy)
    assert switchkd(*call, *settings) == 0
    record = json.loads(output.read_text())
    assert record["written_by_teacher"] == [at >= students for at in range(6)]
    capsys.readouterr()
    assert switchkd(*call, "--threshold", "0.2", "--force") == 2
    assert f"policy '{policy}' takes" in capsys.readouterr().err


def test_greedy_interleaving_with_the_best_token_alone_is_the_teachers_text(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "rollouts.jsonl"
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--output", output)
    call = (
        "rollout",
        *pair,
        "--prompt",
        "one two",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
        "--force",
        "--policy",
    )
    records = []
    for policy in (("interleave", "--keep-top-k", "1"), ("teacher",)):
        assert switchkd(*call, *policy) == 0
        records.append(json.loads(output.read_text()))
    assert records[0]["token_ids"] == records[1]["token_ids"]
    assert any(records[0]["written_by_teacher"])


def test_the_help_of_policy_names_every_policy_and_the_settings_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert switchkd("rollout", "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in POLICIES)
    assert "switchkd settings policy" in " ".join(shown.replace("│", "").split())
    assert switchkd("settings", "policy") == 0
    shown = capsys.readouterr().out
    assert all(f"policy: {name}" in shown for name in POLICIES)
    settings = {key for policy in POLICIES.values() for key in settings_of(policy)}
    assert all(f"policy.{key}" in shown for key in settings)


def test_a_student_alone_rolls_out_a_set_and_what_is_no_number_is_null(models: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{n} says"} for n in range(30, 35)])
    output = tmp_path / "rollouts.jsonl"
    alone = ("--student", models / "student", "--policy", "student", "--output", output, "--max-new-tokens", "3")
    assert switchkd("rollout", *alone, "--data", rows, "--limit", "2") == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2
    assert set(records[0]["divergence"]) == {None}
    assert records[0]["teacher_share"] == 0


def test_calibrate_says_what_to_put_in_the_run_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--data", models / "data.jsonl")
    options = ("--teacher-share", "0.4", "--decay", "linear", "--decay-rate", "0.02", "--max-new-tokens", "40")
    assert switchkd("calibrate", *pair, *options, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert found["measured_share"] == pytest.approx(0.4, abs=found["tolerance"])
    assert f"  threshold: {found['threshold']:.3g}\n  decay: linear\n  decay_rate: 0.02\n" in shown
    assert "32-63" in shown
    assert {len(values) for values in found["by_position"].values()} == {len(found["by_position"]["rows"])}


def test_diagnose_shows_three_texts(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--output", tmp_path)
    short = ("--prompt", "one two", "--prompt", "sun", "--max-new-tokens", "8")
    assert switchkd("diagnose", *pair, *short, "--threshold", "0.2") == 0
    shown = capsys.readouterr().out
    texts = json.loads((tmp_path / "diagnosis.json").read_text())["texts"]
    assert list(texts) == ["student", "switch", "teacher"]
    assert texts["switch"]["policy"]["threshold"] == 0.2
    assert all(name in shown for name in texts)
    distance = json.loads((tmp_path / "diagnosis.json").read_text())["distance"]
    assert f"{distance['reverse_kl']['mean']:.4g} ±" in shown
    assert f"{distance['forward_kl']['per_token']:.4g} ±" in shown
    assert switchkd("diagnose", *pair, *short, "--threshold", "0.2", "--teacher-share", "0.3") == 2
    assert "give one of them" in capsys.readouterr().err
    # The share is looked for where no threshold is given; one token more or less of a dozen is 8 %.
    assert switchkd("diagnose", *pair, *short, "--teacher-share", "0.5") == 0
    texts = json.loads((tmp_path / "diagnosis.json").read_text())["texts"]
    assert texts["switch"]["teacher_share"] == pytest.approx(0.5, abs=0.1)


def test_measures_are_drawn_where_matplotlib_is_and_told_where_it_is_not(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--output", tmp_path)
    options = ("--prompt", "one two", "--prompt", "sun", "--max-new-tokens", "8")
    for command, name in (("calibrate", "calibration.png"), ("diagnose", "diagnosis.png")):
        assert switchkd(command, *pair, *options) == 0
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        (tmp_path / name).unlink()
        with monkeypatch.context() as without:
            without.setattr("switchkd.report.plots.find_spec", lambda name: None)
            capsys.readouterr()
            assert switchkd(command, *pair, *options) == 0
        assert "matplotlib is not installed" in " ".join(capsys.readouterr().out.split())
        assert not (tmp_path / name).exists()


# The embedded pair is what it is: two steps of 4 texts, and 24 answers, none longer than a medium one. CI runs whole steps besides.
def test_the_demo_shows_its_table_and_replaces_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the processes, which would each import torch; tests/test_study.py has them.
    monkeypatch.setattr("switchkd.study.launch.run_all", carry_out_here)
    values = demo._values

    def of_few_texts(changes: Mapping[str, Any]) -> dict[str, Any]:
        given = values(changes)
        return given | {"run": given["run"] | {"per_device_train_batch_size": 4, "max_new_tokens": 96}}

    monkeypatch.setattr(demo, "_values", of_few_texts)
    monkeypatch.setattr(demo, "_ROLLOUTS", 4)
    folder = tmp_path / "demo"
    call = ("demo", "--output", folder, "--steps", "1", "--limit", "6")
    assert switchkd(*call) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("short", "medium", "long", "on_policy", "teacher", "written by the teacher"))
    assert "With prompts alone, SWITCH took the student from" in out
    result = json.loads((folder / "demo.json").read_text())["exact_match"]
    assert list(result) == ["start", "on_policy", "switch", "teacher"]
    assert all(list(parts) == ["all", "short", "medium", "long"] for parts in result.values())
    assert result["teacher"]["all"] > result["start"]["all"]
    suggested = next(line.split() for line in out.splitlines() if line.startswith("  switchkd rollout"))
    model = suggested[suggested.index("--student") + 1]
    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == "llama"
    # It is finished, so the next demo starts from nothing.
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Unless a user has put something there: a study of a copy of demo.yaml, which names this folder, leaves runs and rows.
    mine = folder / "runs" / "switch-11-0123abcd"
    mine.mkdir()
    with pytest.raises(UserError, match=f"did not write .runs/{mine.name}., so it is not replaced"):
        make_room(folder, "seeds: [1]\n")
    mine.rmdir()
    evaluated = folder / "runs" / plan_of(read_study(folder / "demo.yaml"))[0].folder_name / "run" / "eval"
    evaluated.mkdir(parents=True)
    with pytest.raises(UserError, match="run/eval"):
        make_room(folder, "seeds: [1]\n")
    evaluated.rmdir()
    rows = folder / "rows.jsonl"
    row = json.loads(rows.read_text().splitlines()[0])
    rows.write_text(rows.read_text() + json.dumps({**row, "identity": "mine"}) + "\n")
    with pytest.raises(UserError, match=r"rows of other runs in rows\.jsonl"):
        make_room(folder, "seeds: [1]\n")
    rows.write_bytes(kept[rows])
    study = folder / "demo.yaml"
    study.write_bytes(kept[study] + b"methods: {mine: {method: kd}}\n")
    with pytest.raises(UserError, match="was changed since the demo wrote it"):
        make_room(folder, "seeds: [1]\n")
    study.write_bytes(kept[study])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    make_room(folder, "seeds: [1]\n")
    assert [path.name for path in folder.iterdir()] == ["demo.yaml"]


@pytest.mark.parametrize(
    ("gain", "difference", "said"),
    [
        (7.0, Interval(10.0, 7.0, 13.0), "So it worked"),
        (-1.0, Interval(4.0, 2.0, 6.0), "did not improve it"),
        (7.0, Interval(-4.0, -6.0, -2.0), "on-policy text did better"),
        (7.0, Interval(1.0, -2.0, 4.0), "may be chance"),
        (0.0, Interval(0.0, 0.0, 0.0), "may be chance"),
    ],
)
def test_the_demo_says_what_happened(gain: float, difference: Interval, said: str) -> None:
    def line(name: str, mean: float, **parts: Interval) -> Line:
        return Line(name, "", "run", (1,), {part: Interval(mean, mean, mean) for part in ("all", "long")}, parts, {})

    lines = {"start": line("start", 50.0), "on_policy": line("on_policy", 50.0 + gain - difference.mean)}
    lines["switch"] = line("switch", 50.0 + gain, all=difference, long=difference)
    told = verdict(lines)
    assert said in told
    assert f"from 50.0 to {50 + gain:.1f} % exact ({gain:+.1f})" in told
    assert ("differ most on long answers" in told) == (difference.mean != 0)


def rollout_of(token_ids: tuple[int, ...], by_teacher: tuple[bool, ...], pair: ModelPair) -> Rollout:
    nothing = (math.nan,) * len(token_ids)
    return Rollout(
        Prompt((7,), 0), token_ids, by_teacher, nothing, nothing, nothing, nothing, finish_reason=FinishReason.LENGTH
    )


def test_the_shown_text_is_the_decoded_one_in_runs_of_one_writer(llama_pair: ModelPair) -> None:
    tokenizer = llama_pair.tokenizer
    assert tokenizer is not None
    rollout = rollout_of((7, 8, 9, 10), (False, True, True, False), llama_pair)
    runs = list(writer_runs(rollout, tokenizer))
    assert [by_teacher for _, by_teacher in runs] == [False, True, False]
    assert "".join(run for run, _ in runs) == tokenizer.decode([7, 8, 9, 10])
    marked = rollout_text(rollout, tokenizer, color=False).plain
    assert "« two three»" in marked


def test_what_a_model_wrote_is_neither_markup_nor_control(llama_pair: ModelPair) -> None:
    assert visible("a\x1b[31mb\x07[red]\n\t") == "a\\x1b[31mb\\x07[red]\n\t"

    class Hostile:
        def decode(self, token_ids: list[int], **_options: bool) -> str:
            return "[bold red]x\x1b[2J[/nothing]"[: 30 if len(token_ids) > 1 else 11]

    console = Console(force_terminal=True, color_system="standard", width=200, record=True)
    with console.capture() as captured:
        print_rollouts([rollout_of((3, 4), (True, False), llama_pair)], Hostile(), console)  # type: ignore[arg-type]
    assert "[/nothing]" in captured.get()
    assert "\x1b[2J" not in captured.get()
