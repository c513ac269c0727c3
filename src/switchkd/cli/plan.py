"""`switchkd plan`: memory, time and the best split on a cluster, before anything is loaded or paid for."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from switchkd.cli.help import option
from switchkd.cli.options import new_console, quiet_transformers, with_options
from switchkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from switchkd.scale.cost import Cluster

# What stands in docs/scale.md, and what `switchkd plan` shows without models.
PAIRS = (
    ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"),
    ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-32B"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"),
)
_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CLUSTER = "The cluster"
_STEP = "A step"


@dataclass(frozen=True)
class PlanOptions:
    """The cluster and the step that are planned for; see `with_options`."""

    gpus: Annotated[int | None, option(_CLUSTER, "N", "GPUs, one process each; by default 8.", min=1)] = None
    memory: Annotated[str | None, option(_CLUSTER, "SIZE", "Memory of each; by default 80GiB.")] = None
    link: Annotated[str | None, option(_CLUSTER, "LINK", "Between GPUs: nvlink, pcie, or GB/s; by default nvlink.")] = (
        None
    )
    cluster: Annotated[
        Path | None, option(_CLUSTER, "FILE", "A YAML file with these and: tera_flops, bandwidth, host_link.")
    ] = None
    texts: Annotated[int, option(_STEP, "N", "Texts of an optimizer step, over all GPUs.", min=1)] = 64
    rollout_steps: Annotated[int, option(_STEP, "N", "Steps whose text is written at once.", min=1)] = 1
    max_prompt_tokens: Annotated[int, option(_STEP, "N", "Longest prompt, in tokens.", min=1)] = 256
    max_new_tokens: Annotated[int, option(_STEP, "N", "Longest response, in tokens.", min=1)] = 256

    def read_cluster(self) -> Cluster:
        """The cluster of the file, with what the options say over it. Raises UserError for what it cannot be."""
        given = {"gpus": self.gpus, "memory": self.memory, "link": self.link}
        return _cluster(self.cluster, {key: value for key, value in given.items() if value is not None})


@with_options
def plan(
    options: PlanOptions,
    student: Annotated[
        str | None,
        typer.Argument(metavar="STUDENT", help="Hub id, folder or config.json; without models, three pairs."),
    ] = None,
    teacher: Annotated[str | None, typer.Argument(metavar="TEACHER", help="As STUDENT.")] = None,
    as_json: Annotated[bool, option(None, "", "Print JSON, with bytes and seconds by part.", "--json")] = False,
) -> None:
    """Say what a run takes on a cluster: memory by part, time a step, the best split, and what does not fit.

    Only configurations are read; no weight is loaded. The formulas and their checked error are in docs/scale.md.
    """
    from switchkd.report.plan_page import pairs_table, plan_page
    from switchkd.scale.cost import Clock
    from switchkd.scale.memory import Bytes
    from switchkd.scale.plan import Job
    from switchkd.scale.plan import plan as planned
    from switchkd.scale.sizes import size_of

    quiet_transformers()
    if student is not None and teacher is None:
        raise UserError(
            f"a plan needs a student and a teacher, but only {student!r} is given; name the teacher after it"
        )
    clock = Clock(options.read_cluster(), Bytes())
    job = Job(options.texts, options.max_prompt_tokens, options.max_new_tokens, options.rollout_steps)
    found = []
    for names in PAIRS if student is None or teacher is None else ((student, teacher),):
        sizes = size_of(names[0]), size_of(names[1])
        found.append((*sizes, planned(*sizes, job, clock)))
    if as_json:
        listed = [
            {"student": s.name, "teacher": t.name, "options": [each.as_json() for each in o]} for s, t, o in found
        ]
        typer.echo(json.dumps(listed, indent=2))
    elif len(found) > 1:
        new_console().print(pairs_table(found))
    else:
        new_console().print(plan_page(*found[0], job, clock))


def _cluster(path: Path | None, given: dict[str, Any]) -> Cluster:
    from switchkd.scale.cost import Cluster

    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--cluster {path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"--cluster {path} holds no mapping; write gpus: 8, memory: 80GiB, link: nvlink")
    known = {each.name for each in fields(Cluster)}
    for key in values:
        if key not in known:
            raise UserError(f"--cluster has a key {key!r}, which is none of a cluster{did_you_mean(str(key), known)}")
    values |= given
    values |= {"memory": size_in_bytes(values["memory"])} if "memory" in values else {}
    values |= {"link": _link(values["link"])} if "link" in values else {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{key} of the cluster is {value!r}; give a number above 0")
    if not isinstance(gpus := values.get("gpus", 1), int):
        raise UserError(f"gpus of the cluster is {gpus!r}; give a whole number")
    return Cluster(**values)


def size_in_bytes(text: str | int) -> int:
    """The bytes that "80GiB" or "24 GB" means. Raises UserError where it cannot be read."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)", str(text).strip())
    if found is None or found[2].upper() not in _UNITS:
        raise UserError(f"memory is {text!r}; write a size such as 80GiB or 24GB")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < _UNITS["MIB"]:
        raise UserError(f"memory is {text!r}, which is {size:,} bytes; write a size with its unit, such as 80GiB")
    return size


def _link(text: Any) -> float:
    from switchkd.scale.cost import LINKS

    try:
        return LINKS[text] if isinstance(text, str) and text in LINKS else float(text)
    except (TypeError, ValueError):
        raise UserError(f"link is {text!r}; choose {' or '.join(LINKS)}, or give GB/s") from None
