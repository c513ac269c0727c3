"""A base student learns from an instruct teacher to end its turns, and does so wherever it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from runs import save, switchkd, write_rows, write_run
from switchkd.models.pair import ModelPair
from tiny import EOS_ID, VOCABULARY, tiny_model, tiny_tokenizer
from trainers import make_trainer

TURN = (
    "{% for m in messages %}<|turn|> {{ m['content'] }} <|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"one w{24 + n}"},
            {"role": "assistant", "content": f"sun w{30 + n} red"},
        ]
    }
    for n in range(4)
]


def chat_tokenizer(template: str | None = TURN) -> PreTrainedTokenizerFast:
    """With the marks of a turn as special but unnamed tokens."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(mark, special=True) for mark in ("<|turn|>", "<|stop|>")]
    )
    return tokenizer


TOKENIZER = chat_tokenizer()
STOP = TOKENIZER.convert_tokens_to_ids("<|stop|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base student that knows <eos> alone and has no template, and a teacher that has learned the chats of data.jsonl."""
    folder = tmp_path_factory.mktemp("chat")
    base, teacher = (tiny_model("llama", vocab=VOCABULARY + 2, seed=seed) for seed in (0, 1))
    taught = make_trainer(
        folder / "sft", ModelPair(teacher, None, TOKENIZER), ROWS, method="sft", max_steps=60, learning_rate=1e-2
    )
    taught.train()
    save(base, chat_tokenizer(template=None), folder / "student")
    save(taught.pair.student, TOKENIZER, folder / "teacher")
    write_rows(folder / "data.jsonl", ROWS)
    return folder


def answered(folder: Path) -> list[int]:
    """What transformers alone makes of the first question, of at most 12 tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        ROWS[0]["messages"][:1], chat_template=TURN, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    return output[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("method", ["kd", "gkd"])
def test_a_base_student_learns_to_stop(
    models: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(answered(models / "student")) == 12
    run = {"max_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_new_tokens": 8}
    run |= {"student_share": 0.5} if method == "gkd" else {}
    path = write_run(models, tmp_path, method=method, template_from="teacher", save_strategy="no", **run)
    assert switchkd("train", path) == 0
    assert "Text begins without BOS, ends at <eos> or <|stop|>." in capsys.readouterr().out
    ended = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert {*ended} == {EOS_ID, STOP}
    answer = answered(tmp_path / "out")
    assert answer[-1] == STOP
    assert len(answer) < 12
    # It is served with the template that it was taught in.
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TURN


def test_a_teacher_lends_its_template_where_the_method_asks_nothing_else_of_it(models: Path, tmp_path: Path) -> None:
    run = {"template_from": "teacher", "max_steps": 1, "max_new_tokens": 8, "save_strategy": "no"}
    stages = [{"method": "sft"}, {"method": "kd"}]
    assert switchkd("train", write_run(models, tmp_path, method=None, threshold=None, stages=stages, **run)) == 0
    for folder in (tmp_path / "out" / "1-sft", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TURN
    # So does the start, when it is asked beside the run.
    answers = ("--sets", models / "data.jsonl", "--limit", "1", "--seeds", "1", "--max-new-tokens", "4")
    assert switchkd("eval", tmp_path / "out", "--with-start", *answers) == 0


def test_a_student_without_a_template_is_told_where_to_take_one(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert switchkd("train", write_run(models, tmp_path, method="kd")) == 2
    assert "the tokenizer has no chat template; set template_from to teacher" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_a_run_warns_of_a_teacher_with_another_template(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, other = tmp_path / "student", TURN.replace("<|turn|> {{", "<|turn|> one {{")
    save(tiny_model("llama", vocab=VOCABULARY + 2), chat_tokenizer(other), student)
    run = {"method": "kd", "max_steps": 1, "max_new_tokens": 8, "save_strategy": "no", "student": str(student)}
    for source, warned in (("student", True), ("teacher", False)):
        (folder := tmp_path / source).mkdir(exist_ok=True)
        path = write_run(models, tmp_path, template_from=source, output_dir=str(folder / "out"), **run)
        assert switchkd("train", path) == 0
        assert ("the chat templates of student and teacher differ" in caplog.text) == warned
        caplog.clear()
    # Plain text goes through no template.
    text = str(write_rows(tmp_path / "text.jsonl", [{"prompt": "one two", "completion": "sun"}] * 2))
    assert switchkd("train", write_run(models, tmp_path, train_data=text, **run)) == 0
    assert "the chat templates" not in caplog.text


def test_commands_render_chats_as_they_are_told(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "t.jinja").write_text(TURN.replace("<|turn|> {{", "<|turn|> {{ mood }} {{"))
    rollout = ["rollout", "--student", models / "student", "--teacher", models / "teacher", "--policy", "student"]
    rollout += ["--data", models / "data.jsonl", "--max-new-tokens", "2", "--output", tmp_path / "r.jsonl", "--force"]
    assert switchkd(*rollout, "--template-from", path, "--chat-template-kwargs", "{mood: blue}") == 0
    first = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "<|turn|> blue one w24 <|stop|> <|turn|>"
    for wrong in ("[", "blue"):
        assert switchkd(*rollout, "--chat-template-kwargs", wrong) == 2
        assert "--chat-template-kwargs is" in capsys.readouterr().err
