"""Responses that the teacher writes once, kept in a file: the data of sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import name_of
from switchkd.progress import progress_bar
from switchkd.records import Example, Prompt
from switchkd.rollout.engine import Engine, Progress
from switchkd.rollout.law import Teacher
from switchkd.training.shared_teacher import let_others_read
from switchkd.training.whole_student import whole

# Numbers of each weight tensor that go into the teacher's fingerprint: enough to tell one training from another.
_NUMBERS = 64
# Batches between two writes to the file. A crash loses at most this many. Each write waits for the longest row of its call, so
# fewer batches would leave the other rows idle for longer.
_FILLINGS = 8

_REMEDY = "delete it to have it written again"

# One line of the file.
Line = dict[str, Any]


def teacher_text(
    path: Path,
    teachers: Mapping[str, PreTrainedModel],
    examples: Sequence[Example],
    engine: Engine,
    args: SwitchConfig,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Example], float]:
    """The examples with the responses of the teacher, or of the one that each names: read from `path`, or written there first.

    And the seconds, by the clock, that earlier attempts of this run have spent on them.

    The file has one JSON line a prompt with `prompt_id`, `prompt_ids` and `response_ids`. The manifest beside it, written last,
    says what the text depends on. All processes write, in rounds, each its share of the prompts. After each round the main one,
    which alone needs the files, adds the lines to a partial file: a run that was cut off goes on from there.
    Raises UserError for text that depends on anything else, naming it, for a file that was changed, and where a process fails.
    """
    partial = path.with_name(f"{path.stem}.partial.jsonl")
    manifest = _manifest_of(teachers, examples, args)
    lines = _in_main(_lines_there, path, partial, manifest)
    # Text that was written for another run cost this one nothing.
    is_own = path.parent.resolve() == Path(str(args.output_dir)).resolve()
    earlier = sum(line.get("seconds", 0.0) for line in lines) if is_own else 0.0
    written = {line["prompt_id"] for line in lines}
    if left := [example.prompt for example in examples if example.prompt.prompt_id not in written]:
        lines += _write(partial, left, engine, args, clock)
    seconds = sum(line.pop("seconds", 0.0) for line in lines)
    by_id = {line["prompt_id"]: line for line in lines}
    ordered = [by_id[example.prompt.prompt_id] for example in examples]
    _in_main(_finish, path, partial, manifest | {"seconds": seconds}, ordered)
    texts = [
        replace(example, response_ids=tuple(line["response_ids"]))
        for example, line in zip(examples, ordered, strict=True)
    ]
    return texts, earlier


def _in_all(make: Callable[..., list[Line]], *given: Any) -> list[Line]:
    """The lines that all processes make. Where one fails, all do: none waits for another that is gone."""
    made: list[Line] = []
    failure = None
    try:
        made = make(*given)
    except Exception as error:
        # Whatever it is, the others must hear of it.
        failure = error
    let_others_read()
    parts = gather_object([(made, None if failure is None else f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    for process, (_, reason) in enumerate(parts):
        if reason is not None:
            raise UserError(
                f"process {process} could not write the teacher's text ({reason}); start the run again to go on"
            )
    return [line for part, _ in parts for line in part]


def _in_main(make: Callable[..., list[Line]], *given: Any) -> list[Line]:
    """The lines that the main process makes, in all processes."""
    return _in_all(make if PartialState().is_main_process else lambda *_: [], *given)


def _write(
    partial: Path, prompts: Sequence[Prompt], engine: Engine, args: SwitchConfig, clock: Callable[[], float]
) -> list[Line]:
    """The teacher's responses to the prompts, which the main process adds to the partial file as they come.

    The last line of a round has the seconds that it took.
    """
    process, processes = PartialState().process_index, PartialState().num_processes
    size = _FILLINGS * args.rollout_rows * processes
    lines: list[Line] = []
    # Its own prompts stand for those of all processes.
    with progress_bar(Console(stderr=True), None if process == 0 else False) as progress:
        task = progress.add_task("the teacher writes", total=len(prompts[::processes]))
        for start in range(0, len(prompts), size):
            share = prompts[start : start + size][process::processes]
            # One round a collective: these give up on a process that is silent for longer than a timeout.
            began = clock()
            made = _in_all(_responses, share, engine, args, progress.counter(task))
            made[-1] |= {"seconds": clock() - began}
            _in_main(_append, partial, made)
            lines += made
    return lines


def _responses(prompts: Sequence[Prompt], engine: Engine, args: SwitchConfig, on_progress: Progress) -> list[Line]:
    if not prompts:
        return []
    made = engine.generate(prompts, policy=Teacher(), sampling=args.sampling, seed=args.seed, on_progress=on_progress)
    return [
        {"prompt_id": r.prompt.prompt_id, "prompt_ids": list(r.prompt.token_ids), "response_ids": list(r.token_ids)}
        for r in made
    ]


def _manifest_of(
    teachers: Mapping[str, PreTrainedModel], examples: Sequence[Example], args: SwitchConfig
) -> dict[str, Any]:
    """All that the teachers' text depends on, as JSON values."""
    # The student is left out: its drafts decide which sample of the teacher's distribution is drawn, not the distribution.
    weights = hashlib.sha256()
    for teacher in teachers.values():
        for name, parameter in teacher.named_parameters():
            if parameter.device.type != "meta":
                numbers = whole(parameter.detach()).flatten()[:_NUMBERS].cpu().double().tolist()
                weights.update(f"{name} {tuple(parameter.shape)} {numbers}".encode())
    named = [(e.prompt.prompt_id, e.prompt.token_ids, *filter(None, [e.prompt.teacher])) for e in examples]
    prompts = json.dumps(named)
    return {
        "teacher": ", ".join(f"{name}: {name_of(each)}" if name else name_of(each) for name, each in teachers.items()),
        "weights": weights.hexdigest(),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "sampling": asdict(args.sampling),
        "seed": args.seed,
    }


def _manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def _lines_there(path: Path, partial: Path, manifest: dict[str, Any]) -> list[Line]:
    """The lines of the finished file, or of the partial one, whose first line is the manifest; without either it is begun."""
    if (found := _manifest_there(path, manifest)) is not None:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{"seconds": found.get("seconds", 0.0), **lines[0]}, *lines[1:]]
    if not partial.is_file():
        write_atomically(partial, json.dumps(manifest) + "\n")
        return []
    try:
        text = partial.read_bytes()
        # What follows the last whole line was cut off by a crash, and the next line must not be joined to it.
        os.truncate(partial, whole := text.rfind(b"\n") + 1)
        begun_with, *lines = map(json.loads, text[:whole].splitlines())
    except (OSError, ValueError) as error:
        raise UserError(f"the teacher's text in {partial} cannot be read ({error}); {_REMEDY}") from error
    _check_same(partial, begun_with, manifest)
    return lines


def _append(partial: Path, lines: Sequence[Line]) -> list[Line]:
    with partial.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    return []


def _finish(path: Path, partial: Path, manifest: dict[str, Any], lines: Sequence[Line]) -> list[Line]:
    """Write the file in the order of the examples, then its manifest; nothing where that was done before."""
    if partial.is_file():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        write_atomically(path, text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(_manifest_path(path), json.dumps({**manifest, "sha256": digest}, indent=2) + "\n")
        partial.unlink()
    return []


def _manifest_there(path: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished text, or None if no text is finished. Raises UserError for a text that does not fit."""
    try:
        found = json.loads(_manifest_path(path).read_text(encoding="utf-8"))
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"the teacher's text in {path} cannot be read ({error}); {_REMEDY}") from error
    _check_same(path, found, manifest)
    if found["sha256"] != hashlib.sha256(text).hexdigest():
        raise UserError(f"the teacher's text in {path} was changed after it was written; {_REMEDY}")
    return dict(found)


def _check_same(path: Path, found: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise UserError that names the first difference."""
    for key, value in manifest.items():
        if found.get(key) != value:
            raise UserError(
                f"the teacher's text in {path} was made with other {key} ({found.get(key)}, now {value}); {_REMEDY}, or set "
                f"teacher_text to another file"
            )
