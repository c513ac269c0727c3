"""The draft loop as graphs: the same tokens, few waits for the device, warm graphs, and what happens where there is no compiler."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from checks.rollouts import assert_same_rollouts
from switchkd.distributions import shaping
from switchkd.errors import UserError
from switchkd.models.pair import ModelPair
from switchkd.records import Prompt, Sampling
from switchkd.rollout import graphs, speculative
from switchkd.rollout.blends import Mix
from switchkd.rollout.blocks import BlockChooser, BlockCost, Drafts, ForwardCost
from switchkd.rollout.law import Policy, Student, Teacher
from switchkd.rollout.log import RolloutLog
from switchkd.rollout.metrics import RolloutMetrics
from switchkd.rollout.policies import AdaSwitch, Switch
from switchkd.rollout.reference import ReferenceEngine
from switchkd.rollout.speculative import SpeculativeEngine
from tiny import tiny_pair

GRAPHS: tuple[Literal["fixed", "open"] | None, ...] = ("fixed", "open", None)
SWITCH = Switch(threshold=0.15)
SAMPLING = Sampling(max_new_tokens=13)
# More prompts than rows, equal ones, one of a single token, and ends of text in between.
PROMPTS = [[5], [9, 8, 7], list(range(2, 30)), [9, 8, 7], [40, 41, 42, 43], [11, 12, 13], [20, 21]]


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces everything into graphs, with shapes fixed and nothing asked of the host, but runs them without a C++ compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, **how | {"backend": "aot_eager"}))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are packed."""
    monkeypatch.setattr(graphs, "_LARGE_WEIGHT", 0)


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    NAMES = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "nonzero", "masked_select", "tensor", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1])
        )
        # What `cpu` returned is on the host, and reading that waits for nothing.
        on_host = name != "cpu" and args and getattr(args[0], "on_host", False)
        if (name in self.NAMES or by_mask) and not on_host:
            self.counts["mask" if by_mask else name] += 1
        result = func(*args, **kwargs or {})
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name == "cpu" or (given and all(getattr(each, "on_host", False) for each in given)):
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    each.on_host = True
        return result


def test_the_count_of_host_reads_sees_them() -> None:
    values = torch.arange(3)
    with HostReads() as reads:
        bool(values[0] == 0)
        values[values > 1].tolist()
        values.cpu().tolist()
        torch.tensor([1])
    assert reads.counts == {"__bool__": 1, "mask": 1, "tolist": 1, "cpu": 1, "tensor": 1}


@pytest.mark.parametrize("policy", [Student(), Teacher(), SWITCH, Mix(0.4), AdaSwitch(factor=1.3, window=4)], ids=str)
@pytest.mark.parametrize("rows", [2, 16])
def test_a_block_waits_for_the_device_six_times_at_most_whatever_the_rows(rows: int, policy: Policy) -> None:
    pair = tiny_pair("llama")
    pair.student.generation_config.eos_token_id = pair.student.config.eos_token_id = None
    pair.teacher.generation_config.eos_token_id = pair.teacher.config.eos_token_id = None
    pair = ModelPair(pair.student, pair.teacher)
    prompts = [[5 + row, 6] for row in range(rows)]
    engine = SpeculativeEngine(pair, 4)
    blocks = 0

    def count(done: int) -> None:
        nonlocal blocks
        blocks += 1

    with HostReads() as reads:
        engine.generate(prompts, policy, SAMPLING, on_progress=count)
    # Rows that have written differently many tokens finish at different blocks: the copies of the others count too. What a call
    # costs once, its keys, its prompts and the ends of text, is 8.
    history = 2 * rows * blocks if policy.needs_history else 0  # made on the host, from lists
    assert 0 < sum(reads.counts.values()) - history <= 6 * blocks + 8, reads.counts


def test_a_block_waits_once_for_the_teachers_likeliest_ids_whatever_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts, policy = tiny_pair("llama", dtype=torch.float64), [[5 + row, 6] for row in range(6)], Student()
    sizes: list[int] = []
    table = shaping._top_table
    monkeypatch.setattr(
        shaping, "_top_table", lambda logits, top_k: sizes.append(len(logits)) or table(logits, top_k=top_k)
    )
    monkeypatch.setattr(speculative, "numbers_at_once", lambda device: 10 * pair.vocabulary_size)
    cpu: dict[Any, int] = {}
    for keep in ("hidden", 5):
        blocks: list[int] = []
        with HostReads() as reads:
            rollouts = SpeculativeEngine(pair, 4).generate(
                prompts, policy, SAMPLING, keep_teacher=keep, on_progress=blocks.append
            )
        cpu[keep] = reads.counts["cpu"]
    assert cpu[5] == cpu["hidden"] + len(blocks)
    # No logits of more positions at once than there is room for, and of none that a row does not keep.
    assert max(sizes) == 10
    assert sum(sizes) == sum(len(each.token_ids) for each in rollouts)
    expected = ReferenceEngine(pair).generate(prompts, policy, SAMPLING, keep_teacher=5)
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert ours.teacher_top is not None
        assert theirs.teacher_top is not None
        assert torch.equal(ours.teacher_top.ids, theirs.teacher_top.ids)
        # Kept in float32.
        torch.testing.assert_close(ours.teacher_top.logp, theirs.teacher_top.logp, rtol=1e-6, atol=1e-6)


def test_kept_states_are_no_more_than_what_stands() -> None:
    """A part of a block would keep the states of all its rows."""
    pair, sizes = tiny_pair("llama"), []
    kept = RolloutLog.rollout

    def noted(log: RolloutLog, *given: Any) -> Any:
        sizes.extend((len(each), each.untyped_storage().nbytes()) for each in log.teacher_hidden)
        return kept(log, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutLog, "rollout", noted)
        SpeculativeEngine(pair, 4).generate(PROMPTS, SWITCH, SAMPLING, keep_teacher="hidden")
    assert len({count for count, _ in sizes}) > 1
    assert {stored // count for count, stored in sizes} == {4 * pair.teacher.config.hidden_size}


# Tracing takes seconds a graph, so the quick suite has one blend, greedily; SWITCH at temperature 1 is in the test of warm graphs.
TRACED = [
    pytest.param(
        policy, temperature, id=f"{type(policy).__name__}-{temperature}", marks=() if quick else pytest.mark.slow
    )
    for policy in (Student(), SWITCH, Mix(0.4), AdaSwitch(factor=1.3, window=4))
    for temperature in (0.0, 1.0)
    for quick in [isinstance(policy, Mix) and temperature == 0]
]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("policy", "temperature"), TRACED)
def test_graphs_write_the_tokens_of_the_reference_engine(policy: Policy, temperature: float) -> None:
    # Tracing takes a second a layer.
    pair, sampling = tiny_pair("llama", layers=1, dtype=torch.float64), Sampling(13, temperature=temperature)
    expected = ReferenceEngine(pair).generate(PROMPTS, policy, sampling)
    engine = SpeculativeEngine(pair, 4, max_rows=3, compile=True)
    rollouts = engine.generate(PROMPTS, policy, sampling)
    assert_same_rollouts(rollouts, expected, pair, policy, sampling)
    assert engine.graphs is not None
    assert engine.graphs.student_step.compiled is not None  # nothing fell back


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.usefixtures("uncompiled")
def test_graphs_of_other_families(family: str) -> None:
    pair = tiny_pair(family, dtype=torch.float64)
    expected = ReferenceEngine(pair).generate(PROMPTS, SWITCH, SAMPLING)
    rollouts = SpeculativeEngine(pair, 4, max_rows=3, compile=True).generate(PROMPTS, SWITCH, SAMPLING)
    assert_same_rollouts(rollouts, expected, pair, SWITCH, SAMPLING)


# The compiler itself calls what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("packed")
def test_compiled_code_writes_the_same_tokens_and_follows_weights_that_change() -> None:
    """The real compiler, with packed weights: half a minute. `make slow` runs it."""
    # Without rotary positions: transformers makes their sines in float32 even here, and compiled ones differ in the last digits.
    pair = tiny_pair("gpt2", dtype=torch.float64)
    engine = SpeculativeEngine(pair, 4, max_rows=4, compile=True)
    for change in (0.0, 0.1):
        with torch.no_grad():
            for model in (pair.student, pair.teacher):
                for parameter in model.parameters():
                    parameter.mul_(1 + change)
        expected = ReferenceEngine(pair).generate(PROMPTS, SWITCH, SAMPLING)
        assert_same_rollouts(engine.generate(PROMPTS, SWITCH, SAMPLING), expected, pair, SWITCH, SAMPLING)


@pytest.mark.usefixtures("uncompiled")
def test_warm_graphs_are_kept_over_calls_and_over_weights_that_change() -> None:
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    engine = SpeculativeEngine(pair, 4, max_rows=4, compile=True)
    engine.generate(PROMPTS, SWITCH, SAMPLING)
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.mul_(1.01)
    graphs_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # The student's step, the teacher's states, the comparison and the excess draw's noise, once each whatever the rows, widths
    # and blocks of the call.
    assert graphs_before == 4
    chosen = SpeculativeEngine(pair, "auto", max_rows=4)
    chosen.graphs = engine.graphs
    chosen.generate(PROMPTS, SWITCH, SAMPLING)
    rollouts = engine.generate(PROMPTS, Switch(threshold=0.11), SAMPLING, seed=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs_before
    expected = ReferenceEngine(pair).generate(PROMPTS, Switch(threshold=0.11), SAMPLING, seed=1)
    assert_same_rollouts(rollouts, expected, pair, Switch(threshold=0.11), SAMPLING, seed=1)
    # Torch's checks are left out within a call, and only there.
    pair.student.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    changed = ReferenceEngine(pair).generate(PROMPTS, SWITCH, SAMPLING)
    assert_same_rollouts(engine.generate(PROMPTS, SWITCH, SAMPLING), changed, pair, SWITCH, SAMPLING)
    # Nor does what was checked keep the caches' memory.
    kept = weakref.ref(engine.caches["student"])
    engine.caches.clear()
    gc.collect()
    assert kept() is None


def test_weights_are_packed_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair("llama")
    assert not graphs.Graphs(pair).teacher_states.packs_weights
    sizes = [each.numel() for each in pair.teacher.parameters() if each.ndim > 1]
    monkeypatch.setattr(graphs, "_LARGE_WEIGHT", sum(sizes) // len(sizes))
    assert graphs.Graphs(pair).teacher_states.packs_weights
    monkeypatch.setattr(graphs, "_LARGE_WEIGHT", sum(sizes) // len(sizes) + 1)
    assert not graphs.Graphs(pair).teacher_states.packs_weights


@pytest.mark.usefixtures("packed")
def test_packed_weights_are_numbered_by_model_and_state() -> None:
    pair, other = tiny_pair("llama"), tiny_pair("llama")
    first, second = (graphs.Graphs(each) for each in (pair, other))
    seen = [first.weights(), first.weights(), second.weights()]
    with torch.no_grad():
        next(pair.teacher.parameters()).mul_(2)
    seen.append(first.weights())
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    # A teacher that shares weights with the student that trains is never packed.
    assert graphs.Graphs(ModelPair(pair.student, pair.student)).weights() == 0
    assert not graphs.Graphs(ModelPair(pair.student, pair.student)).teacher_states.packs_weights


def test_where_torch_cannot_compile_rollouts_go_on_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, **how | {"backend": no_compiler}))
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    expected = SpeculativeEngine(pair, 4).generate(PROMPTS[:2], SWITCH, SAMPLING)
    engine = SpeculativeEngine(pair, 4, compile=True)
    with pytest.warns(UserWarning, match=r"uncompiled.*no C\+\+ compiler.*install a C\+\+ compiler"):
        rollouts = engine.generate(PROMPTS[:2], SWITCH, SAMPLING)
    assert_same_rollouts(rollouts, expected, pair, SWITCH, SAMPLING)


def test_what_compile_says() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [graphs.compiles(each, cpu) for each in (True, False, "auto")] == [True, False, False]
    assert [graphs.compiles(each, cuda) for each in (True, False, "auto")] == [True, False, True]
    assert [graphs.bucket(least) for least in (1, 256, 257, 600)] == [256, 256, 512, 1024]
    with pytest.raises(UserError, match="compile is 'yes'"):
        SpeculativeEngine(tiny_pair("llama"), compile="yes")  # type: ignore[arg-type]


def test_what_a_graph_has_seen_keeps_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one shape are checked once on CUDA, and their laws over the vocabulary are gone with them."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    pair = tiny_pair("llama")
    laws: list[weakref.ref[Tensor]] = []

    class Watched(Mix):
        def decide(self, positions: Any) -> Any:
            decision = super().decide(positions)
            assert decision.blend is not None
            laws.append(weakref.ref(decision.blend.logp))
            return decision

    engine = SpeculativeEngine(pair, 4, compile=True)
    assert engine.graphs is not None
    engine.graphs.shapes = "fixed"
    write = graphs.Graph(graphs.written, torch.device("cuda"))
    checked, alive = [], []

    def count(done: int) -> None:
        checked.append(len(write._checked))
        alive.append(sum(law() is not None for law in laws))

    monkeypatch.setattr(engine.graphs, "written", write)
    engine.generate([[5, 6]] * 4, Watched(0.4), SAMPLING, on_progress=count)
    assert checked == [1] * len(laws)
    assert alive == [0] * len(laws)
    assert len(laws) > 3


def test_block_sizes_are_those_that_graphs_serve() -> None:
    cost = BlockCost(ForwardCost(1.0), ForwardCost(3.0))

    def taken(graphs: Literal["fixed", "open"] | None) -> set[int]:
        chooser, row, sizes = BlockChooser("auto", 40, cost=cost, graphs=graphs), Drafts(), set()
        for stood in [0] * 20 + [16] * 40:
            sizes.add(size := chooser.choose([(row, 40)], waiting=False))
            chooser.learn(row, min(stood, size), stood < size)
        # The last token of a text.
        return sizes | {chooser.choose([(row, 1)], waiting=False)}

    assert taken("fixed") == {2, 4, 8}
    assert {1, 16} < taken(None)
    assert 1 not in taken("open")
    assert {2, 16} < taken("open")
    last = {
        graphs: BlockChooser(4, 40, cost=cost, graphs=graphs).choose([(Drafts(), 1)], waiting=False)
        for graphs in GRAPHS
    }
    assert last == {"fixed": 4, "open": 2, None: 1}


def test_on_cuda_the_device_times_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.made += 1
            self.at = Event.made

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, ended: Event) -> float:
            return 500.0 * (ended.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    metrics = RolloutMetrics(on_cuda=True)
    with metrics.timing("student"):
        pass
    with metrics.timing("teacher"), metrics.timing("policy"):
        pass
    assert metrics.seconds["student"] == 0
    metrics.settle()
    metrics.settle()  # adds nothing twice
    assert metrics.seconds == {"student": 0.5, "teacher": 1.5, "policy": 0.5, "cache": 0.0}


def test_prompts_that_begin_a_response_and_kept_states_come_out_alike() -> None:
    pair = tiny_pair("llama", dtype=torch.float64)
    prompts = [Prompt((5, 6, 7, 8), 0, begun=2), Prompt((5, 6), 1), Prompt((9,), 2), Prompt((5, 6), 3)]
    expected = ReferenceEngine(pair).generate(prompts, SWITCH, SAMPLING, keep_teacher="hidden")
    rollouts = SpeculativeEngine(pair, 4, max_rows=2).generate(prompts, SWITCH, SAMPLING, keep_teacher="hidden")
    assert_same_rollouts(rollouts, expected, pair, SWITCH, SAMPLING)
    for ours, theirs in zip(rollouts, expected, strict=True):
        torch.testing.assert_close(ours.teacher_hidden, theirs.teacher_hidden)
