"""Is the memory that `switchkd plan` computes the memory that a run takes? Trains for real, on CPUs, and counts tensors.

`python scripts/plan_check.py` trains a small pair in 1, 2 and 4 processes, with DDP and with FSDP2, and prints for each what the
formula of scale/memory.py says of a process, what was counted, and how far they are apart; and beside it by how much the resident
memory of the process rose at most (Linux). About two minutes on one core.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt
from switchkd.rollout.blends import Mix
from switchkd.scale.memory import CPU_FLOAT32, Load, Split, backward, lasting, needed, rolling_out, with_loss
from switchkd.scale.sizes import ModelSize
from switchkd.training.trainer import SwitchTrainer

PROMPT, RESPONSE, VOCABULARY = 32, 32, 4096
BLOCK = 4
STUDENT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}


def make_pair() -> ModelPair:
    """A pair with random weights whose texts never end, so that every one has all of its tokens."""
    models = []
    for seed, sizes in enumerate((STUDENT, TEACHER)):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            tie_word_embeddings=seed == 0,
            eos_token_id=None,
            bos_token_id=None,
            **sizes,
        )
        models.append(Qwen2ForCausalLM(config))
    return ModelPair(*models)


class Counting(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive inside, and keeps the most that there were in each phase of a step."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.phase = "rollout"
        self.most = {"rollout": 0, "training": 0}
        self.now = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resize = torch.UntypedStorage.resize_
        for model in models:
            self._see([*model.parameters(), *model.buffers()])

    def __enter__(self) -> Any:
        # FSDP empties storages that it keeps, and fills them again.
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see(tree_leaves(result))
        return result

    def _see(self, found: Sequence[Any]) -> None:
        for each in found:
            if isinstance(each, Tensor) and each.device.type == "cpu":
                self._note((each.to_local() if isinstance(each, DTensor) else each).untyped_storage())

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        self._resize(storage, size)
        self._note(storage)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key))
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.most[self.phase] = max(self.most[self.phase], self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._alive[key]


class Phases(TrainerCallback):
    """Tells the counting when training begins: rollouts come before a step does."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The step's texts are there."""
        self.counting.phase = "training"

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The next step's texts come."""
        self.counting.phase = "rollout"


def resident(name: str) -> int:
    """The bytes of this process that are in the machine's memory: "VmRSS" now, "VmHWM" at most since `forget_the_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_the_peak() -> int:
    """Return the allocator's spare memory to the system and reset the peak. Returns the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure_resident(folder: Path, spread: str, processes: int, rows: int) -> dict[str, float]:
    """What `measure` returns without counting tensors, and the peak rise of resident memory in bytes."""
    # What a first training brings in is no part of a run's tensors: libraries, compiled kernels, buffers of the process group.
    measure(folder, spread, processes, 1, counting=nullcontext())
    before = forget_the_peak()
    found = measure(folder, spread, processes, rows, counting=nullcontext())
    return {**found, "resident": resident("VmHWM") - before}


def measure(
    folder: Path, spread: str, processes: int, rows: int, checkpointing: bool = False, counting: Any = None
) -> dict[str, float]:
    """Train two steps of `rows` texts a process; the most bytes counted in each phase, and what the formula says of it."""
    pair = make_pair()
    student, teacher = ModelSize.of(pair.student), ModelSize.of(pair.teacher)
    counting = counting or Counting(*pair.models.values())
    counted = isinstance(counting, Counting)
    trainer = SwitchTrainer(
        pair,
        args=SwitchConfig(
            output_dir=str(folder / f"{spread}-{processes}"),
            policy=Mix(0.5),
            block_size=BLOCK,
            max_new_tokens=RESPONSE,
            rollout_rows=rows,
            per_device_train_batch_size=rows,
            activation_checkpointing=checkpointing,
            # The optimizer's moments are there from the second step on.
            max_steps=2,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            # A measurement of entropies has tensors of its own, once in a while.
            measure_every=0,
            fsdp=True if spread == "fsdp2" else None,
        ),
        train_dataset=[
            Example(Prompt(tuple(range(2 + row, 2 + row + PROMPT)), row), ()) for row in range(2 * rows * processes)
        ],
        callbacks=[Phases(counting)] if counted else None,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with counting:
        trainer.train()
    load = Load(rows, PROMPT, RESPONSE, rows, rows, checkpointing, BLOCK)
    split = Split(spread, processes)  # type: ignore[arg-type]
    given = (load, split, CPU_FLOAT32)
    lasts = lasting(student, teacher, *given)
    return {
        **(counting.most if counted else {}),
        "rollout by formula": needed(lasts, rolling_out(student, teacher, *given)),
        "training by formula": needed(lasts, with_loss(student, *given), backward(student, *given)),
    }


def forked(folder: Path, spread: str, processes: int, rows: int) -> dict[str, float]:
    """What `measure` returns in the first process of a gloo group of that size."""
    result = folder / f"{spread}-{processes}.json"
    children = []
    for rank in range(processes):
        children.append(pid := os.fork())
        if pid == 0:
            if processes > 1:
                shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                place = f"file://{folder.resolve()}/meeting-{spread}-{processes}"
                dist.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
            found = measure_resident(folder, spread, processes, rows) | measure(folder, spread, processes, rows)
            if rank == 0:
                result.write_text(json.dumps(found))
            if processes > 1:
                dist.barrier()
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    found: dict[str, float] = json.loads(result.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8, help="texts of a process in a step")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.uname().machine}; MiB of a process, by formula / counted")
    with tempfile.TemporaryDirectory() as name:
        for spread, processes in (("ddp", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)):
            found = forked(Path(name), spread, processes, given.rows)
            line = f"{spread:<6} {processes} processes"
            for phase in ("rollout", "training"):
                formula, counted = found[f"{phase} by formula"], found[phase]
                line += f"   {phase} {formula / 2**20:6.1f} / {counted / 2**20:6.1f} ({formula / counted - 1:+.1%})"
            largest, rose = max(found["rollout by formula"], found["training by formula"]), found["resident"]
            line += f"   resident {largest / 2**20:6.1f} / {rose / 2**20:6.1f} ({largest / rose - 1:+.1%})"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
