"""What people type who come from elsewhere, or get wrong, and the sentence that they read."""

from __future__ import annotations

import json
import re
import socket
import time
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

import switchkd.cli.main as cli
from runs import switchkd, write_run
from switchkd.cli.foreseen import foreseen
from switchkd.errors import UserError, did_you_mean
from switchkd.methods import inherited
from switchkd.methods.config import SwitchConfig
from switchkd.models import hub
from switchkd.models.pair import rounded
from switchkd.records import Prompt, Rollout
from switchkd.report.terminal import run_table, writer_runs
from switchkd.rollout.second_reading import Favorites, SecondReading
from switchkd.run import callbacks
from switchkd.run.callbacks import ConsoleProgress, read_log
from switchkd.run.file import HINTS, TRAINING_FIELDS, typed_setting
from switchkd.run.rollout_view import SHOWN_ROLLOUTS, RolloutView
from switchkd.settings.foreign import FOREIGN
from switchkd.training.trainer import SwitchTrainer
from switchkd.training.written_step import WrittenStep
from tiny import tiny_pair, tiny_tokenizer
from trainers import EXAMPLES

# What our own faults alone may say.
BUG = "this should not happen"
REFUSED: Any = SimpleNamespace(headers={}, request=None, status_code=403)


def said_of(key: str, value: object = 1) -> str:
    with pytest.raises(UserError) as error:
        typed_setting(key, value, "in run.yaml")
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- other tools' keys


@pytest.mark.parametrize(
    # `before` is what was suggested while the nearest string was taken for the nearest meaning; "" where all 40 names were listed.
    ("typed", "before", "here"),
    [
        ("beta", "adam_beta2", "here it is divergence.teacher_weight"),
        ("lmbda", "", "here it is student_share"),
        ("lambda", "", "here it is student_share"),
        ("lr", "", "here it is learning_rate"),
        ("batch_size", "block_size", "per_device_train_batch_size"),
        ("micro_batch_size", "auto_find_batch_size", "per_device_train_batch_size"),
        ("use_vllm", "use_cpu", "here it is vllm: the address of a"),
        ("use_peft", "use_cpu", "here it is peft"),
        ("torch_dtype", "teacher_dtype", "here it is dtype"),
        ("max_completion_length", "max_prompt_tokens", "here it is max_new_tokens"),
        ("max_seq_length", "", "here it is max_prompt_tokens and max_new_tokens"),
        ("max_length", "max_steps", "here it is max_prompt_tokens and max_new_tokens"),
        ("model", "hub_model_id", "here it is student"),
        ("model_name_or_path", "decay_rate", "here it is student"),
        ("teacher_model", "teacher_power", "here it is teacher"),
        ("teacher_model_name_or_path", "teacher_offload", "here it is teacher"),
        ("dataset", "data_seed", "here it is train_data"),
        ("dataset_name", "data_seed", "here it is train_data"),
        ("seq_kd", "seed", "here it is method: seqkd"),
        ("sft_alpha", "neftune_noise_alpha", "here it is cross_entropy_weight"),
        ("num_generations", "num_train_epochs", "nothing here does the same"),
        ("device_map", "decay", "teacher_model_init_kwargs.device_map"),
        ("alpha", "", "divergence.teacher_weight and divergence.student_weight"),
        ("tau", "", "here it is threshold"),
        ("decay_factor", "'factor'", "here it is final_fraction and decay_rate"),
        ("chat_template", "loss_temperature", "here it is template_from"),
        ("enable_thinking", "enable_jit_checkpoint", "here it is chat_template_kwargs: {enable_thinking: false}"),
        ("system_prompt", "loss_temperature", "nothing here does the same: put it into the data"),
        ("lora_r", "local_rank", "here it is peft.r"),
        ("load_in_4bit", "logging_nan_inf_filter", "here it is teacher_quantization and student_quantization"),
        ("--Teacher-Model", "teacher_power", "here it is teacher"),
    ],
)
def test_a_key_of_another_tool_is_led_to_what_it_is_here(typed: str, before: str, here: str) -> None:
    said = said_of(typed)
    assert here in said
    assert not before or before not in said
    assert "did you mean" not in said
    assert "choose one of" not in said


@pytest.mark.parametrize("key", ["attn_implementation", "device"])
def test_two_keys_that_led_astray_are_settings_by_now(key: str) -> None:
    assert key in HINTS


def test_the_table_names_only_settings_and_only_strangers() -> None:
    known = {*HINTS, "stages"}
    rows = [row for rows in FOREIGN.values() for row in rows]
    assert {key.split(".")[0] for row in rows for key in row.here.split()} <= known
    assert not [(row.names, key) for row in rows for key in known if row.matches(key)]
    assert all(row.here or row.advice for row in rows)
    named = [name for row in rows for name in row.names.split()]
    assert len(named) == len(set(named))


def test_python_is_told_the_same() -> None:
    with pytest.raises(UserError, match="here it is student_share"):
        SwitchConfig(lmbda=0.5)


def test_nothing_far_off_is_suggested_and_only_our_own_settings_are_listed() -> None:
    assert "did you mean 'threshold'?" in said_of("thresold")
    said = said_of("wibble")
    assert "did you mean" not in said
    listed = said.split("choose one of ")[1].split(", ")
    assert {"student", "threshold", "stages"} <= set(listed)
    assert "adam_beta2" in TRAINING_FIELDS
    assert "adam_beta2" not in listed
    assert "adam_beta2" not in did_you_mean("beta", ["adam_beta2"], ["threshold"])


# ------------------------------------------------------------------------------------------------------ run files


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a network, in which to try again is a failure."""

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    reachable = hub._reachable
    reachable.cache_clear()
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits to try again"))
    yield
    reachable.cache_clear()


@pytest.mark.parametrize(
    ("changes", "before", "said"),
    [
        ({"learning_rate": -1}, BUG, "learning_rate is -1.0; it has to be 0 or more"),
        ({"max_steps": 0}, "-0.0 s left", "max_steps is 0; it has to be at least 1"),
        ({"max_steps": -5}, "0 steps", "max_steps is -5; it has to be at least 1"),
        ({"max_steps": None, "num_train_epochs": 0}, "0 steps", "num_train_epochs is 0.0; it has to be above 0"),
        ({"report_to": "wandb"}, BUG, "but the package wandb is not installed; pip install wandb"),
        ({"report_to": "tensorboard"}, BUG, "but the package tensorboard is not installed; pip install tensorboard"),
        ({"optim": "adamw_8bit"}, BUG, "but the package bitsandbytes is not installed; pip install 'switchkd[quant]'"),
        ({"deepspeed": "x.json"}, BUG, "deepspeed is 'x.json', but the package deepspeed is not installed"),
        ({"push_to_hub": True}, BUG, "push_to_hub is true, but the hub cannot be reached"),
        ({"threshold": 3}, "teacher 0%", "threshold is 3.0, but the divergence is at most ln 2"),
        ({"eval_strategy": "epoch"}, "IntervalStrategy", "eval_strategy is 'epoch', but there is no eval_data"),
        ({"dtype": "bf17"}, BUG, "choose float32, bfloat16"),
        ({"student": "nobody/nothing"}, "Retrying in 8s", "there is no such local folder, the hub cannot be reached"),
        ({"train_data": "nobody/nothing"}, "Retrying in 8s", "is no file or folder here, the hub cannot be reached"),
        (
            {"train_data": "dolly"},
            "is no file that can be read here",
            "dolly: no folder is set (--data-dir or SWITCHKD_DATA_DIR), the hub cannot",
        ),
        ({"train_data": "none.csv"}, "cannot be loaded as a data set", "there is no file none.csv; check the path"),
        ({"show_rollouts_every": -1}, BUG, "show_rollouts_every is -1; it has to be 0 or more"),
        (
            {"label_smoothing_factor": 0.1},
            "0.0 s left",
            "label_smoothing_factor is 0.1, but the loss smooths no labels",
        ),
        (
            {"label_names": ["answer"]},
            "0.0 s left",
            "label_names is ['answer'], but rows are read by columns of their own",
        ),
        (
            {"average_tokens_across_devices": False},
            "0.0 s left",
            "average_tokens_across_devices is False, but the loss is divided by the tokens of all processes in any case",
        ),
        (
            {"eval_accumulation_steps": 2},
            "0.0 s left",
            "eval_accumulation_steps is 2, but an evaluation keeps no logits",
        ),
        (
            {"include_for_metrics": ["inputs"]},
            BUG,
            "include_for_metrics is ['inputs'], but an evaluation keeps no logits",
        ),
        ({"train_sampling_strategy": "group_by_length"}, BUG, "in any case; take random or sequential"),
        (
            {"resume_from_checkpoint": "x"},
            "0.0 s left",
            "resume_from_checkpoint is 'x', but a run goes on from the last",
        ),
    ],
)
def test_a_setting_that_cannot_work_costs_a_sentence(
    models: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    before: str,
    said: str,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inherited, "find_spec", lambda name: None)
    monkeypatch.delenv("SWITCHKD_DATA_DIR", raising=False)
    assert switchkd("train", write_run(models, tmp_path, **changes)) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert before not in shown.out + shown.err
    assert BUG not in shown.err
    assert shown.err.count("\n") == 1


def test_bf16_on_a_cpu_is_computed_and_not_refused_in_words_about_gpus() -> None:
    # Before, from transformers: "Your setup doesn't support bf16/gpu. You need to assign use_cpu ..."
    assert SwitchConfig(output_dir="x", use_cpu=True, bf16=True).placement.autocast_dtype == torch.bfloat16


@pytest.mark.parametrize("short", ["bf16", "fp16", "fp32", "bfloat16"])
def test_types_go_by_their_short_names(short: str) -> None:
    assert SwitchConfig(output_dir="x", use_cpu=True, dtype=short).dtype == short


def test_an_older_name_of_transformers_is_translated_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = SwitchConfig(output_dir="x", use_cpu=True, gradient_checkpointing=True)
    assert config.activation_checkpointing is True


def test_a_folder_that_nothing_can_be_written_to(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert switchkd("train", write_run(models, tmp_path, output_dir=str(tmp_path / "file" / "out"))) == 2
    assert f"nothing can be written to {tmp_path / 'file'}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what others raise


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x cannot be read or written: Permission denied"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "a package is missing"),
        (ImportError("Using this requires `lomo`: pip install lomo-optim"), "a package is missing"),
        (ConnectionError("no route"), "the hub cannot be reached: no route"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached: offline"),
        (huggingface_hub.errors.LocalTokenNotFoundError("no token"), "the hub refused: no token"),
        (torch.OutOfMemoryError("2 GiB"), "the device's memory is full (2 GiB)"),
    ],
)
def test_what_is_missing_or_forbidden_is_no_bug(error: Exception, said: str) -> None:
    assert said in (foreseen(error) or "")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), ImportError("cannot import", name="switchkd.x"), KeyError("a"), BrokenPipeError()]
)
def test_our_own_faults_stay_faults(error: Exception) -> None:
    assert foreseen(error) is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "/x"), 2, "/x cannot be read or written: Permission denied"),
        (
            HfHubHTTPError("403 Forbidden", response=REFUSED),
            2,
            "the hub refused: 403 Forbidden",
        ),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x; this should not happen"),
    ],
)
def test_the_exit_code_says_whose_fault_it_is(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    assert switchkd("methods") == code
    assert said in capsys.readouterr().err


def test_the_hub_is_asked_once(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.offline_at_once()
    # By now the client knows, and nobody is asked.
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: pytest.fail("asked again"))
    assert hub.offline_at_once()
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(("options", "heard"), [([], 0), (["--debug"], 1)])
def test_warnings_for_developers_are_for_debug(options: list[str], heard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: Any, **__: Any) -> None:
        warnings.warn_explicit("`x` will be removed", UserWarning, "peft.py", 1, module="peft.tuners")

    monkeypatch.setattr(cli, "app", warns)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        switchkd("methods", *options)
    assert len(caught) == heard


# ------------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize("show", [0, 1])
def test_the_teachers_share_is_that_of_all_rollouts(
    models: Path, tmp_path: Path, show: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--student", models / "student", "--teacher", models / "teacher", "--device", "cpu"]
    prompts = ["--prompt", "one two", "--prompt", "sun and", "--max-new-tokens", "5", "--add-bos", "never"]
    out = tmp_path / "rollouts.jsonl"
    assert switchkd("rollout", *pair, *prompts, "--policy", "teacher", "--show", str(show), "--output", out) == 0
    tokens = sum(len(json.loads(line)["token_ids"]) for line in out.read_text().splitlines())
    said = capsys.readouterr().out
    assert f"the teacher wrote 100% of {tokens} tokens" in said
    assert said.count("ended by") == show


def test_a_run_shows_and_keeps_a_few_of_its_rollouts_and_no_draw_of_training_changes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for every in (0, 3):
        (tmp_path / str(every)).mkdir()
        run = write_run(models, tmp_path / str(every), show_rollouts_every=every, gradient_accumulation_steps=2)
        assert switchkd("train", run) == 0
        losses.append(
            [event["loss"] for event in read_log(tmp_path / str(every) / "out" / "log.jsonl") if "loss" in event]
        )
    assert losses[0] == losses[1]
    assert not (tmp_path / "0" / "out" / "rollouts.jsonl").exists()
    kept = [json.loads(line) for line in (tmp_path / "3" / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [each["step"] for each in kept] == [1, 1, 4, 4, 4, 4]
    # The draws of a step have its number, counted from 0; the first two prompts are followed with the draws that they had.
    assert [each["sample_id"] for each in kept] == [0, 0, 3, 3, 0, 0]
    assert [each["followed"] for each in kept] == [True, True, False, False, True, True]
    assert [each["prompt_id"] for each in kept[4:]] == [each["prompt_id"] for each in kept[:2]]
    for each in kept:
        assert "".join(each["texts"]) == each["response"]
        for role in ("student", "teacher"):
            favorites = each[f"{role}_favorites"]
            for written, ids, logps, logp in zip(
                each["token_ids"], favorites["token_ids"], favorites["logp"], each[f"{role}_logp"], strict=True
            ):
                assert len(ids) == 5
                assert logps == sorted(logps, reverse=True)
                # Read before the step's update, so what was recorded of the token is found again, but for the four digits
                # of the file and for a cache's roundings.
                assert written not in ids or abs(logps[ids.index(written)] - logp) < 2e-4
    said = capsys.readouterr().out
    assert said.count("ended by") == 4
    assert "written by the teacher" in said


def test_rollouts_go_to_tensorboard_where_it_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str, int]] = []
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = SimpleNamespace(add_text=lambda *text: written.append(text))
    nothing = (float("nan"),) * 3
    by_teacher = (False, True, False)
    rollout = Rollout(
        Prompt((5,), 0), (6, 7, 8), by_teacher, nothing, nothing, nothing, nothing, finish_reason="length"
    )
    reading = SecondReading(Favorites([[6]] * 3, [[-0.5]] * 3, [-0.5] * 3), None, [])
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(show_rollouts_every=2),
        newest_rollouts=[rollout] * 3,
        is_world_process_zero=lambda: True,
        pair=SimpleNamespace(tokenizer=tiny_tokenizer()),
        callback_handler=SimpleNamespace(callbacks=[board]),
    )
    monkeypatch.setattr(WrittenStep, "read_again", lambda self, count, followed: [(rollout, reading)] * count)
    nobody: Any = (None, None, None, 0)
    view = RolloutView(trainer, Console(quiet=True), tmp_path / "rollouts.jsonl", "")
    for step in (1, 2, 3):
        view.on_written(WrittenStep(step, [rollout] * 3, *nobody))
        view.on_step_end(trainer.args, TrainerState(global_step=step), TrainerControl())
    assert [step for _, _, step in written] == [1, 3]
    assert written[0][0] == "rollouts"
    assert written[0][1].count("«") == SHOWN_ROLLOUTS


def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])
    piped = Console(file=StringIO(), width=200)
    progress = ConsoleProgress(piped)
    args: Any
    args, state = SimpleNamespace(gradient_accumulation_steps=4), TrainerState(max_steps=5, global_step=2)
    progress.on_train_begin(args, state, TrainerControl())
    for clock[0] in (30.0, 61.0, 90.0):
        progress.on_rollouts(int(clock[0]), 100)
    assert piped.file.getvalue() == "step 3: 61 of 100 rolled out\n"
    shown = ConsoleProgress(Console(file=StringIO(), force_terminal=True))
    shown.measured = "loss 0.1"
    shown.on_rollouts(3, 8)
    assert shown.bar.note == "loss 0.1  3 of 8 rolled out"
    shown.on_substep_end(args, state, TrainerControl())
    assert shown.bar.note == "loss 0.1  batch 1 of 4 trained"


def test_a_search_for_the_threshold_tells_of_its_rollouts_too() -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    args = SwitchConfig(
        output_dir="x",
        use_cpu=True,
        threshold={"name": "auto", "teacher_share": 0.5, "prompts": 3},
        max_steps=1,
        per_device_train_batch_size=2,
        max_new_tokens=4,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SwitchTrainer(pair, args=args, train_dataset=[{"prompt": f"one w{n}"} for n in range(30, 36)])
    told: list[tuple[int, int]] = []
    trainer.tell_rollouts(lambda finished, total: told.append((finished, total)))
    trainer.train()
    assert told[-1] == (2, 2)
    assert (3, 3) in told


def test_args_of_transformers_alone_are_refused() -> None:
    pair = tiny_pair("llama")
    with pytest.raises(UserError, match="args is a TrainingArguments; pass a SwitchConfig"):
        SwitchTrainer(pair, args=TrainingArguments(output_dir="x", use_cpu=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("compute_loss_func", ": .*; leave it out"),
        ("compute_metrics", ": .*; leave it out"),
        ("tokenizer", "; it is processing_class"),
        ("calbacks", ".*callbacks"),
    ],
)
def test_keywords_that_nothing_here_reads_are_refused_and_not_ignored(
    keyword: str, advice: str, tmp_path: Path
) -> None:
    args = SwitchConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match=f"SwitchTrainer takes no {keyword}.*{advice}"):
        SwitchTrainer(tiny_pair("llama"), args=args, train_dataset=EXAMPLES, **{keyword: lambda *_: 0.0})


def test_a_long_text_is_written_as_if_decoded_at_once() -> None:
    tokenizer = tiny_tokenizer()
    ids = tuple(5 + n % 20 for n in range(150))
    nothing = (0.0,) * 150
    by_teacher = tuple(n % 7 < 2 for n in range(150))
    rollout = Rollout(Prompt((5,), 0), ids, by_teacher, nothing, nothing, nothing, nothing, finish_reason="length")
    assert "".join(text for text, _ in writer_runs(rollout, tokenizer)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("command", "rounds"),
    [("calibrate", "round 1, threshold 0.3: the teacher wrote"), ("diagnose", "round 3, teacher")],
)
def test_rounds_and_shares_are_shown_as_they_come(
    models: Path, tmp_path: Path, command: str, rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--student", models / "student", "--teacher", models / "teacher", "--device", "cpu"]
    prompts = ["--data", models / "data.jsonl", "--max-new-tokens", "4", "--add-bos", "never"]
    threshold = ["--threshold", "0.1"] if command == "diagnose" else []
    assert switchkd(command, *pair, *prompts, *threshold, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert rounds in said
    assert len(re.findall(r"round \d+, .*: the teacher wrote \d+\.\d%", said)) >= 1


def test_the_final_table_has_means_and_the_evaluation_loss(tmp_path: Path) -> None:
    steps = [
        {"stage": "", "step": n, "seconds": n, "loss": 1.0 if n <= 20 else 0.5, "teacher_share": 0.2}
        for n in range(1, 61)
    ]
    # A first and a last step that are unlike their neighbors say little.
    steps[0]["loss"], steps[-1]["loss"] = 3.0, 2.5
    evaluations = [{"stage": "", "step": n, "seconds": n, "eval_loss": loss} for n, loss in ((30, 0.75), (60, 0.7))]
    console = Console(file=StringIO(), width=60)
    evaluations[0]["eval_rouge_l"] = 12.5
    console.print(run_table([*steps, *evaluations], tmp_path))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said
    assert re.search(r"rouge_l +12\.5\b", said)
    assert "1.1000 → 0.6000" in said
    assert "0.7500 → 0.7000" in said
    console.print(run_table(steps, tmp_path))
    assert console.file.getvalue().count("eval loss") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("count", "said"),
    [(8, "8"), (999, "999"), (172_992, "173k"), (999_600, "1M"), (1_240_000, "1.24M"), (7.6e9, "7.6B")],
)
def test_counts_are_written_as_people_say_them(count: float, said: str) -> None:
    assert rounded(count) == said


# ------------------------------------------------------------------------------------------------------ data

QUESTIONS = [{"question": "one", "answer": "two"}] * 3
CHAT = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}]
PAIRS = [{"prompt": "one", "completion": "two three", "rejected": "x"}] * 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (QUESTIONS, "3 rows: "),
        (CHAT, "set template_from to teacher or to a template file"),
        (
            [{"prompt": "one " * 700, "completion": "two"}] * 3,
            "3 rows: the prompt has more than max_prompt_tokens (256)",
        ),
        (datasets.Dataset.from_list(PAIRS).to_iterable_dataset(), "whose rows cannot be counted"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS)), "pass one of them, such as ds['train']"),
    ],
    ids=["columns", "template", "length", "stream", "splits"],
)
def test_data_that_cannot_be_used_is_explained_once(rows: Any, said: str) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    with pytest.raises(UserError) as error:
        SwitchTrainer(pair, args=SwitchConfig(output_dir="x", use_cpu=True, threshold=0.3), train_dataset=rows)
    assert str(error.value).count(said) == 1


def test_columns_and_text_that_are_left_out_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pair = tiny_pair("llama", tokenizer=tiny_tokenizer())
    args = SwitchConfig(output_dir="x", use_cpu=True, method="kd", max_new_tokens=1)
    SwitchTrainer(pair, args=args, train_dataset=PAIRS)
    assert "rejected" in caplog.text
    assert "2 of 2 responses (100%) are cut" in caplog.text
