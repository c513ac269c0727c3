"""Whatever people get wrong costs them one clear sentence and an exit code: no traceback, no lost checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import transformers.modeling_utils

from runs import save, switchkd, write_rows, write_run
from switchkd.run.callbacks import read_log
from switchkd.settings.mapping import read_mapping
from switchkd.training.checkpoints import last_complete_checkpoint
from switchkd.training.trainer import SwitchTrainer
from tiny import WORDS, tiny_model, tiny_tokenizer

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that has to fail before any training, and returns what it says on stderr."""

    def no_training(*_: Any, **__: Any) -> None:
        pytest.fail("training began")

    def run(*arguments: str | Path) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(SwitchTrainer, "train", no_training)
            assert switchkd(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("switchkd: ")
        assert "Traceback" not in said
        return said

    return run


# ------------------------------------------------------------------------------------------------------ the run file


def test_a_missing_run_file(refused: Refused, tmp_path: Path) -> None:
    assert f"no run file {tmp_path / 'none.yaml'}" in refused("train", tmp_path / "none.yaml")


def test_a_path_may_have_an_equals_sign(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-5"
    folder.mkdir()
    for path, said in ((folder / "run.yaml", "no run file"), (folder, "")):
        told = refused("train", path, "--resume")
        assert "--set" not in told
        assert said in told
    assert "write --set max_steps=3" in refused("train", "run.yaml", "max_steps=3")


def test_broken_yaml_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: a\nteacher: [b\nmethod: kd\n")
    assert f"{path}:3 is not YAML" in refused("train", path)


def test_a_key_that_stands_twice_names_both_lines(refused: Refused, models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path)
    before = len(path.read_text().splitlines())
    path.write_text(path.read_text() + "teacher: other\n")
    assert f"{path}:{before + 1}: the key 'teacher' stands twice, first in line 2" in refused("train", path)
    path.write_text("student: a\nstages:\n- {method: kd, max_steps: 1, max_steps: 2}\n")
    assert f"{path}:3: the key 'max_steps' stands twice" in refused("train", path)
    run = write_run(models, tmp_path)
    assert "'r' stands twice" in refused("train", run, "--set", "peft={r: 1, r: 2}")


def test_a_key_that_replaces_one_of_an_anchor_is_none_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n")
    assert read_mapping(path)["c"] == {"x": 2, "y": 3}


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "1: 2"])
def test_a_file_that_holds_no_settings(refused: Refused, tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert "has to hold settings" in refused("train", path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "swtich"}, "there is no method named 'swtich'; choose one of"),
        ({"thresold": 0.1}, "there is no setting 'thresold'"),
        ({"stages": [{"methd": "kd"}]}, "did you mean 'method'?"),
        ({"max_steps": "many"}, "max_steps is 'many'"),
        ({"divergence": "kl"}, "there is no divergence named 'kl'"),
        ({"threshold": -1}, "threshold is -1"),
        ({"decay_rate": 0.1, "final_fraction": 0.1}, "two ways to say the same thing"),
        ({"top_p": 0}, "top_p is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"teacher": None}, "needs a teacher"),
        ({"student": None}, "student is missing"),
        ({"train_data": "dollly"}, "there is no data set 'dollly'; known are dolly"),
        ({"train_data": "world:tarin"}, "no split 'tarin'"),
        ({"train_data": "none.jsonl"}, "there is no file none.jsonl"),
        ({"eval_strategy": "steps"}, "there is no eval_data"),
        ({"student": "./none"}, "'./none'"),
        ({"teacher": "world:techer"}, "'world:techer'"),
        ({"dtype": "float33"}, "float33"),
        ({"student_drop_layers": "7"}, "'7'"),
        ({"peft": {"rank": 8}}, "rank"),
        ({"stages": [{"max_steps": 1}, {"method": "gkd", "teacher": "./none"}]}, "'./none'"),
        ({"stages": [{"max_steps": 1}, {"max_prompt_tokens": 2}]}, "the prompt has more than max_prompt_tokens (2)"),
        ({"max_new_tokens": 600}, "512 positions"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(
    refused: Refused, models: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in refused("train", write_run(models, tmp_path, **changes))
    assert not list((tmp_path / "out").glob("*"))


# ---------------------------------------------------------------------------------------------------------- the data


def test_broken_json_names_file_and_line(refused: Refused, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one", "completion": "two"}\n{"prompt": "one\n')
    assert f"{path}:2: not JSON" in refused("train", write_run(models, tmp_path, train_data=str(path)))


@pytest.mark.parametrize(
    ("row", "method", "said"),
    [
        ({"prompt": "one " * 20, "completion": "two"}, "kd", "the prompt has 20 tokens; max_prompt_tokens is 16"),
        ({"prompt": " ", "completion": "two"}, "kd", "empty prompt"),
        ({"prompt": "one"}, "kd", "no response"),
        ({"prompt": "one", "completion": ""}, "sft", "no response"),
        ({"promt": "one", "completion": "two"}, "switch", "unknown column 'promt'"),
        ({"prompt": 3, "completion": "two"}, "switch", "not text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    refused: Refused, models: Path, tmp_path: Path, row: dict[str, Any], method: str, said: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": "two"}, row])
    text = refused("train", write_run(models, tmp_path, train_data=str(path), method=method))
    assert f"{path}:2" in text
    assert said in text


def test_bad_rows_can_be_left_out(models: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": "two"}, {"prompt": " "}])
    run = write_run(models, tmp_path, train_data=str(path), skip_bad_rows=True, max_steps=1)
    assert switchkd("train", run) == 0


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_bad_rows_can_be_left_out_from_the_command_line(command: str, models: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": "two"}, {"prompt": " "}])
    output = tmp_path / "rollouts.jsonl"
    commands: dict[str, list[str | Path]] = {
        "train": ["train", write_run(models, tmp_path, train_data=str(path), max_steps=1)],
        "rollout": ["rollout", "--student", models / "student", "--policy", "student", "--max-new-tokens", "3"],
    }
    data = ["--data", path, "--output", output] if command == "rollout" else []
    assert switchkd(*commands[command], *data, "--skip-bad-rows") == 0


# -------------------------------------------------------------------------------------------------------- the models


def test_different_tokenizers(refused: Refused, models: Path, tmp_path: Path) -> None:
    other = save(tiny_model("llama"), tiny_tokenizer([*WORDS[1:], WORDS[0]]), tmp_path / "other")
    text = refused("train", write_run(models, tmp_path, teacher=str(other)))
    assert "the tokenizers of student and teacher differ" in text
    assert "'one'" in text


def test_a_vocabulary_that_differs_by_padding_works(models: Path, tmp_path: Path) -> None:
    padded = save(tiny_model("llama", vocab=80), tiny_tokenizer(), tmp_path / "padded")
    assert switchkd("train", write_run(models, tmp_path, teacher=str(padded), max_steps=1)) == 0
    losses = [event["loss"] for event in read_log(tmp_path / "out" / "log.jsonl") if "loss" in event]
    assert 0 < losses[0] < 100


def test_a_folder_without_a_model(refused: Refused, models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused("train", write_run(models, tmp_path, student=str(tmp_path / "empty")))


# -------------------------------------------------------------------------------------------------------- the folder


def test_a_folder_that_holds_another_run_is_left_alone(refused: Refused, models: Path, tmp_path: Path) -> None:
    run, folder = write_run(models, tmp_path), tmp_path / "out"
    assert switchkd("train", run, "--set", "max_steps=1") == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "holds another run (finished)" in refused("train", run)
    assert "threshold is 0.1" in refused("train", run, "--resume", "--set", "threshold=0.1")
    assert "holds no demo" in refused("demo", "--output", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_that_holds_something_else(refused: Refused, models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("words")
    assert "is not empty (thesis.tex)" in refused("train", write_run(models, tmp_path))
    assert "is not empty (thesis.tex)" in refused("demo", "--output", tmp_path / "out")
    (tmp_path / "file").write_text("words")
    assert "is a file" in refused("train", write_run(models, tmp_path, output_dir=str(tmp_path / "file")))


def test_nothing_to_resume(refused: Refused, models: Path, tmp_path: Path) -> None:
    assert "to resume" in refused("train", write_run(models, tmp_path), "--resume")


def test_a_run_that_is_shortened_to_less_than_it_has_is_no_shorter_run(
    refused: Refused, models: Path, tmp_path: Path
) -> None:
    run = write_run(models, tmp_path)
    assert switchkd("train", run) == 0
    for steps in (2, 3):
        said = refused("train", run, "--resume", "--set", f"max_steps={steps}")
        assert f"would have {steps} steps now, but {tmp_path / 'out' / 'checkpoint-4'} is from a run of 4" in said
    # 6 steps an epoch.
    said = refused("train", run, "--resume", "--set", "max_steps=-1", "--set", "num_train_epochs=0.5")
    assert "would have 3 steps now" in said


def test_without_a_checkpoint_a_finished_model_stays_and_a_begun_run_says_that_it_begins_again(
    refused: Refused, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = write_run(models, tmp_path, max_steps=1, save_strategy="no"), tmp_path / "out"
    assert switchkd("train", run) == 0
    assert "no checkpoint to go on from" in refused("train", run, "--resume", "--set", "max_steps=2")
    # As one that was killed before its end.
    (folder / "finished.json").unlink()
    capsys.readouterr()
    assert switchkd("train", run, "--resume") == 0
    assert "There is no checkpoint: it begins again at step 0." in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_says_where_nothing_goes_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(models, tmp_path, save_only_model=True)

    def interrupted(trainer: SwitchTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return compute_loss(trainer, *args, **kwargs)

    compute_loss = SwitchTrainer.compute_loss
    monkeypatch.setattr(SwitchTrainer, "compute_loss", interrupted)
    assert switchkd("train", run) == 130
    assert "nothing goes on from it" in capsys.readouterr().err
    assert switchkd("train", run, "--resume") == 2
    assert "holds no optimizer" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- disk, and Ctrl-C


def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_run_resumes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = write_run(models, tmp_path), tmp_path / "out"
    write = safetensors.torch.save_file

    def full_at_step_four(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(filename):
            Path(filename).write_bytes(b"partial")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, filename, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", full_at_step_four)
        assert switchkd("train", run) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(folder / "checkpoint-2") in said
    assert not (folder / "checkpoint-4").exists()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    assert switchkd("train", run, "--resume") == 0
    assert "Goes on from" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = write_run(models, tmp_path, max_steps=2), tmp_path / "out"
    write = safetensors.torch.save_file

    def full_at_the_end(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint" not in str(filename):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, filename, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", full_at_the_end)
        assert switchkd("train", run) == 2
    assert str(folder / "checkpoint-2") in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists()
    assert switchkd("train", run, "--resume") == 0
    assert (folder / "model.safetensors").exists()
    assert not list(folder.glob("*partial*"))


def test_ctrl_c_saves_and_says_how_to_go_on(models: Path, tmp_path: Path) -> None:
    run, folder = write_run(models, tmp_path, max_steps=5000, save_steps=5000), tmp_path / "out"
    command = [sys.executable, "-m", "switchkd", "train", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        # From the first step's line on, training is under way.
        while not process.stdout.readline().startswith("The first step took"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    kept = last_complete_checkpoint(folder)
    assert kept is not None
    step = int(kept.name.split("-")[1])
    assert f"stopped after step {step} of 5000: {kept} is kept" in said
    assert f"switchkd train {folder / 'run.yaml'} --resume" in said
    assert switchkd("train", folder / "run.yaml", "--resume", "--set", f"max_steps={step + 1}") == 0
    assert (folder / "model.safetensors").exists()


def test_a_second_ctrl_c_stops_at_once(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = write_run(models, tmp_path), tmp_path / "out"
    compute_loss = SwitchTrainer.compute_loss

    def interrupted(trainer: SwitchTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return compute_loss(trainer, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(SwitchTrainer, "compute_loss", interrupted)
        assert switchkd("train", run) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"{folder / 'checkpoint-2'} is kept" in capsys.readouterr().err
    assert switchkd("train", run, "--resume") == 0


def test_ctrl_c_outside_of_a_run(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("switchkd.run.launch.train_run", interrupted)
    assert switchkd("train", write_run(models, tmp_path)) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the other commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rollout", "--student", "{m}/student", "--prompt", "one"], "needs a teacher"),
        (["rollout", "--student", "{m}/student", "--policy", "pupil", "--prompt", "one"], "no policy named 'pupil'"),
        (["rollout", "--student", "{m}/student", "--policy", "student"], "--prompt or with --data"),
        (["rollout", "--student", "{m}/student", "--policy", "student", "--prompt", " "], "empty prompt"),
        (
            ["rollout", "--student", "{m}/student", "--policy", "student", "--threshold", "1", "--prompt", "one"],
            "threshold is 1, but policy 'student' takes no settings",
        ),
        (
            ["rollout", "--student", "{m}/student", "--policy", "interleave", "--keep-top-k=0", "--prompt", "one"],
            "keep_top_k is 0; the teacher has to accept",
        ),
        (
            ["rollout", "--student", "{m}/student", "--policy", "late", "--keep-top-k", "3", "--prompt", "one"],
            "keep_top_k is 3, but policy 'late' takes teacher_share",
        ),
        (
            ["rollout", "--student", "{m}/student", "--thresold", "3", "--prompt", "one"],
            "there is no option '--thresold'; did you mean '--threshold'?",
        ),
        (["rollout", "--student", "{m}/student", "--prompt", "one", "--threshold"], "option --threshold needs a value"),
        (["rollout", "--student", "{m}/student", "--prompt", "one", "two"], "there is no option 'two'"),
        (
            ["rollout", "--student", "{m}/student", "--prompt", "one", "--threshold", "["],
            "--threshold is '[', which cannot",
        ),
        (
            ["rollout", "--student", "a", "--policy", "student", "--prompt", "one", "--output", "{m}/data.jsonl"],
            "data.jsonl is there already; give another --output, or --force to replace it",
        ),
        (["calibrate", "--student", "a", "--teacher", "b", "--threshold", "1"], "is what calibrate finds"),
        (
            ["rollout", "--student", "{m}/student", "--policy", "student", "--prompt", "one", "--top-p", "2"],
            "top_p is 2",
        ),
        (["eval", "{m}/student", "--sets", "dollly"], "there is no data set 'dollly'"),
        (["eval", "{m}/student", "--sets", "{m}/data.jsonl", "--seeds", "ten"], "--seeds is 'ten'"),
        (["eval", "{m}/student", "--sets", ","], "--sets"),
        (["eval", "{m}/student", "--sets", "{m}/data.jsonl", "--max-new-tokens", "400"], "knows 512 positions"),
        (["eval", "{m}/none", "--sets", "{m}/data.jsonl"], "none"),
        (["methods", "swtich"], "there is no method named 'swtich'"),
    ],
)
def test_commands_that_cannot_be_carried_out(refused: Refused, models: Path, arguments: list[str], said: str) -> None:
    assert said in refused(*(argument.format(m=models) for argument in arguments))


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("trian") == 2
    assert "train" in capsys.readouterr().err


def test_a_traceback_is_for_debug_only(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("switchkd.run.launch.train_run", fails)
    run = write_run(models, tmp_path)
    assert switchkd("train", run) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError: by zero" in said
    assert "--debug" in said
    with pytest.raises(ZeroDivisionError):
        switchkd("train", run, "--debug")
