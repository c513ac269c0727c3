"""Rollouts on machines that we do not have: no float64 on the device, low precision, little memory, flash attention."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import switchkd.rollout.cache
import switchkd.rollout.writer
from checks.rollouts import assert_same_rollouts, tie_margin
from machines.mps import NoFloat64
from switchkd.data.collate import collate
from switchkd.models.heads import Head, backbone, cache_argument, last_hidden
from switchkd.models.memory import numbers_at_once
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Prompt, Rollout, Sampling
from switchkd.rollout.cache import CachedModel, cache_mismatch
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.policies import POLICIES, AdaSwitch, Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import tiny_model, tiny_pair
from trainers import make_trainer

PROMPTS = [[5], [9, 8, 7], list(range(2, 30)), [40, 41, 42, 43, 44, 45, 46], [9, 8, 7]]
SAMPLING = Sampling(max_new_tokens=12)
LOW_SWITCH = Switch(threshold=0.15)
ENGINES = {"reference": ReferenceEngine, "speculative": lambda pair: SpeculativeEngine(pair, 4)}


# ------ no float64 on the device (Apple's MPS)


def test_the_stand_in_refuses_what_mps_refuses() -> None:
    device, on_device = torch.device("cpu"), torch.ones(3)
    with NoFloat64():
        total = on_device.cpu().double().cumsum(dim=0) + torch.ones(3, dtype=torch.float64)
        assert total.float().to(device).dtype == torch.float32
        for refused in (
            lambda: on_device.double(),
            lambda: torch.zeros(1, dtype=torch.float64, device=device),
            lambda: torch.full_like(on_device, 1.0, dtype=torch.float64),
            lambda: total.to(device),
        ):
            with pytest.raises(TypeError, match="no float64"):
                refused()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_need_no_float64_on_the_device(engine: str, policy: str, llama_pair: ModelPair) -> None:
    made: Any = ENGINES[engine](llama_pair)
    writer = AdaSwitch(factor=1.3, window=4) if policy == "adaswitch" else POLICIES[policy]()
    expected = made.generate(PROMPTS, writer, SAMPLING)
    with NoFloat64():
        assert _same(made.generate(PROMPTS, writer, SAMPLING), expected)


def _same(ours: list[Rollout], theirs: list[Rollout]) -> bool:
    # NaN is not equal to itself, but its text is.
    return repr(ours) == repr(theirs)


@pytest.mark.parametrize("method", ["switch", "minillm", "adaswitch"])
def test_a_training_step_needs_no_float64_on_the_device(method: str, tmp_path: Path, llama_pair: ModelPair) -> None:
    with NoFloat64():
        trainer = make_trainer(tmp_path, llama_pair, max_steps=1, method=method, use_cpu=True, logging_strategy="no")
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_batch_leaves_float64_on_the_host() -> None:
    rollout = SpeculativeEngine(tiny_pair("llama"), 4).generate([[5, 6]], LOW_SWITCH, SAMPLING)[0]
    batch = collate([rollout], 0).to("meta")
    assert batch.input_ids_BT.device.type == "meta"
    assert batch.student_logp_BT is not None
    assert batch.student_logp_BT.device.type == "cpu"


# ------ caches are kept from call to call, and go with their engine


@contextmanager
def keys_and_values_of(pair: ModelPair) -> Iterator[set[Any]]:
    """Weak references to all keys and values that the models' forwards see; without Python's collector of cycles."""
    seen: set[Any] = set()

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for layer in kwargs[cache_argument(module)].layers:
            seen.update((weakref.ref(layer.keys), weakref.ref(layer.values)))

    hooks = [backbone(model).register_forward_hook(note, with_kwargs=True) for model in pair.models.values()]
    gc.disable()
    try:
        yield seen
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def alive(seen: set[Any]) -> set[int]:
    return {reference().data_ptr() for reference in seen if reference() is not None}


def test_a_second_call_uses_the_same_memory_and_a_larger_one_replaces_it() -> None:
    pair = tiny_pair("llama")
    engine = SpeculativeEngine(pair, 4)
    with keys_and_values_of(pair) as seen:
        engine.generate(PROMPTS, Teacher(), SAMPLING)
        kept = alive(seen)
        assert len(kept) == 2 * 2 * 2  # two models, two layers, keys and values; the prefill's are gone
        engine.generate(PROMPTS[:2], Teacher(), Sampling(5))
        assert alive(seen) == kept
        engine.generate(PROMPTS[:2], Student(), SAMPLING)
        assert alive(seen) == kept
        engine.generate(PROMPTS, Teacher(), Sampling(30))
        assert len(alive(seen)) == 8
        shapes = {tuple(reference().shape) for reference in seen if reference() is not None}
        assert [shape[::2] for shape in shapes] == [(len(PROMPTS), 28 + 30 + 4)]
        del engine
        assert not alive(seen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_nothing_of_an_earlier_call_is_seen(family: str) -> None:
    pair = tiny_pair(family, dtype=torch.float64)
    engine = SpeculativeEngine(pair, 4)
    engine.generate([[7] * 40] * 6, Teacher(), SAMPLING, seed=1)
    for cache in engine.caches.values():
        for layer in cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys.fill_(1e3)
            layer.values.fill_(-1e3)
    assert_same_rollouts(
        engine.generate(PROMPTS, LOW_SWITCH, SAMPLING),
        SpeculativeEngine(pair, 4).generate(PROMPTS, LOW_SWITCH, SAMPLING),
        pair,
        LOW_SWITCH,
        SAMPLING,
    )


def test_a_model_that_changes_its_type_gets_other_caches_and_a_call_that_fails_leaves_none() -> None:
    pair = tiny_pair("llama")
    engine = SpeculativeEngine(pair, 4)
    with torch.inference_mode():  # its tensors cannot be written later
        engine.generate(PROMPTS, Teacher(), SAMPLING)
    engine.generate(PROMPTS, Teacher(), SAMPLING)
    for model in pair.models.values():
        model.to(torch.float64)
    expected = SpeculativeEngine(pair, 4).generate(PROMPTS, Teacher(), SAMPLING)
    assert _same(engine.generate(PROMPTS, Teacher(), SAMPLING), expected)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, Teacher(), SAMPLING, on_progress=lambda done: 1 // 0)
    assert not engine.caches


@pytest.mark.parametrize("policy", [Teacher(), LOW_SWITCH])
def test_a_long_prefill_goes_in_pieces(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    expected = SpeculativeEngine(pair, 4).generate(PROMPTS, policy, SAMPLING)
    monkeypatch.setattr(switchkd.rollout.cache, "_PREFILL_TOKENS", 16, raising=False)
    sizes: list[int] = []
    hook = backbone(pair.student).register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    engine = SpeculativeEngine(pair, 4)
    rollouts = engine.generate(PROMPTS, policy, SAMPLING)
    hook.remove()
    assert max(sizes) <= 16
    assert len(sizes) - 4 == engine.metrics.student_forwards  # the self-test reads four times
    assert_same_rollouts(rollouts, expected, pair, policy, SAMPLING)


# ------ low precision


FAMILIES = ("llama", "gpt2", "opt", "mistral", "gemma3")


class _Products(TorchFunctionMode):
    """A linear layer as another kernel computes it: `of` gets the weight and the result."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.of(args[1], result) if func is nn.functional.linear else result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_caches_self_test_can_fail_in_bfloat16(
    family: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, dtype=torch.float32 if autocast else torch.bfloat16)
    head = Head.of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # A right model on a machine whose kernels round by shape: one rounding of bfloat16 in each product.
        with _Products(lambda weight, result: result * (1 + 2**-8 * (result.shape[-2] % 2))):
            assert cache_mismatch(CachedModel(model, head, 2, 8)) is None
        monkeypatch.setattr(
            CachedModel,
            "_mask",
            lambda self, slot_AT, width: self._in_form(torch.ones(*slot_AT.shape, width, dtype=torch.bool)[:, None]),
        )
        wrong = "its states through our cache differ from those without a cache"
        assert cache_mismatch(CachedModel(model, head, 2, 8)) == wrong


def test_a_head_is_not_refused_for_its_kernel() -> None:
    """TF32 keeps 10 bits, and a cut weight may get another kernel than the whole."""
    model = tiny_model("gemma2")

    def in_tf32(weight: Tensor, result: Tensor) -> Tensor:
        return result * (1 + 2**-11 * torch.sign(result)) if len(weight) == 50 else result

    with _Products(in_tf32):
        assert Head.of(model, 50).vocabulary_size == 50


@pytest.mark.parametrize("policy", [Student(), Teacher(), LOW_SWITCH])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_engines_compute_in_the_pairs_precision(family: str, policy: Policy) -> None:
    made = tiny_pair(family)
    pair = ModelPair(made.student, made.teacher, autocast_dtype=torch.bfloat16)
    types: set[torch.dtype] = set()
    hooks = [
        model.get_output_embeddings().register_forward_hook(lambda *call: types.add(call[-1].dtype))
        for model in pair.models.values()
    ]
    expected = ReferenceEngine(pair).generate(PROMPTS, policy, SAMPLING)
    assert types == {torch.bfloat16}
    for hook in hooks:
        hook.remove()
    engine = SpeculativeEngine(pair, 4)
    rollouts = engine.generate(PROMPTS, policy, SAMPLING)
    assert {layer.keys.dtype for cache in engine.caches.values() for layer in cache.layers} == {torch.bfloat16}
    parted = 0
    for ours, theirs in zip(rollouts, expected, strict=True):
        decided = zip(
            ours.token_ids, theirs.token_ids, ours.written_by_teacher, theirs.written_by_teacher, strict=False
        )
        for at, (token, wanted, writer, wanted_writer) in enumerate(decided):
            if (token, writer) != (wanted, wanted_writer):
                with pair.computing():
                    margin = tie_margin(pair, theirs, at, policy, SAMPLING, 0)
                assert margin < 0.25
                parted += 1
                break
    assert parted < len(PROMPTS)


# ------ what is kept of the teacher, flash attention, compiled models, sizes


def test_kept_states_stay_on_their_device_unless_the_engine_is_told_otherwise() -> None:
    class Copies(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # What is recorded of a block is read back; states are the tensors of that width.
            name = getattr(func, "__name__", "")
            self.seen += name == "cpu" and args[0].shape[-1] == width
            return func(*args, **(kwargs or {}))

    pair = tiny_pair("llama")
    width = pair.teacher.config.hidden_size
    for engine in (SpeculativeEngine(pair, 4), ReferenceEngine(pair)):
        with Copies() as copies:
            engine.generate(PROMPTS, Teacher(), SAMPLING, keep_teacher="hidden")
        assert copies.seen == 0
    for elsewhere in (SpeculativeEngine(pair, 4, hidden_device="meta"), ReferenceEngine(pair, hidden_device="meta")):
        for rollout in elsewhere.generate(PROMPTS, Teacher(), SAMPLING, keep_teacher="hidden"):
            assert rollout.teacher_hidden is not None
            assert rollout.teacher_hidden.device.type == "meta"
            assert rollout.teacher_hidden.shape[0] == len(rollout.token_ids)


def test_kept_states_of_two_devices_are_collated_on_the_accelerator() -> None:
    examples = [Example(Prompt((5, 6), row), (7, 8), torch.zeros(2, 4)) for row in range(2)]
    examples[1] = Example(examples[1].prompt, (7, 8), torch.zeros(2, 4, device="meta"))
    hidden = collate(examples, 0).teacher_hidden
    assert hidden is not None
    (states,) = hidden.values()
    assert states.device.type == "meta"
    assert states.shape == (4, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_models_with_flash_attention_roll_out_with_sdpa(family: str) -> None:
    pair = tiny_pair(family, attn_implementation="sdpa")
    expected = SpeculativeEngine(pair, 4).generate(PROMPTS, LOW_SWITCH, SAMPLING)
    configs = [model.config for model in pair.models.values()]
    for config in configs:
        config._attn_implementation = "flash_attention_2"
    engine = SpeculativeEngine(pair, 4)  # a warning of the fallback would be an error
    assert _same(engine.generate(PROMPTS, LOW_SWITCH, SAMPLING), expected)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, LOW_SWITCH, SAMPLING, on_progress=lambda done: 1 // 0)
    assert [config._attn_implementation for config in configs] == ["flash_attention_2"] * 2


def test_a_compiled_student_is_compiled_once_and_trains_to_the_same_bit() -> None:
    model = tiny_model("llama").train()
    ids = torch.arange(24).reshape(2, 12) + 2
    plain = backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    graphs: list[Any] = []

    def count(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    found = []
    for _ in range(3):
        hidden = last_hidden(compiled, model, ids, torch.ones_like(ids))
        assert torch.equal(hidden, plain)
        assert hidden.requires_grad
        found.append(len(graphs))
    assert found[0] == found[1] == found[2] > 0
    # No tap keeps states, and a copy has its own.
    hooks = list(backbone(model)._forward_hooks.values())
    assert [(hook.is_open, hook.hidden_BTH) for hook in hooks] == [(False, None)]
    twin = copy.deepcopy(model)
    assert torch.equal(last_hidden(twin, twin, ids, torch.ones_like(ids)), plain)
    assert len(backbone(twin)._forward_hooks) == 1


def test_sizes_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers_at_once(torch.device("cpu")) == 1 << 24
    block = 64 * 4 * 151_936
    assert numbers_at_once(torch.device("mps")) > block
    free, reserved, allocated = 8 << 30, 3 << 30, 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    assert numbers_at_once(torch.device("cuda", 0)) == (10 << 30) // 80 > block
    free, reserved = 0, 1 << 30
    assert numbers_at_once(torch.device("cuda", 0)) == 1 << 24


@pytest.mark.parametrize("limit", ["numbers_at_once", "numbers_in_cache"])
@pytest.mark.parametrize("numbers", [1, 2 * 4 * 64])
def test_rows_are_compared_in_groups_of_that_size(numbers: int, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, groups = tiny_pair("llama", dtype=torch.float64), []
    expected = SpeculativeEngine(pair, 4).generate(PROMPTS, LOW_SWITCH, SAMPLING)
    shown = switchkd.rollout.writer.observe
    monkeypatch.setattr(switchkd.rollout.writer, limit, lambda device: numbers)
    monkeypatch.setattr(switchkd.rollout.writer, "observe", lambda *args: groups.append(len(args[3])) or shown(*args))
    assert_same_rollouts(
        SpeculativeEngine(pair, 4).generate(PROMPTS, LOW_SWITCH, SAMPLING), expected, pair, LOW_SWITCH, SAMPLING
    )
    assert max(groups) == max(1, numbers // (4 * 64))


def test_graphs_of_fixed_shapes_compare_as_many_rows_at_a_time_in_the_whole_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA each other number of rows would be compiled again, for seconds to minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    pair, a_row, groups = tiny_pair("llama", dtype=torch.float64), 4 * 64, []
    expected = ReferenceEngine(pair).generate(PROMPTS, LOW_SWITCH, SAMPLING)
    engine = SpeculativeEngine(pair, 4, compile=True)
    assert engine.graphs is not None
    engine.graphs.shapes = "fixed"
    free, shown = iter([7 * a_row, 5 * a_row, 1, 3 * a_row, *[9 * a_row] * 99]), switchkd.rollout.writer.observe
    monkeypatch.setattr(switchkd.rollout.writer, "numbers_at_once", lambda device: next(free))
    monkeypatch.setattr(switchkd.rollout.writer, "observe", lambda *args: groups.append(len(args[3])) or shown(*args))
    assert_same_rollouts(engine.generate(PROMPTS, LOW_SWITCH, SAMPLING), expected, pair, LOW_SWITCH, SAMPLING)
    # Five rows are padded to eight.
    assert {*groups} == {4}
    assert len(groups) > 4
    engine.generate(PROMPTS, LOW_SWITCH, SAMPLING)
    assert {*groups} == {4}
