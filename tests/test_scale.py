"""`switchkd plan`: sizes from configurations, the memory formula against counted tensors, and what the search finds."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MixtralConfig, MixtralForCausalLM

from switchkd.cli.main import main
from switchkd.cli.plan import PAIRS, size_in_bytes
from switchkd.errors import UserError
from switchkd.models.heads import backbone, cache_argument
from switchkd.records import Sampling
from switchkd.rollout.blends import Mix
from switchkd.rollout.graphs import Graphs
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.scale.cost import GIB, Assumptions, Clock, Cluster
from switchkd.scale.memory import Bytes, Load, Split, Spread, backward, lasting, needed, rolling_out, with_loss
from switchkd.scale.plan import Job, Option, plan
from switchkd.scale.sizes import ModelSize, known_models, size_of
from tiny import FAMILIES, tiny_model, tiny_pair

SCRIPT = Path(__file__).parents[1] / "scripts" / "plan_check.py"
SMALL, LARGE = PAIRS[0], PAIRS[2]
JOB = Job()


@pytest.fixture(scope="module")
def plan_check() -> Any:
    spec = importlib.util.spec_from_file_location("plan_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(names: tuple[str, str], job: Job = JOB, **cluster: Any) -> list[Option]:
    return plan(size_of(names[0]), size_of(names[1]), job, Clock(Cluster(**cluster), Bytes()))


# ------------------------------------------------------------------------------------------------------------------ sizes


# As their pages on the hub say, in billions.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen2.5-1.5B": 1.544,
    "Qwen/Qwen2.5-7B": 7.616,
    "Qwen/Qwen2.5-32B": 32.764,
    "meta-llama/Llama-3.1-8B": 8.030,
    "meta-llama/Llama-3.1-70B": 70.554,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_gives_the_published_number_of_parameters(name: str) -> None:
    assert round(size_of(name).parameters / 1e9, 3) == PUBLISHED[name]
    assert PUBLISHED.keys() == known_models().keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma2"])
def test_sizes_are_those_of_the_model_itself(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    for place in (str(tmp_path), str(tmp_path / "config.json")):
        assert replace(size_of(place), name="") == replace(ModelSize.of(model), name="")
    assert size_of(str(tmp_path)).parameters == sum(each.numel() for each in model.parameters())


def test_a_token_is_multiplied_with_the_experts_that_it_visits_alone() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_local_experts=8, num_experts_per_tok=2)
    size = ModelSize.of(MixtralForCausalLM(config))
    # Six experts a layer, with three projections each.
    assert size.multiplied - size.multiplied_a_token == size.idle == 3 * 6 * 3 * 16 * 24
    assert ModelSize.of(tiny_model("llama")).idle == 0


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3", "gpt2"])
def test_what_is_cached_of_a_position_is_what_the_model_caches(family: str) -> None:
    if family in FAMILIES:
        model = tiny_model(family)
    else:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 12}
        each = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 7, "topk_group": 1}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **experts, **heads, **each))
    cache = DynamicCache()
    backbone(model)(
        input_ids=torch.arange(10).reshape(2, 5), **{cache_argument(backbone(model)): cache}, use_cache=True
    )
    layers: Any = cache.layers
    assert ModelSize.of(model).cached(2, 5) == sum(each.keys.numel() + each.values.numel() for each in layers)


def quantized(folder: Path, **how: Any) -> str:
    path = folder / "config.json"
    values = known_models()["Qwen/Qwen2.5-7B"]
    path.write_text(json.dumps({**values, "quantization_config": how}))
    return str(path)


@pytest.mark.parametrize(
    ("how", "gib"),
    [
        ({"quant_method": "gptq", "bits": 4}, 5.1),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 5.1),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.1),
        ({"quant_method": "fp8"}, 8.1),
    ],
)
def test_quantized_weights_count_their_bits(how: dict[str, Any], gib: float, tmp_path: Path) -> None:
    name = quantized(tmp_path, **how)
    options = planned((SMALL[0], name))
    # 6.5 of 7.6 billion weights lie in the layers; the others are in 16 bits.
    each = next(option for option in options if option.split == Split("ddp", 8, "each"))
    assert round(each.memory[0]["teacher weights"] / GIB, 1) == gib
    # teacher_offload takes plain weights alone.
    assert {option.split.teacher for option in options} == {"each", "device_map"}
    with pytest.raises(UserError, match=r"config\.json has quantized weights, which do not train"):
        planned((name, SMALL[1]))


def test_quantized_weights_of_unknown_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantized weights \(mxfp4\) whose bits cannot be told"):
        size_of(quantized(tmp_path, quant_method="mxfp4"))


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"configuration of .* cannot be read .*; give a hub id, a folder"):
        size_of(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="is no causal language model that can be planned"):
        size_of(str(tmp_path / "config.json"))


# ----------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula_is_what_a_run_holds(plan_check: Any, checkpointing: bool, tmp_path: Path) -> None:
    found = plan_check.measure(tmp_path, "ddp", 1, 8, checkpointing)
    for phase in ("rollout", "training"):
        # What no part names: token ids, masks, a layer's intermediate results.
        assert found[f"{phase} by formula"] == pytest.approx(found[phase], rel=0.1)


def parts(spread: Any, processes: int, teacher_at: Any = "each") -> dict[str, int]:
    student, teacher = size_of(SMALL[0]), size_of(SMALL[1])
    load, split, numbers = Load(8), Split(spread, processes, teacher_at), Bytes()
    return {
        **lasting(student, teacher, load, split, numbers),
        **rolling_out(student, teacher, load, split, numbers),
        **with_loss(student, load, split, numbers),
        **backward(student, load, split, numbers),
    }


def test_what_each_split_takes_apart() -> None:
    student, teacher = size_of(SMALL[0]), size_of(SMALL[1])
    weights, moments = 4 * student.parameters, 8 * student.parameters
    expected = {
        "ddp": (weights, moments, weights),
        "zero1": (weights, moments // 8, weights),
        "zero2": (weights, moments // 8, weights // 8),
        "fsdp2": (weights // 8, moments // 8, weights // 8),
    }
    for spread, sizes in expected.items():
        found = parts(spread, 8)
        assert (found["student weights"], found["optimizer"], found["gradients"]) == sizes
        assert ("gathered student" in found) == (spread == "fsdp2")
    shared = parts("ddp", 8, "shared")["teacher weights"]
    assert shared == 2 * (teacher.layers * teacher.layer // 8 + teacher.outside)
    assert parts("ddp", 8)["teacher weights"] == 2 * teacher.parameters


def test_a_cache_on_cuda_is_as_large_as_the_engine_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeError(Exception):
        pass

    def made(model: Any, head: Any, rows: int, slots: int, kept: Any) -> None:
        raise MadeError(rows, slots)

    engine = SpeculativeEngine(tiny_pair("llama"), compile=False)
    # The graphs of CUDA, without a device to make them for.
    engine.graphs = object.__new__(Graphs)
    engine.graphs.shapes = "fixed"
    monkeypatch.setattr("switchkd.rollout.speculative.CachedModel", made)
    for prompt, response, rows, size in ((200, 52, 6, (8, 512)), (256, 256, 2, (2, 1024)), (9, 2, 1, (1, 256))):
        load = planned(SMALL, Job(rows, prompt, response), gpus=1)[0].load
        with pytest.raises(MadeError) as seen:
            engine.generate([(2,) * prompt] * rows, Mix(0.5), Sampling(response))
        assert seen.value.args == (load.cached_rows, load.slots) == size
    # FSDP and a teacher whose weights move write without graphs.
    loads = {each.split: each.load for each in planned(SMALL)}
    plain = (Split("fsdp2", 8, "each"), Split("ddp", 8, "shared"), Split("zero1", 8, "cpu"))
    assert {loads[each].slots for each in plain} == {256 + 256 + 16}
    assert loads[Split("zero1", 8, "each")].slots == 1024


def test_rollouts_and_training_do_not_add_up() -> None:
    assert needed({"a": 1}, {"b": 5}, {"c": 2, "d": 4}) == 7


# ------------------------------------------------------------------------------------------------------------------- plans


def test_a_small_pair_takes_the_plain_split_and_a_large_one_cannot() -> None:
    small, large = planned(SMALL), planned(LARGE)
    assert small[0].fits
    assert small[0].split == Split("ddp", 8, "each")
    assert large[0].fits
    # 141 GB of weights: on no single GPU.
    assert large[0].split.teacher in ("shared", "device_map")
    refused = next(each for each in large if each.split.teacher == "each")
    assert not refused.fits
    assert refused.largest[0] == "teacher weights"


def test_what_is_chosen_fits_and_nothing_faster_does() -> None:
    options = planned(SMALL, memory=40 * GIB)
    usable = 40 * GIB * Assumptions().memory_usable
    assert all((each.bytes <= usable) == each.fits for each in options)
    times = [each.time for each in options if each.fits]
    # But for what takes as long as the fastest.
    assert [max(each, 1.02 * min(times)) for each in times] == sorted(max(each, 1.02 * min(times)) for each in times)
    assert len(times) > 1
    assert any(not each.fits for each in planned(SMALL, memory=16 * GIB))


def test_text_of_several_steps_shares_forwards_and_is_all_kept() -> None:
    """Eight texts a step and process: four steps at once are 32 in flight, whose forwards take hardly longer than those of 8."""
    one, four = (planned(SMALL, Job(rollout_steps=steps)) for steps in (1, 4))
    plain = [next(each for each in options if each.split == Split("ddp", 8, "each")) for options in (one, four)]
    assert [each.load.rollout_rows for each in plain] == [8, 32]
    assert [each.load.rows for each in plain] == [8, 8]
    kept, caches = ([each.memory[0][part] for each in plain] for part in ("kept teacher states", "teacher cache"))
    assert (kept[1], caches[1]) == (4 * kept[0], 4 * caches[0])
    # The forwards of both are bound by reading weights or launching kernels here, so they take the same for more rows.
    written = [each.seconds["student writes"] for each in plain]
    assert written[0] / 4 < written[1] < written[0] / 2
    assert plain[0].seconds["training"] == plain[1].seconds["training"]


def test_more_memory_and_a_faster_link_never_cost_time() -> None:
    by_memory = [planned(SMALL, memory=size * GIB)[0].time for size in (24, 40, 80)]
    assert by_memory == sorted(by_memory, reverse=True)
    slow, fast = (
        next(each for each in planned(SMALL, link=link) if each.split == Split("fsdp2", 8, "each")).time
        for link in (60, 450)
    )
    assert fast < slow


def test_the_optimizer_is_split_where_its_state_is() -> None:
    seconds = {each.split: each.seconds["optimizer"] for each in planned(SMALL)}
    whole = seconds[Split("ddp", 8, "each")]
    spreads: tuple[Spread, ...] = ("zero1", "zero2", "fsdp2")
    assert [seconds[Split(spread, 8, "each")] for spread in spreads] == pytest.approx(3 * [whole / 8])


def test_one_gpu_has_nothing_to_spread() -> None:
    assert {each.split for each in planned(SMALL, gpus=1)} == {Split("ddp", 1, "each"), Split("ddp", 1, "cpu")}


def test_a_pair_of_two_families_is_refused() -> None:
    with pytest.raises(UserError, match="not of one tokenizer's family"):
        planned((SMALL[0], LARGE[1]))


# ----------------------------------------------------------------------------------------------------------------- command


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["plan", *arguments])
    return int(exited.value.code or 0)


def test_the_command_prints_a_plan_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{gpus: 4, memory: 40GB, link: pcie, bandwidth: 1555}")
    assert command("Qwen2.5-0.5B", "Qwen2.5-7B", "--cluster", str(cluster), "--gpus", "2") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "on 2 GPUs of 37 GiB, 60 GB/s" in out
    assert "Take " in out
    assert "bandwidth 1555" in out
    assert command("Qwen2.5-0.5B", "Qwen2.5-7B", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["student"] == "Qwen/Qwen2.5-0.5B"
    best = found["options"][0]
    lasts, *phases = (sum(parts.values()) for parts in best["bytes_by_part"].values())
    assert best["bytes"] == lasts + max(phases)


def test_without_models_it_shows_the_pairs_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--json") == 0
    assert [(each["student"], each["teacher"]) for each in json.loads(capsys.readouterr().out)] == list(PAIRS)
    assert command() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Qwen2.5-0.5B",), "needs a student and a teacher"),
        (("--memory", "80 bananas"), "write a size such as 80GiB"),
        (("--memory", "1.2.3GiB"), "memory is '1.2.3GiB'; write a size"),
        (("--link", "string"), "choose nvlink or pcie, or give GB/s"),
        (("--link", "-3"), "link of the cluster is -3.0; give a number above 0"),
    ],
)
def test_what_cannot_be_read_is_refused(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_an_unknown_key_of_a_cluster_gets_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("gpu: 4")
    assert command("--cluster", str(path)) == 2
    assert "did you mean 'gpus'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"link: null", "link is None; choose nvlink or pcie, or give GB/s"),
        (b"link: [1]", "link is [1]; choose"),
        (b"gpus: 2.5", "gpus of the cluster is 2.5; give a whole number"),
        (b"gpus: true", "gpus of the cluster is True; give a number above 0"),
        (b"bandwidth: .inf", "bandwidth of the cluster is inf; give a number above 0"),
        (b"1: 2", "has a key 1, which is none of a cluster"),
        (b"gpus: \xff", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_cluster_file_that_cannot_be_one_is_refused(
    text: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(text)
    assert command("--cluster", str(path)) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_sizes_of_memory() -> None:
    given = ("80GiB", "24 GB", "1.5tib", 7 * GIB)
    assert [size_in_bytes(text) for text in given] == [80 * GIB, 24 * 10**9, 3 * 2**39, 7 * GIB]
    with pytest.raises(UserError, match="'80', which is 80 bytes; write a size with its unit"):
        size_in_bytes("80")
