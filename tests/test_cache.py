"""The ragged cache: after any reading, overwriting and moving, a model's states are those without a cache."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from switchkd.models.heads import Head, backbone, cache_argument
from switchkd.records import Prompt, Sampling
from switchkd.rollout.cache import CachedModel, cache_mismatch, why_not_ragged
from switchkd.rollout.law import Teacher
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import VOCABULARY, tiny_model, tiny_pair

# Learned and rotary positions, and windows of 6 in all layers or in every second one.
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {},
    "llama": {},
    "llama eager": {"attn_implementation": "eager"},
    "mistral": {"sliding_window": 6},
    "mistral eager": {"sliding_window": 6, "attn_implementation": "eager"},
    "gemma2 eager": {"sliding_window": 6, "attn_implementation": "eager"},
    "gemma3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
SLOTS, LONGEST = 40, 5


@cache
def model_of(kind: str) -> PreTrainedModel:
    return tiny_model(kind.split()[0], dtype=torch.float64, **KINDS[kind])


def cached(kind: str, rows: int = 3, slots: int = SLOTS) -> CachedModel:
    model = model_of(kind)
    return CachedModel(model, Head.of(model), rows, slots)


class _Since524(torch.nn.Module):
    """Takes its cache as models do from transformers 5.24 on."""

    def __init__(self, *layer_types: str) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=len(layer_types))
        self.config.layer_types = [*layer_types]

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor: ...


class _XLM(torch.nn.Module):
    def forward(self, input_ids: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor: ...


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (_Since524("full_attention"), "cache"),
        (_Since524("linear_attention", "full_attention"), "cache"),
        # As Mamba has them.
        (_Since524("linear_attention"), ""),
        (_XLM(), ""),
    ],
)
def test_what_a_model_calls_its_cache(model: torch.nn.Module, name: str) -> None:
    assert cache_argument(model) == name


@pytest.mark.parametrize(
    ("engine", "renamed"),
    [(ReferenceEngine, LlamaForCausalLM), (SpeculativeEngine, LlamaModel)],
    ids=["reference", "fast"],
)
def test_the_engines_hand_the_cache_over_under_its_name(
    engine: type[ReferenceEngine | SpeculativeEngine], renamed: type[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, prompts = tiny_pair("llama", dtype=torch.float64), [[5], [9, 8, 7]]
    expected = engine(pair).generate(prompts, Teacher(), Sampling(6))
    name, forward = cache_argument(pair.student), renamed.forward

    def since_524(model: PreTrainedModel, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        assert name == "cache" or kwargs.pop(name, None) is None
        return forward(model, *args, **{name: cache}, **kwargs)

    monkeypatch.setattr(renamed, "forward", since_524)
    rollouts = engine(pair).generate(prompts, Teacher(), Sampling(6))
    assert [each.token_ids for each in rollouts] == [each.token_ids for each in expected]


def fresh(reader: CachedModel, ids: list[int]) -> Tensor:
    """Hidden states (T, H) of a text, without a cache."""
    with torch.no_grad():
        hidden: Tensor = reader.backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return hidden


def read(reader: CachedModel, ids: list[list[int]], lengths: list[int]) -> Tensor:
    with torch.no_grad():
        return reader.read(torch.tensor(ids), torch.tensor(lengths), max(lengths) + len(ids[0]))


def assert_close(hidden: Tensor, expected: Tensor) -> None:
    # float64 roundings; transformers' eager attention takes its softmax in float32.
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(KINDS)), st.data())
def test_any_order_of_reading_taking_back_and_moving(kind: str, data: st.DataObject) -> None:
    reader, token = cached(kind), st.integers(0, VOCABULARY - 1)
    texts: list[list[int]] = [[], []]  # what each row in use holds
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        new = data.draw(st.integers(1, LONGEST), label="new tokens")
        block = [data.draw(st.lists(token, min_size=new, max_size=new), label="ids") for _ in texts]
        hidden = read(reader, block, [len(text) for text in texts])
        for row, text in enumerate(texts):
            assert_close(hidden[row], fresh(reader, text + block[row])[len(text) :])
            text += block[row][: data.draw(st.integers(0, new), label="kept")]
        move = data.draw(st.sampled_from(["none", "copy", "drop", "add"]), label="move")
        if move == "copy":
            length = data.draw(st.integers(0, len(texts[-1])), label="copied")
            reader.cache.copy_prefixes(reader.cache, [(len(texts) - 1, 0)], length)
            texts[0] = texts[-1][:length]
        elif move == "drop" and len(texts) > 1:
            texts.pop()
        elif move == "add" and len(texts) < reader.cache.shared.rows:
            texts.append([])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_read_elsewhere_is_continued(kind: str) -> None:
    texts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22]]
    prefill, reader = cached(kind, rows=2, slots=10), cached(kind)
    read(prefill, [texts[0], texts[1] + [0] * 7], [0, 0])  # the shorter one padded
    # Row 0 and 2 continue the long text, row 1 the short one; the target has never been read before.
    reader.cache.copy_prefixes(prefill.cache, [(0, 0), (1, 1), (0, 2)], max(map(len, texts)))
    hidden = read(reader, [[1, 2], [3, 4], [5, 6]], [10, 3, 10])
    for row, (text, more) in enumerate([(texts[0], [1, 2]), (texts[1], [3, 4]), (texts[0], [5, 6])]):
        assert_close(hidden[row], fresh(reader, text + more)[-2:])


def test_memory_is_that_of_the_given_rows_and_slots() -> None:
    reader = cached("llama", rows=3, slots=12)
    read(reader, [[5, 6, 7]], [0])
    read(reader, [[5, 6], [7, 8], [9, 10]], [3, 0, 0])
    config = model_of("llama").config
    expected = (3, config.num_key_value_heads, 12, config.hidden_size // config.num_attention_heads)
    assert len(reader.cache.layers) == config.num_hidden_layers
    for layer in reader.cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.keys.shape == layer.values.shape == expected


def test_keys_and_values_are_freed_with_their_engine_and_those_of_a_prefill_at_once() -> None:
    """By reference counting: on a GPU nothing triggers the collector of cycles before memory runs out."""
    pair = tiny_pair("llama")
    engine, seen = SpeculativeEngine(pair, 4, max_rows=2), set()

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for layer in kwargs[cache_argument(module)].layers:
            seen.update((weakref.ref(layer.keys), weakref.ref(layer.values)))

    hooks = [backbone(model).register_forward_hook(note, with_kwargs=True) for model in (pair.student, pair.teacher)]
    gc.disable()
    try:
        # The second begins with more of its response, so it ends first, and the third is read while the first is in flight.
        engine.generate([[5, 6, 7], Prompt((8, 9, 10, 11, 12), 1, begun=4), [13, 14]], Teacher(), Sampling(9))
        kept = [tensor for tensor in seen if tensor() is not None]
        del engine
        alive = [tensor for tensor in seen if tensor() is not None]
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()
    assert len(seen) == 2 * 2 * 2 * 2  # a prefill and a cache of two models, keys and values of two layers
    assert len(kept) == len(seen) / 2  # the next call writes into the caches again; the prefills are gone
    assert not alive


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_drafts_past_the_last_known_position_change_nothing_before_it(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64, max_position_embeddings=8)
    reader = CachedModel(model, Head.of(model), rows=2, slots=16)
    hidden = read(reader, [[5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6]], [0, 0])
    hidden = read(reader, [[11, 12, 13, 14], [7, 8, 9, 10]], [6, 2])
    assert_close(hidden[0, :2], fresh(reader, [5, 6, 7, 8, 9, 10, 11, 12])[-2:])
    assert_close(hidden[1], fresh(reader, [1, 2, 7, 8, 9, 10])[-4:])


@pytest.mark.parametrize("kind", KINDS)
def test_plain_attention_models_can_be_ragged(kind: str) -> None:
    assert why_not_ragged(model_of(kind)) is None
    assert cache_mismatch(cached(kind)) is None


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda _, slot_AT, width: torch.ones(*slot_AT.shape, width, dtype=torch.bool)[:, None], "cache differ from"),
        (lambda *_: {}["full_attention"], "does not take our cache and mask .KeyError"),
    ],
)
def test_a_model_that_takes_the_mask_wrongly_is_found(
    mask: Callable[..., Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedModel, "_mask", mask)
    found = cache_mismatch(cached("llama"))
    assert found is not None
    assert re.search(reason, found)


def test_models_that_cannot_take_a_token_back_say_why() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    assert why_not_ragged(mamba) == "it keeps a recurrent state, which cannot take a token back"
    chunked = tiny_model("llama")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert why_not_ragged(chunked) == "it has layers of kind chunked_attention"
    flexible = tiny_model("llama")
    flexible.config._attn_implementation = "flex_attention"
    reason = why_not_ragged(flexible)
    assert reason is not None
    assert "'flex_attention'" in reason
