"""Two minutes on a GPU: are the two engines equal, where does the memory go, and how many tokens a second are there?

`make gpu-check`, or `python scripts/gpu_check.py`. It has NOT YET BEEN RUN ON A GPU by us; `--device cpu` runs the same code on
a CPU, as the tests do. Please send us what it prints. Exit code 2 says that there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from switchkd.data.examples import to_examples
from switchkd.data.sets import resolve
from switchkd.errors import UserError
from switchkd.methods.config import SwitchConfig
from switchkd.models.load import load_pair
from switchkd.models.pair import ModelPair, parameter_count
from switchkd.models.placement import Placement, placement_of
from switchkd.records import Example, Prompt, Rollout, Sampling
from switchkd.rollout.blends import Mix
from switchkd.rollout.engine import Engine
from switchkd.rollout.policies import Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.scale.memory import Bytes, Load, Split, backward, lasting
from switchkd.scale.sizes import ModelSize
from switchkd.training.trainer import SwitchTrainer

MIB = 2**20
# A student of 0.5B and a teacher of 1.5B, as Qwen2.5 builds them, and what stands in for them where only the code is tried.
SIZES = {
    "large": (
        {"hidden_size": 896, "layers": 24, "heads": 14},
        {"hidden_size": 1536, "layers": 28, "heads": 12},
        151_936,
    ),
    "tiny": ({"hidden_size": 32, "layers": 2, "heads": 4}, {"hidden_size": 64, "layers": 2, "heads": 4}, 256),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts and print what they find; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, or cpu to try the script itself")
    parser.add_argument("--size", choices=SIZES, default="large", help="of the random pair that is timed")
    parser.add_argument("--rows", type=int, default=32, help="texts rolled out at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a text")
    given = parser.parse_args(arguments)
    try:
        exact = placement_of(device=given.device, precision="float32")
    except UserError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    if given.device == "auto" and exact.device.type == "cpu":
        print("gpu-check: torch finds no GPU here; --device cpu tries the script itself", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{_device_name(exact.device)}; torch {torch.__version__}, transformers {transformers.__version__}")
    lowered = placement_of(device=given.device, precision="auto" if exact.device.type == "cuda" else "bf16")
    for place in (exact, lowered):
        compare_engines(place, rows=given.rows, tokens=given.tokens)
    measure(random_pair(lowered, given.size), lowered, rows=given.rows, tokens=given.tokens)
    return 0


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


# ------------------------------------------------------------------------------------------------------------ equality


def compare_engines(place: Placement, *, rows: int, tokens: int) -> int:
    """Print how many of the embedded pair's texts are the same by both engines, and return the number.

    In float32 all of them should be: a difference is a tie in the last bits, or a fault. In bf16 two kernels round
    differently, so that texts part; shares and divergences must still agree within their standard errors.
    """
    pair = load_pair("world:student", "world:teacher", placement=place)
    assert pair.tokenizer is not None
    chosen = resolve("world:test", limit=rows)
    loaded = to_examples(chosen, pair.tokenizer, max_prompt_tokens=288, max_response_tokens=tokens, need_response=False)
    prompts = [example.prompt for example in loaded.examples]
    texts = [_generate(engine, prompts, tokens) for engine in (ReferenceEngine(pair), SpeculativeEngine(pair))]
    same = sum(one.token_ids == other.token_ids for one, other in zip(*texts, strict=True))
    print(f"\nembedded pair {place.describe()}: {same}/{len(prompts)} texts are the same by both engines")
    for name, rollouts in zip(("reference", "speculative"), texts, strict=True):
        share = _mean([rollout.teacher_share for rollout in rollouts])
        divergence = _mean([statistics.fmean(rollout.divergence) for rollout in rollouts])
        print(f"  {name:<12} teacher share {share}, divergence {divergence} nats")
    return same


def _generate(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> list[Rollout]:
    return engine.generate(prompts, Switch(0.02, decay="constant"), Sampling(tokens), seed=1)


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


# --------------------------------------------------------------------------------------------------- memory and speed


def random_pair(place: Placement, size: str) -> ModelPair:
    """A pair with random weights: as large as real ones, and nothing to download."""
    student, teacher, vocabulary = SIZES[size]
    dtypes = (place.student_dtype, place.teacher_dtype)
    models = [
        _random(sizes, vocabulary, place.device, dtype) for sizes, dtype in zip((student, teacher), dtypes, strict=True)
    ]
    return ModelPair(models[0], models[1], autocast_dtype=place.autocast_dtype)


def _random(sizes: dict[str, int], vocabulary: int, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=sizes["hidden_size"],
        intermediate_size=4 * sizes["hidden_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    assert isinstance(dtype, torch.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def bytes_by_part(pair: ModelPair, *, rows: int, slots: int, tokens: int) -> dict[str, int]:
    """The formula of scale/memory.py for a pair that is there: what each part of a step holds, in bytes.

    `rows` texts are rolled out at a time, and are all of the step's. `slots` is the longest prompt + the tokens of a response + a
    block; `tokens` those of a response. Activations and the loss's pieces are left out.
    """
    student, teacher = ModelSize.of(pair.student), None if pair.teacher is None else ModelSize.of(pair.teacher)
    computing = pair.autocast_dtype or pair.student.dtype
    read = pair.student.dtype if pair.teacher is None else pair.teacher.dtype
    numbers = Bytes(pair.student.dtype.itemsize, read.itemsize, computing.itemsize)
    graphs = pair.student.device.type == "cuda"
    load = Load(rows, slots - tokens, tokens, rows, rows, block=0, graphs=graphs)
    return lasting(student, teacher, load, Split(), numbers) | {
        "gradients": backward(student, load, Split(), numbers)["gradients"]
    }


@contextmanager
def _measured(what: str, device: torch.device, tokens: int) -> Iterator[None]:
    """Print time, tokens a second and peak memory of what happens inside."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    yield
    if device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - started
    line = f"  {what:<32} {seconds:7.2f} s {tokens / seconds:9,.0f} tokens/s"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        line += f"   peak {peak / MIB:9,.0f} MiB, {(peak - before) / MIB:9,.0f} more than before"
    print(line)


def measure(pair: ModelPair, place: Placement, *, rows: int, tokens: int) -> None:
    """Print the memory of each part by the formula, then time, speed and peak of rollouts and of training steps."""
    sizes = [f"{parameter_count(model) / 1e6:,.0f}M" for model in pair.models.values()]
    print(f"\nrandom pair of {' and '.join(sizes)}, {place.describe()}, {rows} texts of {tokens} tokens")
    prompts = [Prompt(tuple(range(2 + row, 34 + row)), row) for row in range(rows)]
    for part, size in bytes_by_part(pair, rows=rows, slots=32 + tokens + 4, tokens=tokens).items():
        print(f"  {part:<32} {size / MIB:12,.1f} MiB by the formula")
    sampling = Sampling(tokens)
    for block_size in (1, 4, 8):
        engine = SpeculativeEngine(pair, block_size, max_rows=rows)
        # The first call of a size chooses kernels, and takes memory that later ones find there.
        engine.generate(prompts, Mix(0.5), Sampling(8), seed=0)
        with _measured(f"rollouts, blocks of {block_size}", place.device, rows * tokens):
            engine.generate(prompts, Mix(0.5), sampling, seed=0)
        print(f"    kept of drafted {engine.metrics.acceptance:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SwitchTrainer(
            pair,
            args=SwitchConfig(
                output_dir=folder,
                policy=Mix(0.5),
                precision="float32" if place.autocast_dtype is None else "bf16",
                use_cpu=place.device.type == "cpu",
                max_steps=3,
                max_new_tokens=tokens,
                per_device_train_batch_size=max(1, rows // 4),
                gradient_accumulation_steps=4,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[Example(prompt, ()) for prompt in prompts],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with _measured("3 training steps, blocks of 4", place.device, 3 * rows * tokens):
            trainer.train()


if __name__ == "__main__":
    sys.exit(main())
