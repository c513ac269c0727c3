"""Every code block and command of README and site is run with small models, or checked where it cannot be run (pages.py)."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import os
import re
import shutil
import sys
import tomllib
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import pages
from pages import ROOT, Block, blocks_of, commands_in_the_text, commands_of
from runs import save, switchkd, write_rows
from switchkd.cli.main import app
from switchkd.data.sets import DATA_DIR_VARIABLE, SETS
from switchkd.run.file import read_run
from switchkd.study.file import read_study
from tiny import CHAT_TEMPLATE, tiny_pair, tiny_tokenizer

COMMANDS = get_command(app).commands
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages' names lead to small models, short files and a finished run."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    pair = tiny_pair("llama", tokenizer=tokenizer)
    assert pair.teacher is not None
    save(pair.student, tokenizer, folder / "small" / "student")
    save(pair.teacher, tokenizer, folder / "small" / "teacher")
    for names, role in ((pages.STUDENTS, "student"), (pages.TEACHERS, "teacher")):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(folder / "small" / role)
    texts = [(f"one two says w{30 + n}", f"sun w{30 + n} and rain") for n in range(8)]
    for name in pages.DATA:
        write_rows(folder / name, [{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    named = [{"prompt": prompt, "teacher": ("math", "chat")[n % 2]} for n, (prompt, _) in enumerate(texts)]
    write_rows(folder / pages.WITH_TEACHERS, named)
    for name in pages.CHATS:
        roles = ("user", "assistant")
        chats = [[{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in texts]
        write_rows(folder / name, [{"messages": chat} for chat in chats])
    for name in pages.TABLES:
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("question", "answer"), *texts])
    write_sets(folder / "sets", texts)
    (folder / "cluster.yaml").write_text("{gpus: 4, memory: 80GiB, link: nvlink}\n")
    shutil.copytree(ROOT / "studies", folder / "studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(DATA_DIR_VARIABLE, str(folder / "sets"))
        small = {"student": f"{folder}/small/student", "teacher": f"{folder}/small/teacher", "train_data": "a.jsonl"}
        Path("short.yaml").write_text(
            yaml.safe_dump({**small, **pages.SMALLER_RUN, "threshold": 0.3, "output_dir": "runs/run"})
        )
        assert switchkd("train", "short.yaml") == 0
        assert switchkd("eval", "runs/run", "--sets", "dolly", *pages.SMALLER_COMMANDS["eval"]) == 0
    for name in pages.RUNS[1:]:
        shutil.copytree(folder / "runs" / "run", folder / name)
    return folder


def write_sets(folder: Path, texts: list[tuple[str, str]]) -> None:
    """The instruction sets as they lie in SWITCHKD_DATA_DIR, with a few rows each."""
    folder.mkdir()
    rows = "".join(json.dumps({"instruction": prompt, "output": [answer]}) + "\n" for prompt, answer in texts)
    for file in {part.local_file for each in SETS.values() for part in each.parts.values()}:
        (folder / file).write_bytes(gzip.compress(rows.encode()) if file.endswith(".gz") else rows.encode())


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder for one page, to work in."""
    folder = tmp_path / "page"
    shutil.copytree(place, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(folder / "sets"))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


WITH_BLOCKS = [page for page in pages.PAGES if blocks_of(page)]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = set(sys.modules)
    shared: dict[str, object] = {"__name__": "__main__"}
    blocks = blocks_of(page)
    for block in blocks:
        if block.file:
            # A page may show the file after the settings that name it.
            (here / block.file).write_text(block.text)
            # Another test of this process may have imported a module of that name.
            monkeypatch.delitem(sys.modules, Path(block.file).stem, raising=False)
    try:
        for block in blocks:
            run_block(block, shared, monkeypatch)
    finally:
        for name in [name for name in sys.modules.keys() - modules if (here / f"{name}.py").exists()]:
            del sys.modules[name]


def run_block(block: Block, shared: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    match block.language:
        case "console" | "bash" | "sh":
            for command in commands_of(block):
                run_command(command, block, monkeypatch)
        case "python":
            run_python(block, shared)
        case "yaml":
            run_yaml(block)
        case "toml":
            tomllib.loads(block.text)
        case "text":
            assert not block.not_run
        case _:
            pytest.fail(
                f"{block.where}: a block of {block.language or 'no language'}; say console, python, yaml, toml or text"
            )


def run_python(block: Block, shared: dict[str, object]) -> None:
    code = block.text
    for pattern, smaller in pages.SMALLER_PYTHON:
        code = re.sub(pattern, smaller, code)
    if block.file or block.not_run:
        names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert all(find_spec(node.module or "") for node in names if isinstance(node, ast.ImportFrom)), block.where
        return
    exec(compile(code, block.where, "exec"), shared)


def run_yaml(block: Block) -> None:
    """Train a step of a run file, whole or in part; read a study."""
    given: Any = yaml.safe_load(block.text)
    file = Path(f"block-{block.line}.yaml")
    if "methods" in given:
        file.write_text(block.text)
        assert read_study(file).methods, block.where
        return
    whole = {
        "student": "STUDENT",
        **({} if "teachers" in given else {"teacher": "TEACHER"}),
        "train_data": "a.jsonl",
        # A threshold of its own spares a calibration.
        **({} if {"method", "threshold", "policy", "stages"} & given.keys() else {"threshold": 0.3}),
        **given,
        "output_dir": f"runs/{file.stem}",
    }
    file.write_text(yaml.safe_dump({**whole, **pages.SMALLER_RUN}))
    if block.not_run:
        read_run(file).in_stages()
        return
    assert switchkd("train", file) == 0, block.where


def run_command(command: list[str], block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
        name, _, value = command.pop(0).partition("=")
        if value != "...":
            monkeypatch.setenv(name, value)
    program, *arguments = command
    output = None
    if ">" in arguments:
        output = Path(arguments[-1])
        arguments = arguments[: arguments.index(">")]
    match program:
        case "switchkd":
            call(arguments, block, output)
        case "torchrun" | "accelerate":
            # Several processes: what they run is parsed.
            at = arguments.index("switchkd")
            assert arguments[at - 1] == "-m", block.where
            parse(arguments[at + 1 :], block)
        case "python":
            assert (ROOT / arguments[0]).is_file(), f"{block.where}: there is no {arguments[0]}"
        case "make":
            check_target(arguments[0], block.where)
        case "pip":
            check_install(arguments, block)
        case "export":
            assert "=" in arguments[0], block.where
        case _:
            assert block.not_run, f"{block.where}: nothing here runs {program}; say why in a comment above the block"


def call(arguments: list[str], block: Block, output: Path | None) -> None:
    parse(arguments, block)
    if block.not_run or set(pages.SERVES) & set(arguments):
        return
    smaller = list(pages.SMALLER_COMMANDS.get(arguments[0], ()))
    if arguments[0] == "rollout" and "--prompt" in arguments and "--limit" in smaller:
        smaller = smaller[:-2]
    if arguments[0] == "train":
        # The finished run that is there for other pages.
        shutil.rmtree(Path("runs") / Path(arguments[1]).stem, ignore_errors=True)
        if arguments[1].startswith("recipe:"):
            smaller += ["--set", "train_data=chats.jsonl"]
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert switchkd(*arguments, *smaller) == 0, f"{block.where}: {' '.join(arguments)}"
    if output:
        output.write_text(shown.getvalue())


def parse(arguments: list[str], block: Block) -> None:
    """A command whose options all exist and read."""
    if arguments[0].startswith("--"):
        return
    assert arguments[0] in COMMANDS, f"{block.where}: there is no command {arguments[0]}"
    COMMANDS[arguments[0]].make_context(arguments[0], list(arguments[1:]))


def check_target(target: str, where: object) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{where}: make has no target {target}"


def check_install(arguments: list[str], block: Block) -> None:
    """Extras that exist. A package of others is for a block that says why it is not run."""
    for name, extras in re.findall(r"(\.|switchkd|\w+)\[([\w,]+)\]", " ".join(arguments)):
        if name in (".", "switchkd"):
            assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys(), block.where
        else:
            assert block.not_run, block.where


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    for program, *words in commands_in_the_text(page):
        if program == "make":
            for target in words:
                if not re.match(r"-|\d|\w+=", target):
                    check_target(target, page)
            continue
        assert program == "switchkd", f"{page}: nothing is said of what {program} starts"
        if words[0].startswith("--"):
            continue
        assert words[0] in COMMANDS, f"{page}: there is no command {words[0]}"
        known = {name for option in COMMANDS[words[0]].params for name in option.opts} | {"--help", "--debug"}
        policy = {"--threshold", "--keep-top-k", "--policy"}
        given = {word.strip("[]").partition("=")[0] for word in words[1:] if word.strip("[]").startswith("--")}
        assert given <= known | policy, f"{page}: {words[0]} has no {given - known - policy}"


def test_no_command_hides_in_an_indented_block() -> None:
    # A fence says what a block is; four blanks do not.
    programs = r"^ {4,}(?:\S+=\S+ )?(?:switchkd|python|make|pip|torchrun|accelerate) "
    hidden = {
        page.name: re.findall(programs, re.sub(r"(?sm)^ *```.*?^ *```$", "", page.read_text()), re.M)
        for page in pages.PAGES
    }
    assert not {name for name, found in hidden.items() if found}


def test_a_block_that_does_not_work_is_seen(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    for wrong, error in (
        ("```console\nswitchkd methods --nonsense\n```\n", Exception),
        ("```console\nswitchkd methods nonsense\n```\n", AssertionError),
        ("```console\nnonsense\n```\n", AssertionError),
        ("```yaml\nmethod: nonsense\n```\n", AssertionError),
        ("```python\nimport switchkd.nonsense\n```\n", ModuleNotFoundError),
        ("```\nno language\n```\n", pytest.fail.Exception),
    ):
        page.write_text(wrong)
        (block,) = blocks_of(page)
        with pytest.raises(error):
            run_block(block, {}, monkeypatch)
    assert os.environ[DATA_DIR_VARIABLE] == str(here / "sets")
