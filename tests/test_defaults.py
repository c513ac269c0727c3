"""Defaults that do not burn: what a run says of a share, a rate or a limit that will not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from runs import switchkd, write_rows, write_run
from switchkd.run.folder import LOG_FILE
from switchkd.training.learning_rate import ADAPTER, SMALL, WHOLE, learning_rate_for, usual_rates
from switchkd.training.teacher_share_alarm import LEAST, MOST
from tiny import tiny_model, tiny_pair
from trainers import make_trainer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.69, "decay": "constant"}, "the teacher wrote 0.0% of the tokens up to step 3"),
        ({"threshold": 0.0}, "the teacher wrote 100.0% of the tokens up to step 3"),
        ({"threshold": 0.3}, None),
        # As teacher text, its share is 1 by choice.
        ({"method": "distillm2", "teacher_text_share": 1.0}, None),
    ],
)
def test_a_share_at_an_end_is_said_once(
    options: dict[str, Any], said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, tiny_pair("llama"), max_steps=5, **options)
    trainer.train()
    shares = [line["teacher_share"] for line in trainer.state.log_history if "teacher_share" in line][:3]
    if options == {"threshold": 0.3}:
        assert LEAST < sum(shares) / 3 < MOST
    assert caplog.text.count("the teacher wrote") == (said is not None)
    if said is not None:
        assert said in caplog.text
        assert f"take a {'lower' if '0.69' in str(options) else 'higher'} threshold, or threshold: auto" in caplog.text


def test_the_learning_rate_follows_what_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft, small = pytest.importorskip("peft"), tiny_model("llama")
    adapter = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    large = nn.Linear(6000, 6000, device="meta")
    assert [usual_rates(each) for each in (small, adapter, large)] == [SMALL, ADAPTER, WHOLE]
    # In the order of the steps that they are known to take.
    assert WHOLE.default < ADAPTER.default < SMALL.default
    trainer = make_trainer(tmp_path, tiny_pair("llama"), learning_rate=None, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == SMALL.default
    assert not caplog.text
    for student, given, said in (
        (adapter, 1e-5, "hardly learn"),
        (large, 1e-2, "diverge"),
        (small, 1e-9, "hardly learn"),
    ):
        assert learning_rate_for(student, given) == given
        assert f"learning_rate is {given:g}, but {usual_rates(student).kind} is usually trained at" in caplog.text
        assert said in caplog.text
        caplog.clear()
    for rates in (SMALL, ADAPTER, WHOLE):
        assert rates.low < rates.default < rates.high
    assert learning_rate_for(small, 0.0) == 0
    assert not caplog.text


def test_a_run_says_what_it_will_do_and_what_is_odd(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"one two says w{30 + n}", "completion": "sun " * (2 + 3 * n)} for n in range(4)]
    data = str(write_rows(tmp_path / "d.jsonl", rows))
    run = {"method": "kd", "train_data": data, "learning_rate": 0.5, "max_steps": 5, "save_steps": 1}
    assert switchkd("train", write_run(models, tmp_path, **run)) == 0
    assert "3 of 4 responses (75%) are cut" not in caplog.text
    assert "2 of 4 responses (50%) are cut, and end without an end-of-text token." in caplog.text
    assert "max_new_tokens 6 keeps 2 of 4; 8 would keep 2, 16 would keep 4." in caplog.text
    assert "learning_rate is 0.5, but a model of under 30M parameters is usually trained at" in caplog.text
    first = " ".join(capsys.readouterr().out.splitlines()[:3])
    assert "learning rate 0.5, forward_kl." in first
    assert "Text begins without BOS, ends at <eos>." in first
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"]


def test_a_run_finds_its_threshold_by_default(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("train", write_run(models, tmp_path, threshold=None, max_steps=1)) == 0
    out = capsys.readouterr().out
    assert "threshold for 20% teacher tokens" in out.splitlines()[1]
    events = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert abs(events[0]["calibrated_teacher_share"] - 0.2) < 0.05


def test_calibrate_prints_the_spread_and_all_that_its_number_holds_for(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["calibrate", "--student", models / "student", "--teacher", models / "teacher", "--teacher-share", "0.3"]
    call += ["--data", models / "data.jsonl", "--max-new-tokens", "9", "--temperature", "0.9", "--decay", "constant"]
    call += ["--add-bos", "never", "--output", tmp_path]
    assert switchkd(*call) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "calibration.json").read_text())
    settings = yaml.safe_load(out[out.index("In the run file:\n") + 17 : out.index("the numbers are in")])
    assert settings.pop("threshold") == pytest.approx(found["threshold"], rel=5e-3)
    assert settings == {
        "student": str(models / "student"),
        "teacher": str(models / "teacher"),
        "train_data": str(models / "data.jsonl"),
        "decay": "constant",
        "max_prompt_tokens": 256,
        "max_new_tokens": 9,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": 0,
        "add_bos": "never",
    }
    quantiles = found["quantiles"]
    # Without a decay, the threshold for 30 % lies where 70 % of the tokens are below.
    assert quantiles["0.5"] < found["threshold"] < quantiles["0.9"]
    assert f"10% below {quantiles['0.1']:.2g}, 25% below {quantiles['0.25']:.2g}" in out
    assert [*quantiles.values()] == sorted(quantiles.values())


def test_the_rate_in_force_is_recorded_and_may_stay_open_in_a_resumed_run(models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path, method="kd", max_steps=2)
    assert switchkd("train", path) == 0
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["learning_rate"] == SMALL.default
    for run_file in (path, tmp_path / "out" / "run.yaml"):
        assert switchkd("train", run_file, "--resume", "--set", "max_steps=4") == 0
    assert switchkd("train", path, "--resume", "--set", "learning_rate=1e-4") == 2


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"threshold": 3}, "threshold is 3.0, but the divergence is at most ln 2"),
        ({"learning_rate": -1}, "learning_rate is -1.0; it has to be 0 or more"),
        ({"max_prompt_tokens": 3}, "max_prompt_tokens 3 keeps 0 of 12; 4 would keep 12."),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], refusal: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert switchkd("train", write_run(models, tmp_path, **changes)) == 2
    assert refusal in capsys.readouterr().err.replace("\n", " ")
