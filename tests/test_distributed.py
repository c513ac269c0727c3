"""One process equals two and four: neither data parallelism nor FSDP2 changes what is rolled out or the gradient.

Nearly all compute in float64: AdamW's first steps divide a gradient by its own size, and so make 1e-4 of the rounding in float32 of
a gradient near 0.
"""

from __future__ import annotations

import copy
import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from processes import run_group, run_script
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.rollout.policies import Switch
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.callbacks import StopCleanly
from switchkd.training.checkpoints import last_complete_checkpoint
from switchkd.training.trainer import SwitchTrainer
from switchkd.training.whole_student import WholeStudent
from tiny import tiny_pair
from trainers import TIMINGS, make_examples

METHODS: dict[str, dict[str, Any]] = {
    "switch": {"method": "switch", "threshold": 0.3},
    "gkd": {"method": "gkd", "student_share": 0.5},
    "auto": {"method": "switch", "threshold": {"name": "auto", "prompts": 12, "every": 2}},
    # Full after the first step: half of the second's sequences are replayed, from what either process wrote.
    "replay": {"method": "switch", "threshold": 0.3, "replay_capacity": 8},
    "distillm2": {"method": "distillm2"},
    # The third step, the epoch's last, is written by itself.
    "steps": {"method": "switch", "threshold": 0.3, "rollout_steps": 2},
    "seqkd": {"method": "seqkd"},
}
# An adapter that is all that trains, and a teacher that is its student without it.
ADAPTED: dict[str, dict[str, Any]] = {
    "lora": {"method": "switch", "threshold": 0.3, "adapted": True},
    "self": {"method": "switch", "threshold": 0.01, "adapted": True, "teacher_model": "self"},
}
# In float32, as most runs are. SGD's step is the gradient's size, AdamW's nearly the same for every weight.
FLOAT32: dict[str, dict[str, Any]] = {
    "sgd": {"method": "switch", "threshold": 0.3, "optim": "sgd", "learning_rate": 0.05},
    "adamw": {"method": "switch", "threshold": 0.3},
}
# These have no rollouts, and so nothing but the loss reads the student.
OF_PARTS: dict[str, dict[str, Any]] = {"sft": {"method": "sft"}, "kd": {"method": "kd"}}
IN_PARTS = ("switch", "gkd")
# In steps of 8 the third has 6 rows: 4 and 2 of them for two processes. Of 17 it has one, and the other process none.
ROWS = dict.fromkeys(METHODS, 22) | {"gkd": 17}
EVAL_ROWS = 9
PROCESSES = 2


def make_pair(family: str = "llama", dtype: torch.dtype = torch.float64) -> ModelPair:
    pair = tiny_pair(family, layers=2, dtype=dtype)
    # Several ids end a text, so that the processes hold different counts of tokens.
    pair.student.generation_config.eos_token_id = list(range(1, 12))
    return pair


def make_trainer(pair: ModelPair, folder: Path, rows: int, rows_a_process: int, **options: Any) -> SwitchTrainer:
    adapter = {"peft_config": adapter_config()} if options.pop("adapted", False) else {}
    teacher = options.pop("teacher_model", pair.teacher)
    args = SwitchConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows_a_process,
        per_device_eval_batch_size=4,
        **{
            "max_new_tokens": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    student = copy.deepcopy(pair.student)
    return SwitchTrainer(student, teacher, args, make_examples(rows), make_examples(EVAL_ROWS, seed=1), **adapter)


def adapter_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def train_each_method(
    folder: Path,
    rows_a_process: int,
    methods: dict[str, dict[str, Any]],
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> None:
    """Three steps and an evaluation with each method; leaves every run's weights and log in a folder of its own."""
    for name, method in methods.items():
        trainer = make_trainer(
            make_pair(dtype=dtype), folder / name, ROWS.get(name, 22), rows_a_process, **method, **options
        )
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        if trainer.is_world_process_zero():
            (folder / name / "log.json").write_text(json.dumps(trainer.state.log_history))
            replay = trainer._text.replay
            kept = [] if replay is None else [(r.prompt.sample_id, r.prompt.prompt_id) for r in replay.rollouts]
            (folder / name / "replay.json").write_text(json.dumps(kept))


def with_peft() -> dict[str, dict[str, Any]]:
    return ADAPTED if find_spec("peft") else {}


def save_half_way(folder: Path, rows_a_process: int, **options: Any) -> None:
    """Four steps with a checkpoint after two; the weights at the end are in the folder itself."""
    halves = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(make_pair(), folder, 22, rows_a_process, **METHODS["switch"], **halves, **options)
    trainer.train()
    trainer.save_model()


def resume(checkpoint: Path, folder: Path, rows_a_process: int, **options: Any) -> None:
    """The steps after a checkpoint; the weights at the end are in the folder."""
    trainer = make_trainer(make_pair(), folder, 22, rows_a_process, **METHODS["switch"], max_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    for state in trainer.optimizer.state.values():
        parts = [value.to_local() for value in state.values() if isinstance(value, DTensor)]
        # Nothing of what the other process has.
        assert [part.untyped_storage().nbytes() for part in parts] == [part.nbytes for part in parts]
    trainer.save_model()


class Terminated(TrainerCallback):
    """SIGTERM to this process alone, in its second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)


class Broken:
    """An engine of a process that cannot write."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk of this process is gone")


def meet_trouble(folder: Path, rank: int) -> None:
    """What befalls the second process alone: a signal in training, and a failure in writing the teacher's text."""
    folder.mkdir(exist_ok=True)
    pair = make_pair()
    trainer = make_trainer(pair, folder / "stopped", 24, 4, method="sft", max_steps=6)
    stopper = StopCleanly(Console(stderr=True))
    trainer.add_callback(stopper)
    if rank == 1:
        trainer.add_callback(Terminated())
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert stopper.stopped
    assert signal.getsignal(signal.SIGTERM) is before
    (folder / f"stopped-{rank}").write_text(str(trainer.state.global_step))

    taken_apart = make_pair()
    for layer in taken_apart.teacher.get_decoder().layers:
        fully_shard(layer)
    try:
        make_trainer(taken_apart, folder / "apart", 8, 4, method="kd")
    except UserError as error:
        (folder / f"apart-{rank}").write_text(str(error))

    writer = make_trainer(pair, folder / "broken", 8, 4, method="seqkd")
    if rank == 1:
        writer.engine = Broken()
    try:
        writer.train()
    except (UserError, OSError) as error:
        (folder / f"broken-{rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders "one", "two", "four", "two-parts" and "four-parts". Costs one start of Python with torch and transformers."""
    folder = tmp_path_factory.mktemp("runs")
    train_each_method(folder / "one", 8, METHODS | OF_PARTS | with_peft())
    train_each_method(folder / "one", 8, FLOAT32, torch.float32)
    save_half_way(folder / "half-one", 8)
    run_script(__file__, folder)
    return folder


def same_runs(folder: Path, ours: str, theirs: str, method: str) -> None:
    """Two runs wrote the same text, logged the same numbers and ended in the same weights."""
    one, other = (json.loads((folder / run / method / "log.json").read_text()) for run in (ours, theirs))
    # Three steps, the end and the evaluation; and the threshold before steps 0 and 2.
    assert len(one) == len(other) == (7 if method == "auto" else 5)
    for our_line, their_line in zip(one, other, strict=True):
        assert our_line.keys() == their_line.keys()
        # Tokens, so exact: the same text was written by the same model.
        for key in ("teacher_share", "response_tokens", "ended"):
            assert our_line.get(key) == their_line.get(key)
        for key in our_line:
            # transformers adds losses up in float32. The operations are counted by process, and each process calibrates.
            if not any(skipped in key for skipped in (*TIMINGS, "flos", "_forwards", "generated_tokens")):
                assert our_line[key] == pytest.approx(their_line[key], rel=1e-6), key
    same_weights(folder / ours / method, folder / theirs / method)


def weights_of(run: Path) -> dict[str, Tensor]:
    """Those of the student, or of the adapter that it trained."""
    (file,) = run.glob("*model.safetensors")
    return load_file(file)


def same_weights(ours: Path, theirs: Path) -> None:
    first, second = weights_of(ours), weights_of(theirs)
    assert first.keys() == second.keys()
    for name in first:
        # Float64 sums over eight rows or over two times four. A step moves a weight by up to the learning rate, 1e-3.
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_the_same_model_as_one(method: str, runs: Path) -> None:
    same_runs(runs, "one", "two", method)


@pytest.mark.parametrize("method", [*IN_PARTS, *OF_PARTS])
def test_a_student_in_parts_on_two_processes_is_trained_as_a_whole_one(method: str, runs: Path) -> None:
    same_runs(runs, "one", "two-parts", method)


@pytest.mark.parametrize("method", ADAPTED)
def test_an_adapter_in_parts_on_two_processes_is_trained_as_a_whole_one(method: str, runs: Path) -> None:
    pytest.importorskip("peft")
    same_runs(runs, "one", "two-parts", method)
    assert {name.split(".")[-2] for name in weights_of(runs / "one" / method)} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("run", ["two", "two-parts", "four"])
def test_in_float32_sgd_ends_in_weights_within_1e_5(run: str, runs: Path) -> None:
    ours, theirs = weights_of(runs / "one" / "sgd"), weights_of(runs / run / "sgd")
    for name, weight in ours.items():
        assert weight.dtype == torch.float32
        # Sums of gradients in another order; three steps move weights by up to 0.1.
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


def test_in_float32_adamw_moves_few_weights_otherwise(runs: Path) -> None:
    """Where a gradient is near 0 its rounding can decide a step's size, at most the learning rate. Measured: none beyond 4e-7."""
    ours, theirs = weights_of(runs / "one" / "adamw"), weights_of(runs / "two" / "adamw")
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    # Steps of 1e-3, 6.7e-4 and 3.3e-4, in one direction here and in the other there.
    assert float(apart.max()) <= 4e-3
    assert float((apart > 1e-5).float().mean()) <= 0.01


@pytest.mark.parametrize("run", ["four", "four-parts"])
def test_four_processes_train_the_same_model_as_one(run: str, runs: Path) -> None:
    # With the whole student each of four has two rows; the step of one row leaves three without any.
    same_runs(runs, "one", run, "gkd")


@pytest.mark.parametrize("method", ["switch", "seqkd"])
def test_a_teacher_shared_by_two_processes_says_what_a_whole_one_says(method: str, runs: Path) -> None:
    same_runs(runs, "one", "two-shared", method)


@pytest.mark.parametrize("begun", ["half-one", "half-parts"])
def test_a_run_goes_on_with_any_number_of_processes(begun: str, runs: Path, tmp_path: Path) -> None:
    """Begun by one, or by two with parts: the other half by one, and by two with parts, ends in the same weights."""
    resume(runs / begun / "checkpoint-2", tmp_path, 8)
    same_weights(tmp_path, runs / "half-one")
    same_weights(runs / f"{begun}-resumed", runs / "half-one")


def test_a_gathered_student_writes_the_tokens_of_a_whole_one_under_autocast() -> None:
    made = tiny_pair("llama")
    pair = ModelPair(made.student, made.teacher, autocast_dtype=torch.bfloat16)
    reader = WholeStudent(pair, sharded=True)
    prompts = [example.prompt for example in make_examples(6)]
    with reader.gathered():
        texts = [
            SpeculativeEngine(each, 3).generate(prompts, Switch(0.1), Sampling(12)) for each in (pair, reader.pair)
        ]
        # All but embedding and norms, which autocast does not lower.
        assert {each.dtype for each in reader.pair.student.parameters()} == {torch.bfloat16, torch.float32}
    assert [text.token_ids for text in texts[0]] == [text.token_ids for text in texts[1]]
    assert not sum(each.numel() for each in reader.pair.student.parameters())
    assert sum(each.numel() for each in pair.student.parameters())


def test_rows_that_fill_up_a_step_are_kept_once(runs: Path) -> None:
    one, two = (json.loads((runs / run / "replay" / "replay.json").read_text()) for run in ("one", "two"))
    assert one == two
    assert len({tuple(address) for address in one}) == len(one) == 8


def test_the_teacher_writes_the_same_file_in_two_processes(runs: Path) -> None:
    one, two = (runs / name / "seqkd" for name in ("one", "two"))
    assert (one / "teacher_text.jsonl").read_bytes() == (two / "teacher_text.jsonl").read_bytes()
    ours, theirs = (json.loads((each / "teacher_text.manifest.json").read_text()) for each in (one, two))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs: Path) -> None:
    assert [(runs / "two" / f"stopped-{rank}").read_text() for rank in range(PROCESSES)] == ["2", "2"]
    assert last_complete_checkpoint(runs / "two" / "stopped") == runs / "two" / "stopped" / "checkpoint-2"


def test_a_process_that_cannot_write_the_teachers_text_tells_the_others(runs: Path) -> None:
    said = [(runs / "two" / f"broken-{rank}").read_text() for rank in range(PROCESSES)]
    assert said[0].startswith("UserError: process 1 could not write the teacher's text (OSError: the disk")
    assert said[1] == "OSError: the disk of this process is gone"


def test_a_teacher_that_is_in_parts_already_is_refused(runs: Path) -> None:
    assert "give it whole, with teacher_offload: shared" in (runs / "two" / "apart-0").read_text()


def test_of_a_shared_teacher_one_layer_is_whole_at_a_time(runs: Path) -> None:
    whole = [(runs / "two-shared" / f"whole-{rank}").read_text().split() for rank in range(PROCESSES)]
    # Of its two layers, whenever one of them runs; and afterwards none.
    assert [{*each} for each in whole] == [{"1"}, {"1"}]
    assert [(runs / "two-shared" / f"rests-{rank}").read_text() for rank in range(PROCESSES)] == ["0", "0"]


def share_a_teacher(folder: Path, rank: int) -> None:
    """Three steps; how many layers of the teacher are whole in this process whenever one of them runs, and afterwards."""
    pair = make_pair()
    trainer = make_trainer(pair, folder / "watched", 22, 4, **METHODS["switch"], teacher_offload="shared")
    layers = pair.teacher.get_decoder().layers
    seen: list[str] = []

    def whole_layers() -> str:
        return str(sum(not any(isinstance(each, DTensor) for each in layer.parameters()) for layer in layers))

    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(whole_layers()))
    trainer.train()
    (folder / f"whole-{rank}").write_text(" ".join(seen))
    (folder / f"rests-{rank}").write_text(whole_layers())


def be_two(folder: Path, rank: int) -> None:
    train_each_method(folder / "two", 4, METHODS)
    train_each_method(folder / "two", 4, FLOAT32, torch.float32)
    meet_trouble(folder / "two", rank)
    shared = {"teacher_offload": "shared"}
    train_each_method(folder / "two-shared", 4, {name: METHODS[name] | shared for name in ("switch", "seqkd")})
    share_a_teacher(folder / "two-shared", rank)
    # From here on accelerate's environment asks for FSDP.
    train_each_method(folder / "two-parts", 4, {name: METHODS[name] for name in IN_PARTS} | with_peft(), fsdp=True)
    train_each_method(folder / "two-parts", 4, {"sgd": FLOAT32["sgd"]}, torch.float32, fsdp=True)
    train_each_method(folder / "two-parts", 2, OF_PARTS, fsdp=True, gradient_accumulation_steps=2)
    save_half_way(folder / "half-parts", 4, fsdp=True)
    for begun in ("half-one", "half-parts"):
        resume(folder / begun / "checkpoint-2", folder / f"{begun}-resumed", 4, fsdp=True)


def be_four(folder: Path) -> None:
    methods = {"gkd": METHODS["gkd"]}
    train_each_method(folder / "four", 2, methods)
    train_each_method(folder / "four", 2, {"sgd": FLOAT32["sgd"]}, torch.float32)
    train_each_method(folder / "four-parts", 2, methods, fsdp=True)


if __name__ == "__main__":
    runs_folder = Path(sys.argv[1])
    run_group(runs_folder / "two", 2, lambda rank: be_two(runs_folder, rank))
    run_group(runs_folder / "four", 4, lambda rank: be_four(runs_folder))
