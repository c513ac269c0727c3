"""Device and precision: what settings come to on this machine and, by stand-ins, on others, and that models are loaded so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from runs import switchkd, write_run
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.methods.describe import describe_objective
from switchkd.models.load import load_model, load_pair
from switchkd.models.placement import Placement, placement_of
from switchkd.run.file import read_run, run_from_values
from switchkd.training.trainer import SwitchTrainer
from tiny import tiny_model

CPU, BF16 = torch.device("cpu"), torch.bfloat16
RUN = {"student": "a", "teacher": "b", "train_data": "dolly", "output_dir": "runs/x"}


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the machine that runs the tests, nor from a launcher, unless a test says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with eight cards that compute in bf16. Nothing can be put on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    # What transformers would ask the driver for.
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cuda", 0))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 1, raising=False)
    return monkeypatch


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("mps"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 1, raising=False)


# ---------------------------------------------------------------------------------------------- what settings come to


def test_a_cpu_computes_in_float32() -> None:
    assert placement_of() == Placement(CPU, torch.float32, torch.float32, None)


def test_a_gpu_computes_in_bf16_with_a_student_that_can_learn(gpus: pytest.MonkeyPatch) -> None:
    assert placement_of() == Placement(torch.device("cuda", 0), torch.float32, BF16, BF16)
    gpus.setenv("LOCAL_RANK", "3")
    assert placement_of().device == placement_of(device="cuda").device == torch.device("cuda", 3)
    assert placement_of(device="cuda:1").device == torch.device("cuda", 1)
    assert placement_of(device="cpu") == Placement(CPU)
    gpus.setenv("ACCELERATE_USE_CPU", "true")
    assert placement_of() == Placement(CPU)


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert placement_of() == Placement(torch.device("cuda", 0))


@pytest.mark.usefixtures("mac")
def test_a_mac_computes_in_float32() -> None:
    assert placement_of() == Placement(torch.device("mps"))
    with pytest.raises(UserError, match="mps does not have"):
        placement_of(dtype="float64")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"precision": "bf16"}, (torch.float32, BF16, BF16)),
        ({"precision": "bfloat16", "teacher_dtype": "fp32"}, (torch.float32, torch.float32, BF16)),
        ({"precision": "fp32"}, (torch.float32, torch.float32, None)),
        ({"dtype": "bf16"}, (BF16, BF16, None)),
        ({"dtype": "torch.float16", "teacher_dtype": "auto"}, (torch.float16, "auto", None)),
        ({"dtype": torch.float64}, (torch.float64, torch.float64, None)),
        ({"model_init_kwargs": {"torch_dtype": "half"}}, (torch.float16, torch.float16, None)),
        ({"teacher_model_init_kwargs": {"dtype": BF16}}, (torch.float32, BF16, None)),
    ],
)
def test_settings_say_otherwise(settings: Any, expected: tuple[Any, ...]) -> None:
    assert placement_of(**settings) == Placement(CPU, *expected)


def test_weights_of_a_type_that_was_asked_for_are_computed_in_it(gpus: pytest.MonkeyPatch) -> None:
    assert placement_of(dtype="float64").autocast_dtype is None
    assert placement_of(dtype="bf16").autocast_dtype is BF16
    assert placement_of(precision="float32") == Placement(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "device is 'cuda:0', but torch finds no CUDA device"),
        ({"device": "mps"}, "device is 'mps', but torch finds no Metal device"),
        ({"device": "gpu"}, "device is 'gpu'; choose auto, cpu, mps, cuda"),
        ({"device": "xpu"}, "device is 'xpu'; choose auto, cpu, mps, cuda"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose auto, float32 or bf16"),
        ({"precision": "low"}, "precision is 'low'"),
        ({"dtype": "int8"}, "dtype 'int8' is not known; choose float32, bfloat16"),
        ({"teacher_dtype": "float33"}, "teacher_dtype 'float33' is not known"),
    ],
)
def test_what_is_not_there_is_refused(settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        placement_of(**settings)


def test_a_card_past_the_last_is_refused(gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="finds 8 CUDA devices"):
        placement_of(device="cuda:8")


# ------------------------------------------------------------------------------------------------- models are loaded so


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `from_pretrained` is called with; the models stay on the CPU."""
    calls: list[dict[str, Any]] = []
    real = AutoModelForCausalLM.from_pretrained

    def spy(place: str, **options: Any) -> Any:
        calls.append(options)
        return real(place, **{key: value for key, value in options.items() if key != "device_map"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return calls


def names(models: Path) -> tuple[str, str]:
    return str(models / "student"), str(models / "teacher")


def test_models_are_loaded_onto_their_device(
    gpus: pytest.MonkeyPatch, asked: list[dict[str, Any]], models: Path
) -> None:
    pair = load_pair(*names(models))
    assert [call["device_map"] for call in asked] == [{"": torch.device("cuda", 0)}] * 2
    assert [call["dtype"] for call in asked] == [torch.float32, BF16]
    assert pair.autocast_dtype is BF16


def test_a_map_of_the_teacher_s_own_is_kept(
    gpus: pytest.MonkeyPatch, asked: list[dict[str, Any]], models: Path
) -> None:
    load_pair(*names(models), teacher_model_init_kwargs={"device_map": "auto"})
    assert [call["device_map"] for call in asked] == [{"": torch.device("cuda", 0)}, "auto"]


def test_on_a_cpu_nothing_is_placed(asked: list[dict[str, Any]], models: Path) -> None:
    pair = load_pair(*names(models))
    assert pair.autocast_dtype is None
    for call in asked:
        assert "device_map" not in call
        assert call["dtype"] is torch.float32


def test_what_a_trl_user_types_reaches_from_pretrained(models: Path) -> None:
    student = {"torch_dtype": "float64", "attn_implementation": "eager"}
    pair = load_pair(
        *names(models),
        attn_implementation="sdpa",
        model_init_kwargs=student,
        teacher_model_init_kwargs={"dtype": "bf16"},
    )
    assert pair.teacher is not None
    assert (pair.student.dtype, pair.teacher.dtype) == (torch.float64, BF16)
    assert [model.config._attn_implementation for model in pair.models.values()] == ["eager", "sdpa"]


def test_a_placement_decides_alone(models: Path) -> None:
    pair = load_pair(*names(models), placement=placement_of(precision="bf16"))
    assert pair.teacher is not None
    assert (pair.student.dtype, pair.teacher.dtype, pair.autocast_dtype) == (torch.float32, BF16, BF16)
    with pytest.raises(UserError, match="dtype is given beside a placement"):
        load_pair(*names(models), placement=Placement(CPU), dtype="bf16")


def test_a_keyword_that_the_model_does_not_take_is_said(models: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded: .*colour"):
        load_model(names(models)[0], init_kwargs={"colour": "red"})


# ------------------------------------------------------------------------------------------------------ runs and trainer


def config(**settings: Any) -> SwitchConfig:
    return SwitchConfig(output_dir="unused", **settings)


@pytest.mark.parametrize(
    ("settings", "lowered"),
    [({}, False), ({"precision": "bf16"}, True), ({"bf16": True}, True), ({"precision": "bf16", "bf16": True}, True)],
)
def test_accelerate_and_the_pair_agree(settings: Any, lowered: bool) -> None:
    made = config(**settings)
    assert made.use_cpu
    assert made.device == made.placement.device == CPU
    assert (made.bf16, made.mixed_precision) == (lowered, "bf16" if lowered else "no")
    assert made.placement.autocast_dtype == (BF16 if lowered else None)


def test_a_run_on_a_gpu_is_in_bf16_unless_told_otherwise(gpus: pytest.MonkeyPatch) -> None:
    assert (config().bf16, config().use_cpu, config().placement) == (True, False, placement_of())
    assert config(bf16=False).placement == config(precision="float32").placement == Placement(torch.device("cuda", 0))
    assert config(use_cpu=True).placement == Placement(CPU)


@pytest.mark.parametrize(
    ("settings", "launched", "said"),
    [
        ({"precision": "float32", "bf16": True}, "no", "precision is 'float32', but bf16 is True"),
        ({"precision": "bf16", "bf16": False}, "no", "precision is 'bf16', but bf16 is False"),
        ({"precision": "float32"}, "bf16", "precision is 'float32', but bf16 is True"),
        ({"fp16": True}, "no", "fp16 is asked for"),
        ({}, "fp16", "fp16 is asked for"),
    ],
)
def test_contradictions_are_refused(settings: Any, launched: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(UserError, match=said):
        config(**settings)


def test_a_trainer_loads_names_as_its_settings_say(models: Path, tmp_path: Path) -> None:
    settings = {"precision": "bf16", "attn_implementation": "eager", "teacher_model_init_kwargs": {"dtype": "fp32"}}
    args = SwitchConfig(output_dir=str(tmp_path), max_new_tokens=8, **settings)
    trainer = SwitchTrainer(*names(models), args, [{"prompt": "one two"}])
    assert trainer.pair.teacher is not None
    assert trainer.pair.autocast_dtype is BF16
    assert [model.dtype for model in trainer.pair.models.values()] == [torch.float32] * 2
    assert {model.config._attn_implementation for model in trainer.pair.models.values()} == {"eager"}


def test_a_run_file_names_device_and_keywords(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = [f"{key}: {value}" for key, value in RUN.items()]
    path.write_text("\n".join([*lines, "device: cpu", "teacher_dtype: bf16", "teacher_model_init_kwargs: null"]))
    (stage,) = read_run(path, ["teacher_model_init_kwargs.revision=v2", "model_init_kwargs.dtype=fp64"]).in_stages()
    assert stage.config.use_cpu
    assert stage.config.placement == Placement(CPU, torch.float64, BF16)
    assert stage.config.teacher_model_init_kwargs == {"revision": "v2"}


def test_a_run_s_device_is_the_one_that_its_trainer_has(gpus: pytest.MonkeyPatch) -> None:
    assert run_from_values({**RUN, "device": "cuda"}, "here").config().placement.device == torch.device("cuda", 0)
    assert run_from_values({**RUN, "device": "cpu"}, "here").config().placement == Placement(CPU)
    for device in ("cuda:1", "mps"):
        with pytest.raises(UserError, match=f"device is '{device}', but this run would be on cuda:0"):
            run_from_values({**RUN, "device": device}, "here").config()


# ------------------------------------------------------------------------------------------------------- the first line


def said(**settings: Any) -> str:
    made = config(**settings)
    return f"{made.placement.describe()}: {describe_objective(made)}"


def test_the_first_lines_of_a_run_say_it(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert switchkd("train", write_run(models, tmp_path, use_cpu=None), "--device", "cpu", "--set", "max_steps=1") == 0
    first = capsys.readouterr().out.splitlines()[:3]
    assert "on cpu in float32: learning rate 0.001, forward_kl, threshold 0.3 falling to 0.03" in first[1]
    # What it said in one line once, and no more.
    assert len("".join(first).replace(str(tmp_path), "").replace(str(models), "")) < 330


def test_on_other_machines_it_says_another_thing(gpus: pytest.MonkeyPatch) -> None:
    words = (
        "on cuda:0 in float32 under bfloat16 autocast, teacher in bfloat16: learning rate 1e-05, forward_kl, threshold"
    )
    assert said(learning_rate=1e-5).startswith(words)


@pytest.mark.usefixtures("mac")
def test_on_a_mac_too() -> None:
    assert (
        said(threshold=0.2, decay="constant", learning_rate=1e-5)
        == "on mps in float32: learning rate 1e-05, forward_kl, threshold 0.2"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "sft", "learning_rate": 1e-5}, "learning rate 1e-05, cross-entropy"),
        (
            {"method": "gkd", "student_share": 0.5, "cross_entropy_weight": 0.5},
            " + 0.5 x cross-entropy on data text, policy student",
        ),
        ({"method": "kd", "cross_entropy_weight": 0.5}, "forward_kl + 0.5 x cross-entropy"),
        (
            {"method": "gkd", "learning_rate": 2e-4},
            "learning rate 0.0002, jensen_shannon (teacher_weight 0.1), policy student",
        ),
        ({"method": "skd"}, "forward_kl, policy interleave (keep_top_k 25)"),
        ({"threshold": "auto"}, "threshold for 20% teacher tokens"),
    ],
)
def test_what_is_minimized_and_who_writes(settings: Any, words: str) -> None:
    assert said(**settings).endswith(words)


# ---------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("command", ["rollout", "calibrate", "diagnose"])
def test_commands_take_a_device(
    command: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[dict[str, Any]]
) -> None:
    pair = ("--student", models / "student", "--teacher", models / "teacher", "--output", tmp_path / "out")
    call = (command, *pair, "--prompt", "one two", "--max-new-tokens", "4")
    assert switchkd(*call, "--device", "cuda") == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not asked
    assert switchkd(*call, "--device", "cpu", "--precision", "bf16", "--dtype", "fp32") == 0
    assert [call["dtype"] for call in asked] == [torch.float32, BF16]


def test_so_do_eval_train_and_demo(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ("--sets", models / "data.jsonl", "--limit", "1", "--seeds", "1", "--max-new-tokens", "2")
    place = ("--output", tmp_path / "eval", "--dtype", "bf16")
    assert switchkd("eval", models / "student", *answers, *place, "--device", "cpu") == 0
    for call in (("eval", models / "student", *answers), ("train", write_run(models, tmp_path)), ("demo",)):
        capsys.readouterr()
        assert switchkd(*call, "--device", "mps") == 2
        assert "device is 'mps'" in capsys.readouterr().err


def test_no_keyword_makes_pickled_weights_load(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path), init_kwargs={"use_safetensors": False})
