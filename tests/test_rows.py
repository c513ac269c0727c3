import gzip
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from switchkd.data.examples import to_examples
from switchkd.data.rows import SourceRow, read_rows
from switchkd.data.shapes import row_text
from switchkd.errors import UserError

CHAT_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
LIMITS = {"max_prompt_tokens": 400, "max_response_tokens": 50, "need_response": True}


def make_tokenizer(chat_template=CHAT_TEMPLATE):
    """A token for each byte and one for "bc"; padding and end-of-text are the same id."""
    symbols = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "bc"]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
    made.chat_template = chat_template
    return made


TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id


def examples_of(*rows, **limits):
    return to_examples(read_rows(list(rows)), TOKENIZER, **(LIMITS | limits)).examples


def decoded(example):
    return TOKENIZER.decode(example.prompt.token_ids), TOKENIZER.decode(example.response_ids)


# ------ sources

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "\u00e9\u2028", "completion": "d\n"}]


def write(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    rows = read_rows(write(tmp_path / name, ROWS))
    assert [row.columns for row in rows] == ROWS
    assert [row.index for row in rows] == [0, 1]
    assert all(name in row.where for row in rows)


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
def test_rows_in_memory(make):
    rows = read_rows(make(ROWS))
    assert [(row.columns, row.where) for row in rows] == [(ROWS[0], "row 0"), (ROWS[1], "row 1")]


def test_columns_that_arrow_fills_with_none_do_not_count():
    rows = read_rows(datasets.Dataset.from_list([{"prompt": "a", "messages": None}]))
    assert rows[0].columns == {"prompt": "a"}


def test_a_line_that_is_not_json_is_a_bad_row_with_its_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n{"prompt": \n"text"\n\xff\xfe{}\n')
    rows = read_rows(path)
    assert [row.index for row in rows] == [0, 1, 2, 3]
    with pytest.raises(UserError) as caught:
        to_examples(rows, TOKENIZER, **LIMITS)
    message = str(caught.value)
    assert f"2 rows: not JSON (first: {path}:3)" in message
    assert f"{path}:4: no object with columns: str 'text'" in message
    assert "3 of 4 rows" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.jsonl", None, "there is no file"),
        ("d.jsonl.gz", b"not gzip", "cannot be read as .jsonl.gz"),
        ("d.json", b'{"prompt": "a"}', "not a list of objects"),
        ("d.json", b"[", "cannot be read as .json"),
        ("d.parquet", b"PAR", "cannot be read as .parquet"),
        # Else the open quote would swallow the rows after it.
        ("d.csv", b'prompt,completion\nq1,a1\nq2,"a2\nq3,a3\n', "cannot be read as .csv: unexpected end of data"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_rows(tmp_path / name)


def test_any_other_name_goes_to_datasets_with_its_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or ROWS)
    rows = read_rows("owner/name", "validation")
    assert asked == [(("owner/name",), {"split": "validation"})]
    assert rows[1].where == "owner/name validation, row 1"


def test_a_folder_without_data_is_an_error_for_people(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded as a data set"):
        read_rows(str(tmp_path))


# ------ shapes


def test_alpaca_without_input():
    (row,) = read_rows([{"instruction": "Name a bird.", "input": "", "output": "A wren."}])
    assert row_text(row).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a bird.\n\n### Response:\n"
    )
    assert row_text(row).references == ("A wren.",)


def test_alpaca_with_input_whose_braces_stay():
    (row,) = read_rows([{"instruction": "Sum {input}.", "input": "{1} + {2}", "output": ["3", "three"]}])
    assert row_text(row).prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum {input}.\n\n### Input:\n{1} + {2}"
        "\n\n### Response:\n"
    )
    assert row_text(row).references == ("3", "three")


def test_the_first_reference_is_trained_on():
    (example,) = examples_of({"instruction": "x", "output": ["first", "second"]})
    assert decoded(example)[1] == "first<|end|>"


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hm"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.mark.parametrize(
    "row", [{"messages": CHAT}, {"prompt": CHAT[:3], "completion": CHAT[3:]}], ids=["messages", "prompt/completion"]
)
def test_a_chat_ends_with_the_token_of_its_template(row):
    prompt, response = decoded(*examples_of(row))
    assert (
        prompt == "<|turn|>user:hi<|stop|>\n<|turn|>assistant:hm<|stop|>\n<|turn|>user:so?<|stop|>\n<|turn|>assistant:"
    )
    assert response == "yes<|stop|>"


def test_a_chat_template_without_a_special_token_ends_with_end_of_text():
    plain = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    loaded = to_examples(read_rows([{"messages": CHAT}]), plain, **LIMITS)
    assert plain.decode(loaded.examples[0].response_ids) == "yes<|end|>"


def test_a_chat_that_ends_with_the_user_is_a_prompt_alone():
    (example,) = examples_of({"messages": CHAT[:3]}, need_response=False)
    assert decoded(example)[0].endswith("so?<|stop|>\n<|turn|>assistant:")
    assert example.response_ids == ()


def test_chat_without_a_chat_template_is_an_error_for_people():
    with pytest.raises(UserError, match="no chat template"):
        to_examples(read_rows([{"messages": CHAT}]), make_tokenizer(chat_template=None), **LIMITS)


def test_a_row_with_an_answer_in_another_shape_than_its_prompt_column():
    (example,) = examples_of({"prompt": "ready-made", "instruction": "x", "output": "y", "source": "z"})
    assert "### Instruction:\nx" in decoded(example)[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " \n", "completion": "b"}, "empty prompt"),
        ({"messages": CHAT[-1:]}, "empty prompt"),
        ({"messages": []}, "messages is an empty list"),
        ({"instruction": "", "output": "b"}, "empty instruction"),
        ({"prompt": 3, "completion": "b"}, "prompt is int '3', not text"),
        ({"prompt": "hi \ud83d", "completion": "b"}, "prompt holds half of a character"),
        ({"instruction": "a", "output": ["b", 3]}, "output is int '3', not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [{"from": "user"}]}, "not a message with role and content"),
        ({"prompt": "a", "completion": CHAT[:1]}, "completion has to be one assistant message"),
        ({"prompt": "a", "completion": [CHAT[1], CHAT[3]]}, "completion has to be one assistant message"),
        ({"prompt": "a"}, "no response in the columns prompt"),
        ({"prompt": "a", "completion": " "}, "no response"),
        ({"instruction": "a", "output": []}, "no response"),
        ({"question": "a", "answer": "b"}, "no prompt in the columns question, answer"),
        ({"instruction": "a", "inputs": "b", "output": "c"}, "unknown column 'inputs'; did you mean 'input'?"),
        ({"prompt": "a" * 401, "completion": "b"}, "the prompt has 401 tokens; max_prompt_tokens is 400"),
        ({}, "no prompt in the columns (none)"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(row, reason):
    with pytest.raises(UserError) as caught:
        examples_of(row)
    line = str(caught.value).splitlines()[1]
    assert line.startswith("  row 0: ")
    assert reason in line


def test_a_template_that_refuses_a_chat_makes_a_bad_row():
    picky = make_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}hi"
    )
    with pytest.raises(UserError, match="row 0: the chat template cannot write it: no system role"):
        to_examples(read_rows([{"messages": [{"role": "system", "content": "s"}, *CHAT]}]), picky, **LIMITS)


# ------ bad rows together


def test_equal_faults_are_one_line_and_twenty_faults_are_shown():
    rows = [{"prompt": "a", "completion": "b"}] + [{"prompt": "a" * (500 + n), "completion": "b"} for n in range(13)]
    rows += [{"text": "a"}] * 13 + [{f"column{n}": "a"} for n in range(20)]
    with pytest.raises(UserError) as caught:
        examples_of(*rows)
    lines = str(caught.value).splitlines()
    assert lines[0] == "46 of 47 rows cannot be used:"
    assert lines[1] == "  13 rows: the prompt has more than max_prompt_tokens (400) (first: row 1)"
    assert lines[2] == "  13 rows: no prompt in the columns text (first: row 14)"
    assert lines[3] == "  row 27: no prompt in the columns column0"
    assert lines[21] == "  and 2 other faults"
    assert lines[22] == "max_prompt_tokens 400 keeps 1 of 14; 512 would keep 14."
    assert "skip_bad_rows" in lines[23]


def test_skipped_rows_are_named_and_move_no_prompt_id(caplog):
    rows = read_rows([{"prompt": "a", "completion": "b"}, {"text": "x"}, {"prompt": "c", "completion": "d"}])
    loaded = to_examples(rows, TOKENIZER, **LIMITS, skip_bad_rows=True)
    assert [example.prompt.prompt_id for example in loaded.examples] == [0, 2]
    assert [(bad.index, bad.where) for bad in loaded.skipped] == [(1, "row 1")]
    assert "1 of 3 rows" in caplog.text
    assert "row 1: no prompt" in caplog.text


@pytest.mark.parametrize(("rows", "expected"), [([], "no rows"), ([{"text": "a"}], "No row is left")])
def test_no_row_to_use_is_an_error_even_when_skipping(rows, expected):
    with pytest.raises(UserError, match=expected):
        examples_of(*rows, skip_bad_rows=True)


def test_a_row_that_cannot_be_read_has_no_text():
    with pytest.raises(UserError, match="there:7: broken"):
        row_text(SourceRow({}, 6, "there:7", "broken"))


# ------ token ids


def test_a_long_response_is_cut_and_then_has_no_end_token():
    ends = [examples_of({"prompt": "p", "completion": "x" * n})[0].response_ids for n in (49, 50, 51)]
    assert [len(ids) for ids in ends] == [50, 50, 50]
    assert [ids[-1] == END for ids in ends] == [True, False, False]


def test_prompts_alone_need_no_response():
    assert [decoded(example) for example in examples_of({"prompt": "p"}, need_response=False)] == [("p", "")]


def test_a_token_that_spans_the_seam_is_split_there():
    (joined,) = TOKENIZER("abc", add_special_tokens=False)["input_ids"][1:]
    (example,) = examples_of({"prompt": "ab", "completion": "cd"})
    assert joined not in example.prompt.token_ids + example.response_ids
    assert decoded(example) == ("ab", "cd<|end|>")


def test_a_tokenizer_that_adds_a_token_before_the_response_has_its_tail_taken():
    # Metaspace puts a blank before a text of its own, so a response that is tokenized alone is not the tail.
    symbols = ["<|end|>", "\u2581", "a", "b"]
    plain = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>")
    loaded = to_examples(read_rows([{"prompt": "a", "completion": "b"}]), tokenizer, **LIMITS)
    assert loaded.examples[0].response_ids == (3, 0)


def test_a_tokenizer_without_an_end_token_is_an_error_for_people():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, merges=[])))
    with pytest.raises(UserError, match="no end-of-text token"):
        to_examples(read_rows(ROWS), plain, **LIMITS)


# Control characters are left out: the tokenizer's own special strings cannot come up without "<|".
texts = st.text(st.sampled_from("abc \n.é😀{}"), min_size=1, max_size=20).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_prompt_and_response_ids_say_what_the_row_says(pairs):
    rows = read_rows([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    options = LIMITS | {"max_response_tokens": 100}
    together = to_examples(rows, TOKENIZER, **options).examples
    assert [decoded(example) for example in together] == [(p, c + "<|end|>") for p, c in pairs]
    assert list(together) == [to_examples([row], TOKENIZER, **options).examples[0] for row in rows]
