"""Chats become what their template makes of them: with templates of our own, and with those of published models.

The latter come with TRL (the `bench` extra); without it these tests are skipped.
"""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from switchkd.data.examples import Rendering, prompt_text, to_examples
from switchkd.data.rows import read_rows
from switchkd.data.shapes import row_text
from switchkd.errors import UserError
from switchkd.models.chat import end_of_turn, leading_ids, set_template, warn_of_other_template
from switchkd.models.pair import ModelPair
from switchkd.records import Example, FinishReason, Sampling
from switchkd.rollout.law import Student
from switchkd.rollout.reference import ReferenceEngine
from tiny import tiny_model
from trainers import make_trainer

LIMITS: dict[str, Any] = {"max_prompt_tokens": 20_000, "max_response_tokens": 2_000, "need_response": True}
TURN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | None = TURN, bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each byte, and one for each mark of the template. The marks are special, but no named ones, as in Phi-3."""
    marks = sorted(set(re.findall(r"<[|｜]?[\w▁/]+[|｜]?>", f"{template} <|user|><|assistant|><|stop|>")))
    named = ["<bos>", "<eos>"]
    symbols = [*named, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    # Phi-3's <|end|> takes the line end after it in, and so stands right before its end of text.
    tokens = [AddedToken(each, special=True, normalized=False, rstrip=each == "<|end|>") for each in [*named, *marks]]
    core.add_special_tokens(tokens)
    if bos:
        core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def examples_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Example]:
    return list(to_examples(read_rows([row]), tokenizer, **LIMITS, rendering=Rendering(**options)).examples)


def user(words: str) -> dict[str, Any]:
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [user("Hi?"), assistant("Hello!")]
MANY = [*ONE, user("More?"), assistant("Yes.")]
CHATS = {"one turn": ONE, "many turns": MANY, "one, system": [SYSTEM, *ONE], "many, system": [SYSTEM, *MANY]}

# ------ the templates of published models

PUBLISHED = {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
    for path in (files("trl").joinpath("chat_templates").iterdir() if find_spec("trl") else ())
    # Those for training are TRL's own versions.
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
}
# With what each ends the assistant's turn. GLM's writes nothing there, but TRL's version of it for training does.
ENDS = {
    "qwen": "<|im_end|>",
    "lfm2": "<|im_end|>",
    "nemotron": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "diffusion_gemma": "<turn|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "muse": "<|eot|>",
    "glm4moe": "<|user|>",
}
# These open an answer with a thought, and write a finished answer without it.
OPEN_A_THOUGHT = ("deepseek", "nemotron")
# Their messages are lists of parts.
OF_PARTS = ("idefics3", "smolvlm", "llava_next")
OF_TEXT = sorted(name for name in PUBLISHED if not name.startswith(OF_PARTS)) or ["TRL"]
needs_trl = pytest.mark.skipif(not PUBLISHED, reason="the templates come with TRL")


def published(name: str) -> tuple[PreTrainedTokenizerFast, str]:
    """A tokenizer with a published template, and what ends a turn in it."""
    template = PUBLISHED[name]
    # A mark without its left bar is none that the pattern above finds.
    return byte_tokenizer(template), next(end for start, end in ENDS.items() if name.startswith(start))


@needs_trl
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", OF_TEXT)
def test_prompt_and_response_are_the_whole_conversation(name: str, chat: str) -> None:
    tokenizer, end = published(name)
    messages = CHATS[chat]
    if name == "gemma" and messages[0] is SYSTEM:
        with pytest.raises(UserError, match="row 0: the chat template cannot write it: System role not supported"):
            examples_of({"messages": messages}, tokenizer)
        return
    (example,) = examples_of({"messages": messages}, tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    ours = [*example.prompt.token_ids, *example.response_ids]
    if name == "glm4moe":
        assert ours == [*ids, tokenizer.convert_tokens_to_ids(end)]
    else:
        assert ours == ids[: len(ours)]
        # A line end, and Phi-3's end of text: nobody generates what comes after the end of a turn.
        assert tokenizer.decode(ids[len(ours) :]).strip() in ("", "<eos>")
    assert tokenizer.decode(ours[-1:]) == tokenizer.decode([end_of_turn(tokenizer)]) == end
    assert messages[-1]["content"] in tokenizer.decode(example.response_ids)
    served = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if not name.startswith(OPEN_A_THOUGHT):
        assert [*example.prompt.token_ids] == tokenizer(served, add_special_tokens=False)["input_ids"]


@needs_trl
@pytest.mark.parametrize("name", OF_TEXT)
def test_every_turn_is_trained_as_it_is_served(name: str) -> None:
    tokenizer, _ = published(name)
    first, last = examples_of({"messages": MANY}, tokenizer, train_turns="all")
    assert [first] == examples_of({"messages": ONE}, tokenizer)
    assert [last] == examples_of({"messages": MANY}, tokenizer)
    assert first != last


@needs_trl
def test_an_empty_thought_is_trained_where_it_is_served() -> None:
    tokenizer, _ = published("qwen3")
    (thinking,) = examples_of({"messages": ONE}, tokenizer)
    assert tokenizer.decode(thinking.prompt.token_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(thinking.response_ids) == "<think>\n\n</think>\n\nHello!<|im_end|>"
    quiet = {"template_kwargs": {"enable_thinking": False}}
    (without,) = examples_of({"messages": ONE}, tokenizer, **quiet)
    assert tokenizer.decode(without.prompt.token_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(without.response_ids) == "Hello!<|im_end|>"
    # A row's own column wins.
    row = {"messages": ONE, "chat_template_kwargs": {"enable_thinking": False}}
    assert examples_of(row, tokenizer, template_kwargs={"enable_thinking": True}) == [without]
    assert prompt_text(row_text(read_rows([row])[0]), tokenizer) == tokenizer.decode(without.prompt.token_ids)


@needs_trl
def test_a_finished_answer_without_the_thought_that_opens_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, _ = published("deepseekv3")
    examples_of({"messages": ONE}, tokenizer)
    assert "1 of 1 answers do not begin as they are served: the chat template opens an answer with '<think>\\n'" in (
        caplog.text
    )
    # Where nothing is trained on, the prompt is the one that is served.
    (example,) = to_examples(read_rows([{"messages": ONE}]), tokenizer, **LIMITS | {"need_response": False}).examples
    assert tokenizer.decode(example.prompt.token_ids).endswith("<think>\n")
    assert example.response_ids == ()


@needs_trl
@pytest.mark.parametrize("name", [name for name in sorted(PUBLISHED) if name.startswith(OF_PARTS)])
def test_a_template_that_leaves_the_words_out_makes_a_bad_row(name: str) -> None:
    with pytest.raises(UserError, match=r"row 0: the chat template (leaves out the words of the user|cannot write it)"):
        examples_of({"messages": ONE}, byte_tokenizer(PUBLISHED[name]))


def test_what_a_template_drops_makes_a_bad_row() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {}}}]}
    plain = byte_tokenizer()
    with pytest.raises(UserError, match="the chat template leaves out the call of 'rain'"):
        examples_of({"messages": [user("Rain?"), call]}, plain)
    without_tools = byte_tokenizer(
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="the chat template leaves out the words of the tool, '21 C'"):
        examples_of({"messages": [user("Rain?"), {"role": "tool", "content": "21 C"}, assistant("No.")]}, without_tools)
    with pytest.raises(UserError, match="the chat template cannot write it: substring not found"):
        examples_of({"messages": ONE}, byte_tokenizer("{{ messages[0].content.index('no such tool') }}"))


def test_what_arrow_fills_in_is_taken_out_of_calls_and_keywords() -> None:
    template = (
        "{{ keep | default('-') }} {% for m in messages %}{{ (m.tool_calls or m.content) | tojson }}<|end|>{% endfor %}"
    )
    called = {"function": {"name": "rain", "arguments": {"city": "Rome", "day": None}}}
    message = {"role": "assistant", "content": "", "tool_calls": [called]}
    row = {"messages": [user("Rain?"), message], "chat_template_kwargs": {"keep": None}}
    (example,) = examples_of(row, tokenizer := byte_tokenizer(template))
    assert '{"city": "Rome"}' in tokenizer.decode(example.response_ids)
    assert tokenizer.decode(example.prompt.token_ids).startswith("- ")


TOOL = {"type": "function", "function": {"name": "rain", "description": "Rain here?", "parameters": {"type": "object"}}}


@needs_trl
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma4", "glm4moe"])
def test_tools_and_their_calls_are_rendered(name: str) -> None:
    tokenizer, _ = published(name)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {}}}]}
    messages = [user("Rain?"), call]
    # As Arrow has it: every message has every key.
    filled = [{**dict.fromkeys(("content", "tool_calls")), **message} for message in messages]
    (example,) = examples_of({"messages": filled, "tools": [TOOL]}, tokenizer)
    spoken = [messages[0], {"content": "", **call}]
    whole = tokenizer.apply_chat_template(spoken, tools=[TOOL], tokenize=False)
    assert whole.startswith(
        tokenizer.decode([*example.prompt.token_ids, *example.response_ids]).removesuffix("<|user|>")
    )
    assert "Rain here?" in tokenizer.decode(example.prompt.token_ids)
    assert "rain" in tokenizer.decode(example.response_ids)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"tools": "[{"}, "tools is text that is not JSON"),
        ({"tools": {"name": "rain"}}, "tools is dict .*, not a list of tools"),
        ({"chat_template_kwargs": "quiet"}, "chat_template_kwargs is str 'quiet', not a mapping"),
    ],
)
def test_what_is_no_tool_or_keyword_makes_a_bad_row(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"row 0: {reason}"):
        examples_of({"messages": ONE, **columns}, byte_tokenizer())


def test_tools_may_be_json_in_text() -> None:
    tokenizer = byte_tokenizer("{% for tool in tools or [] %}{{ tool.name }};{% endfor %}" + TURN)
    as_text, as_list = (
        examples_of({"messages": ONE, "tools": tools}, tokenizer)
        for tools in ('[{"name": "rain"}]', [{"name": "rain"}])
    )
    assert as_text == as_list
    assert tokenizer.decode(as_text[0].prompt.token_ids).startswith("rain;<|user|>")


# ------ the token that ends a turn


@needs_trl
def test_an_end_that_is_special_but_unnamed_is_found() -> None:
    tokenizer, _ = published("phi3")
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in tokenizer.all_special_ids
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize(
    "template", [None, "{{ messages[7].content }}", "{% for m in messages %}{{ m.content }}\n{% endfor %}"]
)
def test_a_template_without_an_end_has_none(template: str | None) -> None:
    assert end_of_turn(byte_tokenizer(template)) is None


def test_the_end_of_a_turn_ends_a_text_of_the_pair() -> None:
    tokenizer = byte_tokenizer()
    vocab = max(tokenizer.get_vocab().values()) + 1
    student = tiny_model("llama", vocab=vocab)
    assert tokenizer.convert_tokens_to_ids("<|stop|>") in ModelPair(student, None, tokenizer).eos_ids
    assert len(ModelPair(student, None, byte_tokenizer(None)).eos_ids) == 1


def test_a_conversation_may_be_too_long_for_its_later_turns_alone() -> None:
    rows, options = read_rows([{"messages": [*MANY, *MANY]}] * 2), Rendering(train_turns="all")
    limits = LIMITS | {"max_prompt_tokens": 20, "skip_bad_rows": True}
    loaded = to_examples(rows, byte_tokenizer(), **limits, rendering=options)
    assert [len(example.prompt.token_ids) <= 20 for example in loaded.examples] == [True] * 2
    assert [bad.where for bad in loaded.skipped] == ["row 0", "row 1"]


# ------ whose template


def test_a_template_comes_from_the_student_the_teacher_or_a_file(tmp_path: Path) -> None:
    theirs = byte_tokenizer("{{ messages[0].content }}")
    text = "file: {{ messages[0].content }}"
    (path := tmp_path / "t.jinja").write_text(text)
    # As some editors save it.
    (marked := tmp_path / "marked.jinja").write_text(text, encoding="utf-8-sig")
    files = [(str(path), text), (str(marked), text)]
    for source, expected in (("student", TURN), ("teacher", theirs.chat_template), *files):
        tokenizer = byte_tokenizer()
        set_template(tokenizer, theirs, source)
        assert tokenizer.chat_template == expected
    for teacher, source, reason in (
        (byte_tokenizer(None), "teacher", "no teacher brings a chat template"),
        (None, "teacher", "no teacher brings a chat template"),
        (theirs, str(tmp_path / "none"), "template_from is '.*none', which cannot be read"),
    ):
        with pytest.raises(UserError, match=reason):
            set_template(byte_tokenizer(), teacher, source)


def test_another_template_of_the_teacher_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    for theirs in (byte_tokenizer(), byte_tokenizer(None), byte_tokenizer(TURN + "{# no difference #}")):
        warn_of_other_template(byte_tokenizer(), theirs, {})
    assert not caplog.text
    warn_of_other_template(byte_tokenizer(), byte_tokenizer(TURN.replace("<|stop|>", "<|end|>")), {})
    assert "where the one in use writes 'e brief.<|stop|>\\n<|user|>What" in caplog.text
    assert "the teacher's writes 'e brief.<|end|>\\n<|user|>What" in caplog.text
    assert "template_from: teacher takes its template" in caplog.text


# ------ the token that begins a text


def test_marks_that_the_student_does_not_have_are_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_other_template(byte_tokenizer(), byte_tokenizer(), {})
    assert not caplog.text
    theirs, without_marks = byte_tokenizer("<|mine|>{{ messages[0].content }}"), byte_tokenizer()
    without_marks.chat_template = theirs.chat_template
    warn_of_other_template(without_marks, theirs, {})
    assert "takes the marks of the chat template apart" in caplog.text


def test_a_plain_prompt_begins_as_the_tokenizer_begins_one() -> None:
    row = {"prompt": "ab", "completion": "c"}
    adds, plain = byte_tokenizer(bos=True), byte_tokenizer()
    begins = {
        (tokenizer, add_bos): examples_of(row, tokenizer, add_bos=add_bos)[0].prompt.token_ids[0] == 0
        for tokenizer in (adds, plain)
        for add_bos in ("auto", "always", "never")
    }
    assert list(begins.values()) == [True, True, False, False, True, False]
    assert leading_ids(adds) == [0]
    # The response is no text of its own, and what already begins as it should is left as it is.
    (example,) = examples_of({"prompt": "<bos>ab", "completion": "c"}, adds)
    assert adds.decode([*example.prompt.token_ids, *example.response_ids]) == "<bos>abc<eos>"


def test_a_prompt_that_an_engine_gets_as_text_begins_so_too() -> None:
    tokenizer = byte_tokenizer(bos=True)
    student = tiny_model("llama", vocab=max(tokenizer.get_vocab().values()) + 1)
    rollouts = ReferenceEngine(ModelPair(student, None, tokenizer)).generate(["ab", "<bos>ab"], Student(), Sampling(1))
    assert rollouts[0].prompt.token_ids == rollouts[1].prompt.token_ids
    assert tokenizer.decode(rollouts[0].prompt.token_ids) == "<bos>ab"


def test_a_chat_begins_as_its_template_says() -> None:
    for template, begins in ((TURN, False), ("{{ bos_token }}" + TURN, True)):
        for add_bos in ("auto", "always", "never"):
            (example,) = examples_of({"messages": ONE}, byte_tokenizer(template, bos=True), add_bos=add_bos)
            assert [*example.prompt.token_ids].count(0) == begins


def test_a_begin_of_text_that_is_not_there_is_an_error_for_people() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="add_bos is always, but the tokenizer has no begin-of-text token"):
        examples_of({"prompt": "a", "completion": "b"}, tokenizer, add_bos="always")
    with pytest.raises(UserError, match="add_bos is 'yes'; choose one of auto, always, never"):
        Rendering(add_bos="yes")  # type: ignore[arg-type]


# ------ what is ignored or cut


def test_known_columns_that_are_not_read_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "completion": "b", "tools": [TOOL], "source": "x"}] * 2
    rows += [{"messages": ONE, "chosen": "x", "rejected": None}, {"messages": ONE, "tools": [TOOL]}]
    to_examples(read_rows(rows), byte_tokenizer(), **LIMITS)
    assert [record.getMessage().split(" that is")[0] for record in caplog.records] == [
        "2 of 4 rows have a column 'tools'",
        "1 of 4 rows have a column 'chosen'",
    ]


def test_cut_responses_are_counted_with_the_limits_that_would_keep_them(caplog: pytest.LogCaptureFixture) -> None:
    rows = read_rows([{"prompt": "p", "completion": "x" * length} for length in (10, 20, 60, 100)])
    to_examples(rows, byte_tokenizer(), **LIMITS | {"max_response_tokens": 16})
    assert "3 of 4 responses (75%) are cut, and end without an end-of-text token." in caplog.text
    assert "max_new_tokens 16 keeps 1 of 4; 32 would keep 2, 64 would keep 3, 128 would keep 4." in caplog.text
    caplog.clear()
    to_examples(rows, byte_tokenizer(), **LIMITS | {"max_response_tokens": 101})
    assert not caplog.text


# ------ a model


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "phi3"])
def test_a_model_that_has_learned_a_chat_answers_it_as_served_and_ends(name: str, tmp_path: Path) -> None:
    tokenizer, end = published(name)
    student = tiny_model("llama", vocab=max(tokenizer.get_vocab().values()) + 1)
    pair = ModelPair(student, None, tokenizer)
    options = {"method": "sft", "max_steps": 40, "learning_rate": 1e-2, "max_new_tokens": 64, "split": (1, 1)}
    trainer = make_trainer(tmp_path, pair, [{"messages": ONE}], **options)
    trainer.train()
    served = tokenizer.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(served, add_special_tokens=False)["input_ids"]
    (answer,) = ReferenceEngine(trainer.pair).generate([prompt], Student(), Sampling(64, temperature=0))
    said = tokenizer.decode(answer.token_ids)
    assert said == {"qwen3": "<think>\n\n</think>\n\n"}.get(name, "") + f"Hello!{end}"
    assert answer.finish_reason is FinishReason.END_OF_TEXT
