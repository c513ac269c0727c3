"""What a report is made from: both models' favorites in a few rollouts, and the tables that go to reporters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations.integration_utils import TrackioCallback, WandbCallback

from reports import rollout_line, write_report_run
from runs import switchkd
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.rollout.jsonl import rollout_record
from switchkd.rollout.law import Student
from switchkd.rollout.policies import Switch
from switchkd.rollout.second_reading import FAVORITES, read_again
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.reporters import send_rollouts


@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(8, temperature=0.7, top_k=3), Sampling(8, temperature=0)])
def test_a_second_reading_finds_what_the_rollout_recorded(llama_pair: ModelPair, sampling: Sampling) -> None:
    assert llama_pair.tokenizer is not None
    rollouts = SpeculativeEngine(llama_pair).generate(["one two", "sun"], Switch(0.2), sampling)
    for rollout, reading in zip(rollouts, read_again(llama_pair, rollouts, sampling), strict=True):
        # float32 through a cache and in one pass: the logits differ by up to 3e-5, see tiny.py.
        assert reading.student.logp == pytest.approx(rollout.student_logp, abs=2e-4)
        assert reading.divergence == pytest.approx(rollout.divergence, abs=2e-4)
        assert reading.teacher is not None
        assert reading.teacher.logp == pytest.approx(rollout.teacher_logp, abs=2e-4)
        for ids, logps, token, logp in zip(
            reading.teacher.ids, reading.teacher.ids_logp, rollout.token_ids, reading.teacher.logp, strict=True
        ):
            assert len(set(ids)) == FAVORITES
            assert logps == sorted(logps, reverse=True)
            assert logps[ids.index(token)] == logp if token in ids else logp <= logps[-1]
        record = rollout_record(rollout, llama_pair.tokenizer, reading)
        json.dumps(record, allow_nan=False)
        kept = [sum(each is not None for each in row) for row in record["student_favorites"]["logp"]]
        assert set(kept) == {3 if sampling.top_k else FAVORITES}


def test_a_second_reading_says_what_no_teacher_said(llama_pair: ModelPair) -> None:
    assert llama_pair.tokenizer is not None
    rollouts = SpeculativeEngine(llama_pair).generate(["one two"], Student(), Sampling(6))
    (reading,) = read_again(llama_pair, rollouts, Sampling(6))
    assert rollout_record(rollouts[0], llama_pair.tokenizer)["divergence"] == [None] * len(rollouts[0].token_ids)
    assert rollout_record(rollouts[0], llama_pair.tokenizer, reading)["divergence"] == reading.divergence
    alone = ModelPair(llama_pair.student, None, llama_pair.tokenizer)
    (reading,) = read_again(alone, rollouts, Sampling(6))
    assert (reading.teacher, reading.divergence) == (None, [])
    assert "teacher_favorites" not in rollout_record(rollouts[0], llama_pair.tokenizer, reading)


def test_rollouts_are_tables_where_the_run_reports(llama_pair: ModelPair, tokenizer: PreTrainedTokenizerFast) -> None:
    logged: list[dict[str, Any]] = []
    package = SimpleNamespace(Table=lambda dataframe: dataframe, log=logged.append)
    callbacks: list[TrainerCallback] = []
    for kind, attribute in ((WandbCallback, "_wandb"), (TrackioCallback, "_trackio")):
        callback = kind.__new__(kind)
        setattr(callback, attribute, package)
        callbacks.append(callback)
    rollouts = SpeculativeEngine(llama_pair).generate(["one two", "sun"], Switch(0.2), Sampling(8))
    records = [{"stage": "", "step": 7, **rollout_record(each, tokenizer)} for each in rollouts]
    send_rollouts(callbacks, rollouts, records, tokenizer)
    assert [each["train/global_step"] for each in logged] == [7, 7]
    for each in logged:
        table = each["rollouts"]
        assert list(table["teacher_share"]) == [rollout.teacher_share for rollout in rollouts]
        assert list(table["prompt"]) == [record["prompt"] for record in records]
        unmarked = [re.sub("[«»]", "", response) for response in table["response"]]
        assert unmarked == [record["response"] for record in records]
        assert any("«" in response for response in table["response"])
    assert torch.isfinite(torch.tensor(list(logged[0]["rollouts"]["divergence"]))).all()
    send_rollouts(callbacks, [], [], tokenizer)
    assert len(logged) == 2


def test_the_command_writes_the_page_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_report_run(tmp_path / "run", [rollout_line()])
    assert switchkd("report", folder) == 0
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert switchkd("report", folder, folder / "rollouts.jsonl", "--output", tmp_path / "both.html") == 0
    assert "Say what comes next" in (tmp_path / "both.html").read_text()
    assert switchkd("report", tmp_path / "nowhere") == 2
