"""Training on machines that are not this one: GPUs, several processes, 16 bits, signals, crashes, teachers elsewhere.

What needs two processes is in tests/test_distributed.py.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import signal
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType, ParallelismConfig
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from runs import save_pair, switchkd, write_run
from switchkd.errors import UserError
from switchkd.loss.chunked import chunked_sum
from switchkd.methods.config import SwitchConfig
from switchkd.models import heads
from switchkd.models.heads import Head
from switchkd.models.pair import ModelPair, parameter_count, rounded
from switchkd.records import Example, Prompt, Rollout, Sampling
from switchkd.rollout.law import Student
from switchkd.rollout.reference import ReferenceEngine
from switchkd.run import launch
from switchkd.run.callbacks import StopCleanly
from switchkd.training.dataset import without_repeats
from switchkd.training.machine import check_one_device, check_sharding, compile_of
from switchkd.training.teachers import TeacherPlace, self_teacher
from switchkd.training.trainer import SwitchTrainer
from switchkd.training.whole_student import WholeHead, WholeStudent, load_optimizer_state, whole, whole_optimizer_state
from tiny import tiny_model, tiny_pair
from trainers import EXAMPLES, RecordingEngine, assert_same_weights, make_examples, make_trainer, weights

# --------------------------------------------------------------------------------------------------------- several GPUs


def test_two_gpus_without_a_launcher_are_refused_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda args: 2))
    with pytest.raises(UserError, match=r"2 GPUs.*torchrun --nproc-per-node 2 -m switchkd.*CUDA_VISIBLE_DEVICES=0"):
        make_trainer(tmp_path, tiny_pair("llama"))


@pytest.mark.parametrize(
    ("student", "teacher", "both_used"),
    [
        (None, {"": 1}, True),
        ({"": torch.device("cuda:0")}, {"": "cuda:1"}, True),
        (None, {"model.layers.0": 0, "model.layers.1": 1}, True),
        (None, {"": 0}, False),
        ({"": "cuda"}, None, False),
        (None, {"": "cpu"}, False),
    ],
)
def test_two_gpus_of_one_process_are_for_models_that_use_both(student: Any, teacher: Any, both_used: bool) -> None:
    pair = tiny_pair("llama", layers=1)
    for model, places in ((pair.student, student), (pair.teacher, teacher)):
        if places:
            model.hf_device_map = places
    args: Any = SimpleNamespace(n_gpu=2, _n_gpu=2, device=torch.device("cuda:0"))
    with nullcontext() if both_used else pytest.raises(UserError, match="each GPU needs a process of its own"):
        # Of several teachers any may be the one that lies elsewhere.
        check_one_device(args, [ModelPair(pair.student), pair])
    assert args._n_gpu == (1 if both_used else 2)


FSDP, DEEPSPEED = DistributedType.FSDP, DistributedType.DEEPSPEED


@pytest.mark.parametrize(
    ("kind", "plugin", "settings", "refused"),
    [
        (DEEPSPEED, {"zero_stage": 1}, {}, None),
        (DEEPSPEED, {"zero_stage": 2}, {}, None),
        (DEEPSPEED, {"zero_stage": 3}, {}, None),
        (DEEPSPEED, {"zero_stage": 3}, {"compile": True}, "compile is true, .* set compile: auto"),
        (FSDP, {}, {}, None),
        (FSDP, {"fsdp_version": 1}, {}, "fsdp_version is 1, .* set fsdp_version: 2"),
        (FSDP, {"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading is true, .* set it to false"),
        (FSDP, {}, {"compile": True}, "compile is true, .* set compile: auto"),
        (
            FSDP,
            {},
            {
                "load_best_model_at_end": True,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "eval_dataset": EXAMPLES,
            },
            "load_best_model_at_end is true, .* leave it out",
        ),
    ],
)
def test_a_spread_that_would_not_be_right_is_refused(
    kind: DistributedType,
    plugin: dict[str, Any],
    settings: dict[str, Any],
    refused: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init = transformers.Trainer.__init__

    def spread(trainer: Any, *args: Any, **named: Any) -> None:
        init(trainer, *args, **named)
        trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = kind == FSDP, kind == DEEPSPEED
        given = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **plugin})
        trainer.accelerator.state = SimpleNamespace(distributed_type=kind, deepspeed_plugin=given, fsdp_plugin=given)

    monkeypatch.setattr(transformers.Trainer, "__init__", spread)
    with nullcontext() if refused is None else pytest.raises(UserError, match=refused):
        make_trainer(tmp_path, tiny_pair("llama"), **settings)


def test_models_that_deepspeed_took_apart_while_they_were_loaded_are_refused() -> None:
    pair = tiny_pair("llama")
    state = SimpleNamespace(distributed_type=DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    next(pair.teacher.parameters()).ds_id = 0
    with pytest.raises(UserError, match=r"took the models apart while they were loaded, .* give their names"):
        check_sharding(state, SwitchConfig(), pair)


@pytest.mark.parametrize(("texts", "refused"), [((1, 1), False), ((2, 1), True), ((1, 2), True)])
def test_texts_that_several_processes_share_are_refused(texts: tuple[int, int], refused: bool) -> None:
    sizes = dict(zip(("cp_size", "sp_size"), texts, strict=True))
    state = SimpleNamespace(distributed_type=DistributedType.NO, parallelism_config=ParallelismConfig(**sizes))
    with pytest.raises(UserError, match="takes texts apart") if refused else nullcontext():
        check_sharding(state, SwitchConfig(), tiny_pair("llama", layers=1))


def test_a_head_that_deepspeed_took_apart_is_whole_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for DeepSpeed; tests/test_deepspeed.py trains with the real one."""
    head = nn.Linear(3, 5, bias=False)
    weights = head.weight.detach().clone()

    @contextmanager
    def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
        parameters[0].data = weights
        yield
        parameters[0].data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    head.weight.ds_id, head.weight.data = 0, torch.empty(0)
    assert torch.equal(whole(head.weight), weights)
    reader = WholeHead(head)
    reader.gather()
    assert not head.weight.numel()
    with reader.kept():
        assert not head.weight.numel()
        reader.gather()
        assert torch.equal(head.weight, weights)
    assert not head.weight.numel()


def test_a_student_in_parts_is_saved_in_the_type_that_it_trains_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under bf16, while rollouts read it rounded too. One process stands for several, and its student counts as in parts."""
    monkeypatch.setattr("switchkd.training.sharded_trainer.sharding_of", lambda state: "FSDP")
    made, trainers = launch._trainer, []

    def watched(*args: Any) -> Any:
        trainers.append(made(*args))
        return trainers[0]

    monkeypatch.setattr(launch, "_trainer", watched)
    save_pair(tmp_path)
    assert switchkd("train", write_run(tmp_path, tmp_path, bf16=True, max_steps=1, save_steps=1)) == 0
    ((trainer, _, _),) = trainers
    copied = trainer.whole.pair.student
    with trainer.reading():
        assert trainer.in_parts
        assert copied.lm_head.weight.dtype == torch.bfloat16
        # As the checkpoint of a run whose server is gone.
        trainer.save_model(tmp_path / "nested")
        assert copied.lm_head.weight.dtype == torch.bfloat16
    assert not sum(each.numel() for each in copied.parameters())
    for folder in ("out", "out/checkpoint-1", "nested"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert_same_weights({name: weights(trainer)[name] for name in saved}, saved)
        assert {each.dtype for each in saved.values()} == {torch.float32}


def test_only_the_process_that_saves_keeps_the_whole_student() -> None:
    pair = tiny_pair("llama", layers=1)
    reader = WholeStudent(pair, sharded=True)
    for here, kept in ((True, parameter_count(pair.student)), (False, 0)):
        with reader.gathered_to_save(here=here):
            assert parameter_count(reader.pair.student) == kept


def test_all_processes_gather_the_optimizers_state_and_one_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[Tensor] = []
    monkeypatch.setattr("switchkd.training.whole_student.whole", lambda part: gathered.append(part) or part)
    parameter = nn.Parameter(torch.ones(3))
    ours, theirs = torch.optim.AdamW([parameter]), torch.optim.AdamW([parameter])
    parameter.sum().backward()
    ours.step()
    assert whole_optimizer_state(ours, here=False) is None
    assert len(gathered) == len(ours.state[parameter]) == 3
    saved = whole_optimizer_state(ours, here=True)
    assert saved is not None
    load_optimizer_state(theirs, saved)
    for key, value in theirs.state[parameter].items():
        assert torch.equal(value, saved["state"][0][key])
        # Else it would lie in the checkpoint's file, which may be written again.
        assert value.data_ptr() != saved["state"][0][key].data_ptr()


def test_parts_of_one_process_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fsdp is set, but there is one process"):
        make_trainer(tmp_path, tiny_pair("llama"), fsdp=True)
    with pytest.raises(UserError, match="teacher_offload is 'shared', but there is one process"):
        make_trainer(tmp_path, tiny_pair("llama"), teacher_offload="shared")


@pytest.mark.parametrize("split_batches", [False, True])
def test_over_all_processes_each_row_of_an_epoch_comes_once(split_batches: bool) -> None:
    """Of what accelerate hands out, for any number of rows, rows a batch and processes."""
    for rows, size, processes in itertools.product(range(1, 20), (1, 2, 3), (1, 2, 3)):
        sampler = BatchSampler(range(rows), size * (processes if split_batches else 1), drop_last=False)
        came: list[int] = []
        for process in range(processes):
            # A single process's loader is not cut up.
            shard = sampler if processes == 1 else BatchSamplerShard(sampler, processes, process, split_batches)
            *batches, last = shard
            came += [row for batch in batches for row in batch]
            came += without_repeats(last, rows, process, processes)
        assert sorted(came) == [*range(rows)]


# -------------------------------------------------------------------------------------------------------------- signals


class Signalled(TrainerCallback):
    """A signal in the first step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "name", "rollout_steps"), [(signal.SIGTERM, "SIGTERM", 1), (signal.SIGINT, "Ctrl-C", 2)]
)
def test_a_signal_stops_after_what_is_written_and_is_given_back(
    number: int, name: str, rollout_steps: int, tmp_path: Path
) -> None:
    said = io.StringIO()
    stopper = StopCleanly(Console(file=said))
    callbacks = [stopper, Signalled(number)]
    options: dict[str, Any] = {"method": "imitkd", "max_steps": 4, "rollout_steps": rollout_steps}
    trainer = make_trainer(tmp_path, tiny_pair("llama", layers=1), callbacks=callbacks, **options)
    before = [signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)]
    ours = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        trainer.train()
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == ours
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert stopper.stopped
    stopped_at = trainer.state.global_step
    assert (stopped_at, (tmp_path / f"checkpoint-{stopped_at}").is_dir()) == (rollout_steps, True)
    assert f"{name}: the run finishes what is written" in said.getvalue()


# ----------------------------------------------------------------------------------------------------- the teacher reads


def _rows_read(pair: ModelPair) -> list[int]:
    """The rows of each forward that the teacher will run."""
    assert pair.teacher is not None
    rows: list[int] = []
    pair.teacher.get_decoder().register_forward_pre_hook(
        lambda module, positional, named: rows.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    return rows


def test_the_teacher_reads_a_replayed_rollout_once(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    options = {"method": "gkd", "student_share": 1.0, "replay_capacity": 8, "max_steps": 6, "split": (8, 1)}
    trainer = make_trainer(tmp_path, pair, **options)
    engine, rows = RecordingEngine(trainer), _rows_read(pair)
    trainer.train()
    written = sum(map(len, engine.calls))
    assert written < 6 * 8
    assert sum(rows) == written


def test_a_rollout_that_a_step_draws_twice_is_read_once(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    trainer = make_trainer(tmp_path, pair, method="gkd")
    (rollout,) = ReferenceEngine(pair).generate([[5, 6]], Student(), Sampling(4))
    rows = _rows_read(pair)
    first, second = trainer._loss.scored([rollout, rollout])
    assert rows == [1]
    assert first.teacher_hidden is second.teacher_hidden is not None


# ---------------------------------------------------------------------------------------------------- the teacher writes


class Killed(RecordingEngine):
    """Dies in its second call."""

    def generate(self, prompts: Sequence[Prompt], **named: Any) -> list[Rollout]:
        if self.calls:
            raise KeyboardInterrupt
        return super().generate(prompts, **named)


def test_the_teachers_text_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "seqkd", "max_steps": 1, "rollout_rows": 1, "max_new_tokens": 4}
    examples = make_examples(20)
    whole = make_trainer(tmp_path / "whole", tiny_pair("llama"), examples, **options)
    whole.train()
    killed = make_trainer(tmp_path / "cut", tiny_pair("llama"), examples, **options)
    first = Killed(killed)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert not (tmp_path / "cut" / "teacher_text.jsonl").exists()
    # What a crash in the middle of a line leaves.
    with (tmp_path / "cut" / "teacher_text.partial.jsonl").open("a") as file:
        file.write('{"prompt_id": 19, "prompt_i')
    resumed = make_trainer(tmp_path / "cut", tiny_pair("llama"), examples, **options)
    second = RecordingEngine(resumed)
    resumed.train()
    wrote = [[rollout.prompt.prompt_id for call in engine.calls for rollout in call] for engine in (first, second)]
    assert wrote == [list(range(8)), list(range(8, 20))]
    cut, uncut = (tmp_path / name for name in ("cut", "whole"))
    assert (cut / "teacher_text.jsonl").read_bytes() == (uncut / "teacher_text.jsonl").read_bytes()
    ours, theirs = (json.loads((each / "teacher_text.manifest.json").read_text()) for each in (cut, uncut))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert not list(tmp_path.glob("*/*partial*"))
    assert_same_weights(weights(resumed), weights(whole))


def test_text_that_was_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "seqkd", "max_steps": 1, "rollout_rows": 1}
    killed = make_trainer(tmp_path, tiny_pair("llama"), make_examples(20), **options)
    Killed(killed)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    with pytest.raises(UserError, match=r"partial.jsonl was made with other seed"):
        make_trainer(tmp_path, tiny_pair("llama"), make_examples(20), **options, seed=7).train()


# ------------------------------------------------------------------------------------------------- stages and what is said


def test_a_stages_models_are_freed_before_the_next_ones_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)
    stages = [{"method": "kd", "max_steps": 1}, {"method": "gkd", "max_steps": 1}]
    # Under bf16 accelerate replaces the model's forward, which puts the model in a cycle.
    run = write_run(tmp_path, tmp_path, stages=stages, bf16=True)
    load, students, alive = launch.load_pair, [], []

    def watched(*args: Any, **named: Any) -> ModelPair:
        alive.append([student() is not None for student in students])
        pair = load(*args, **named)
        students.append(weakref.ref(pair.student))
        return pair

    monkeypatch.setattr(launch, "load_pair", watched)
    gc.disable()
    try:
        assert switchkd("train", run) == 0
    finally:
        gc.enable()
    assert alive == [[], [False]]


def test_a_run_says_the_size_of_a_teacher_on_disk(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    here, away = (make_trainer(tmp_path, pair, teacher_offload=place).describe() for place in ("none", "disk"))
    assert here == away
    assert pair.teacher is not None


def test_a_run_says_the_size_of_a_teacher_that_is_the_student(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = tiny_model("llama", hidden=64)
    size = parameter_count(student)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(tmp_path, ModelPair(student), teacher_model="self", peft_config=config)
    assert f"({rounded(size)}): " in trainer.describe()


# ------------------------------------------------------------------------------------------------------------ precision


def test_the_heads_gradient_is_added_up_in_float32() -> None:
    """In bfloat16 a sum of 512 parts of one sign stops growing, since each is below half a rounding of it."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("llama", dtype=torch.bfloat16, hidden=32)
    hidden_NH = torch.rand(2048, 32, generator=generator).bfloat16()
    factor_N1 = torch.rand(2048, 1, generator=generator)
    head = Head(model.lm_head, 64, lambda logits: logits)

    def loss(logits_PV: Tensor, at: slice, chunk: slice) -> Tensor:
        return (logits_PV.float() * factor_N1[at]).sum(dim=-1)

    chunked_sum(hidden_NH, head, loss, chunk_positions=4).backward()
    gradient = model.lm_head.weight.grad
    assert gradient.dtype == torch.bfloat16
    # Of each chunk's gradient by the logits, the factors, 8 bits are kept.
    expected_H = (factor_N1.bfloat16().double() * hidden_NH.double()).sum(dim=0)
    torch.testing.assert_close(gradient.double(), expected_H.expand(64, -1), rtol=5e-3, atol=0)


def test_bf16_covers_rollouts_scoring_and_the_loss_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, torch.dtype]] = []
    transform_of = heads._transform_of

    def watched(model: Any) -> Any:
        transform = transform_of(model)

        def noted(logits: Tensor) -> Tensor:
            seen.append(("logits", logits.dtype))
            return transform(logits)

        return noted

    monkeypatch.setattr(heads, "_transform_of", watched)
    pair = tiny_pair("llama", scale=5.0, noise=0.5)
    trainer = make_trainer(
        tmp_path, pair, EXAMPLES[:4], method="switch", student_share=0.5, bf16=True, use_cpu=True, max_steps=30,
        learning_rate=3e-3, adam_beta2=0.95, eval_dataset=EXAMPLES,
    )  # fmt: skip
    assert trainer.pair.autocast_dtype == torch.bfloat16
    for role, model in trainer.pair.models.items():
        model.get_decoder().layers[0].mlp.register_forward_hook(
            lambda module, given, output, role=role: seen.append((role, output.dtype))
        )
    seen.clear()
    engine = RecordingEngine(trainer)
    trainer.train()
    trainer.evaluate()
    assert 0 < sum(map(len, engine.calls)) < 30 * 4
    assert {*seen} == {(part, torch.bfloat16) for part in ("logits", "student", "teacher")}
    assert {each.dtype for each in weights(trainer).values()} == {torch.float32}
    measured = [line["divergence"] for line in trainer.state.log_history if "divergence" in line]
    assert sum(measured[-5:]) < sum(measured[:5]) / 1.5


def test_a_given_pair_keeps_its_precision(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    given = ModelPair(pair.student, pair.teacher, autocast_dtype=torch.bfloat16)
    args = make_trainer(tmp_path, pair).args
    assert SwitchTrainer(given, args=args, train_dataset=EXAMPLES).pair is given


@pytest.mark.parametrize("rate", [1e-5, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_would_stand_still_are_warned_of(rate: float, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = tiny_pair("llama", dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, pair, method="sft", learning_rate=rate, max_steps=1)
    said = [str(each.message) for each in caught if "rounded away" in str(each.message)]
    assert len(said) == (rate == 1e-5 and dtype == torch.bfloat16)
    assert all("precision: auto" in each for each in said)
    # What is said is true: of a step, most weights show nothing.
    before = {name: value.clone() for name, value in weights(trainer).items()}
    trainer.train()
    moved = torch.cat(
        [(value != before[name]).flatten() for name, value in weights(trainer).items() if value.ndim == 2]
    )
    assert (float(moved.float().mean()) < 0.5) == bool(said)


def test_the_weights_of_positions_are_not_rounded_under_deepspeed(tmp_path: Path) -> None:
    """transformers rounds whatever tensors of a float it finds in a step's inputs to the type of the model's weights."""
    trainer = make_trainer(tmp_path, tiny_pair("llama", layers=1))
    inputs = trainer._loss.inputs(EXAMPLES)
    thirds_N = torch.full_like(inputs["weights"].weight_N, 1 / 3)
    inputs["weights"] = replace(inputs["weights"], weight_N=thirds_N, return_N=thirds_N)
    trainer.is_deepspeed_enabled = True
    rounding = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator.state = SimpleNamespace(deepspeed_plugin=rounding)
    assert trainer._prepare_inputs({"weights": thirds_N})["weights"].dtype == torch.bfloat16
    # As a training step prepares them, and the loss after it.
    moved = trainer._on_device(trainer._prepare_inputs(inputs))["weights"]
    assert torch.equal(moved.weight_N, thirds_N)
    assert torch.equal(moved.return_N, thirds_N)
    assert moved.share_N is None


# ------------------------------------------------------------------------------------------------- where the teacher is


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_no_graph_is_made_of_a_teacher_whose_weights_move(offload: Any, tmp_path: Path) -> None:
    """A CUDA graph would go on reading them where they were."""
    pair = tiny_pair("llama", layers=1)
    automatic, asked = (SwitchConfig(teacher_offload=offload, compile=each) for each in ("auto", True))
    assert compile_of(pair, automatic, in_parts=False) is False
    with pytest.raises(UserError, match=f"compile is true, .* teacher_offload: {offload} do not; set compile: auto"):
        make_trainer(tmp_path, pair, teacher_offload=offload, compile=True)
    for teacher in (None, self_teacher(SimpleNamespace(disable_adapter=nullcontext))):
        assert compile_of(ModelPair(pair.student, teacher), asked, in_parts=False) is True


def test_offloaded_weights_are_not_copied_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine moving to a device copies nothing; here it does, as to a GPU and back."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *given, **named: to(tensor, *given, **named).clone())
    teacher = tiny_model("gpt2")
    expected = {name: each.clone() for name, each in teacher.state_dict().items()}
    place = TeacherPlace(teacher, "cpu", torch.device("cpu"), tmp_path)
    # Kept, so that no later copy gets the same memory.
    away = {name: parameter.data for name, parameter in place._moved.items()}
    for _ in range(2):
        with place.loaded():
            assert all(each.data.data_ptr() != away[name].data_ptr() for name, each in place._moved.items())
            assert_same_weights(teacher.state_dict(), expected)
        assert all(each.data.data_ptr() == away[name].data_ptr() for name, each in place._moved.items())


def test_a_teacher_with_a_device_map_keeps_its_place(tmp_path: Path) -> None:
    """The student's device is one that it must not be moved to."""
    teacher: Any = tiny_model("llama")
    teacher.hf_device_map = {"": "cpu"}
    TeacherPlace(teacher, "none", torch.device("meta"), tmp_path)
    assert {each.device.type for each in teacher.parameters()} == {"cpu"}
    teacher.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UserError, match="a teacher on several devices stay where they were loaded"):
        TeacherPlace(teacher, "cpu", torch.device("meta"), tmp_path)


def test_the_chunks_of_the_loss_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head.of(tiny_model("llama", vocab=64))
    hidden_NH = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []

    def square(logits_PV: Tensor, at: slice, chunk: slice) -> Tensor:
        seen.append((at.stop - at.start, chunk.stop - chunk.start))
        return logits_PV.square().sum(dim=-1)

    expected = chunked_sum(hidden_NH, head, square)
    # A CPU's chunk holds more than 100 positions of 64 ids.
    assert seen == [(100, 100)]
    seen.clear()
    monkeypatch.setattr("switchkd.loss.chunked.numbers_at_once", lambda device: 40 * 64)
    # Sums of 100 positions in another order.
    torch.testing.assert_close(chunked_sum(hidden_NH, head, square), expected, rtol=1e-6, atol=0)
    assert [chunk for _, chunk in seen] == [40] * 8 + [40] * 8 + [20] * 4
    assert {piece for piece, _ in seen} == {5}


def test_an_example_without_a_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an example has no prompt"):
        make_trainer(tmp_path, tiny_pair("llama", layers=1), [Example(Prompt((), 0), (3, 4))], method="sft")
