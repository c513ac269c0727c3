"""The model card: a README.md beside a trained model, as the hub reads it.

Names and values in it come from run files and data, so each is escaped. No folder of this machine is in it, but the last part
of its name, since a card is often the first thing that is published.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from switchkd.data.sets import SETS
from switchkd.data.sources import sources_of
from switchkd.errors import UserError
from switchkd.files import write_atomically
from switchkd.methods.config import SwitchConfig
from switchkd.methods.describe import describe_objective
from switchkd.methods.table import METHOD, METHODS
from switchkd.models.heads import base_of
from switchkd.models.sources import find_source
from switchkd.training.taught import Taught, first_pair, named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from switchkd.evaluation.score import Evaluation, Scores

CARD_FILE = "README.md"
# As the hub calls them.
_KINDS = {"ROUGE-L": "rouge", "exact match": "exact_match"}
_SCORES, _END_OF_SCORES = "<!-- switchkd: scores -->", "<!-- switchkd: end of scores -->"
_NO_SCORES = "Not evaluated yet. `switchkd eval` on this folder puts the scores here."
_PACKAGES = ("switchkd", "torch", "transformers", "accelerate", "datasets", "tokenizers")
# Of transformers' settings, those that decide what was learned.
_INHERITED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
# What changes nothing that is learned: where and how it is computed, what is measured and kept.
TEACHES_NOTHING = (
    "teacher_text", "rollout_rows", "block_size", "compile", "measure_every", "show_rollouts_every", "teacher_offload", "vllm",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs",
)  # fmt: skip
# And paths and addresses of this machine, and keywords that may hold a token.
_NOT_SHOWN = (
    *TEACHES_NOTHING, "template_from", "model_init_kwargs", "teacher_model_init_kwargs", "skip_bad_rows", "save_total_limit",
    "logging_steps", "dataloader_pin_memory", "report_to", "bf16", "plan", "placement", "method",
)  # fmt: skip
_SWITCH_PAPER = """@inproceedings{koo-etal-2025-switch,
  title = {{SWITCH}: Studying with Teacher for Knowledge Distillation of Large Language Models},
  author = {Koo, Jahyun and Hwang, Yerin and Kim, Yongil and Kang, Taegwan and Bae, Hyunkyung and Jung, Kyomin},
  booktitle = {Findings of the Association for Computational Linguistics: NAACL 2025},
  year = {2025},
  pages = {3733--3746},
  doi = {10.18653/v1/2025.findings-naacl.206},
  eprint = {2410.19503},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True)
class Origins:
    """What a model comes from, by the names in a run file: its start, its teacher (or several by name), the data as given, the
    stages' names.
    """

    student: str
    teacher: str | Mapping[str, str | None] | None = None
    data: Any = None
    stages: tuple[str, ...] = ()


def origins_of(taught: Mapping[str, Taught]) -> Origins:
    """What the models say of themselves, and a server of its teacher. The server's address is private and left out."""
    teachers = {
        name: _known_name(pair.teacher) if remote is None else remote.name for name, (pair, remote) in taught.items()
    }
    return Origins(_known_name(first_pair(taught).student) or "", teachers if named(taught) else teachers[""])


def _known_name(model: PreTrainedModel | None) -> str | None:
    return getattr(base_of(model), "name_or_path", "") if model else None


def versions() -> dict[str, str]:
    """The versions of the packages that decide what a run computes."""
    return {package: version(package) for package in _PACKAGES}


def write_card(folder: Path, card: str) -> None:
    """Write a card into a model's folder, whole or not at all."""
    write_atomically(folder / CARD_FILE, card)


def model_card(
    origins: Origins,
    args: SwitchConfig,
    steps: int,
    *,
    is_adapter: bool = False,
    given: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md: metadata of the hub, then what was trained from what, how, and how to load it.

    `given` takes the keywords of `Trainer.create_model_card` (model_name, license, language, tags, dataset, finetuned_from),
    which win over what is known here. The license is left to the owner.
    """
    given = {key: value for key, value in (given or {}).items() if value is not None}
    name = _shown(str(given.get("model_name") or args.hub_model_id or Path(str(args.output_dir)).absolute().name))
    names, on_hub = _data_names(origins.data)
    own_tags = given.get("tags") or []
    data = ModelCardData(
        base_model=given.get("finetuned_from") or (origins.student if _is_on_hub(origins.student) else None),
        datasets=given.get("dataset") or on_hub or None,
        language=given.get("language"),
        license=given.get("license"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["switchkd", "knowledge-distillation", *([own_tags] if isinstance(own_tags, str) else own_tags)],
    )
    text = "\n\n".join(
        [f"# {_plain(name)}", *_body(origins, args, steps, names, args.hub_model_id or name), *_end(args)]
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def _body(origins: Origins, args: SwitchConfig, steps: int, data: Sequence[str], name: str) -> list[str]:
    row = METHOD.make(args.method or "")
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    method = _code(args.method) if isinstance(args.method, str) else "one of its own"
    facts = {
        "base model": _code(_shown(origins.student)) if origins.student else "not named",
        "teacher": _teachers(origins.teacher),
        "method": f"{method}: {_plain(row.summary)} ({_plain(row.source)})",
        "data": ", ".join(map(_code, data)) or "not named",
        "training": f"{steps:,} steps of {rows} sequences, responses of at most {args.max_new_tokens} tokens",
        "objective": _plain(describe_objective(args)),
    }
    facts |= {"stages": ", ".join(map(_code, origins.stages))} if origins.stages else {}
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"name = {json.dumps(name)}  # the folder, or the name on the hub\n"
        "model = AutoModelForCausalLM.from_pretrained(name)\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)"
    )
    return [
        "Distilled with switchkd.",
        table,
        f"## Scores\n\n{_SCORES}\n{_NO_SCORES}\n{_END_OF_SCORES}",
        f"## Use\n\n{_fenced('python', load)}",
        f"## Settings\n\nWhat differs from switchkd's defaults, and how long and how fast it learned:\n\n{_settings(args)}",
    ]


def _teachers(given: str | Mapping[str, str | None] | None) -> str:
    if isinstance(given, Mapping):
        return ", ".join(f"{_plain(name)}: {_teacher(each)}" for name, each in given.items())
    return _teacher(given)


def _teacher(name: str | None) -> str:
    if name == "self":
        return "the student without its adapter"
    return "none" if name is None else _code(_shown(name)) if name else "not named"


def _end(args: SwitchConfig) -> list[str]:
    row = METHOD.make(args.method or "")
    cited = (
        _fenced("bibtex", _SWITCH_PAPER) if row == METHODS["switch"] else _plain(f"The method's source: {row.source}")
    )
    return [
        "## Versions\n\n" + ", ".join(f"{package} {_plain(number)}" for package, number in versions().items()),
        "## License\n\nNot stated here: its owner decides, within the terms of the base model, the teacher and the data.",
        f"## Citation\n\n{cited}",
    ]


def _settings(args: SwitchConfig) -> str:
    values, fields = args.to_dict(), SwitchConfig.__dataclass_fields__
    own = [key for key in vars(SwitchConfig)["__annotations__"] if key not in _NOT_SHOWN]
    shown = {key: values[key] for key in own if key in values and values[key] != fields[key].default}
    shown = {
        "method": args.method_name,
        **shown,
        **{key: values[key] for key in _INHERITED if values.get(key) is not None},
    }
    # Enumerations and paths as text.
    plain = json.loads(json.dumps(shown, default=str))
    return _fenced("yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip())


def with_scores(card: str, evaluation: Evaluation) -> str | None:
    """The card with an evaluation's scores in their place, in its text and in its metadata; None for a card without that place.

    Raises ValueError for metadata that huggingface_hub cannot read.
    """
    place = re.compile(re.escape(_SCORES) + ".*?" + re.escape(_END_OF_SCORES), re.DOTALL)
    if not place.search(card):
        return None
    parsed = ModelCard(card)
    heading = html.unescape(re.sub(r"\\(.)", r"\1", parsed.text.strip().splitlines()[0].removeprefix("# ")))
    table = "\n".join([_SCORES, *_scores(evaluation), _END_OF_SCORES])
    parsed.text = place.sub(lambda _: table, parsed.text, count=1)
    data: Any = parsed.data
    data.model_name = heading
    ours = [
        EvalResult(
            task_type="text-generation",
            dataset_type=SETS[name].hub_name if name in SETS else _shown(name),
            dataset_name=_shown(name),
            metric_type=_KINDS.get(metric, metric),
            metric_name=metric,
            metric_value=round(value, 2),
        )
        for name, result in evaluation.sets.items()
        for metric, value in _named(result.overall.mean).items()
    ]
    # What its owner measured elsewhere stays; what we wrote before does not.
    names = {*_KINDS, *(each.metric_name for each in ours)}
    data.eval_results = [each for each in data.eval_results or [] if each.metric_name not in names] + ours
    return str(parsed)


def _scores(evaluation: Evaluation) -> list[str]:
    sampling = evaluation.sampling
    drawn = "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    summaries = {name: result.overall for name, result in evaluation.sets.items()}
    metrics = list(dict.fromkeys(metric for summary in summaries.values() for metric in _named(summary.mean)))
    lines = [f"| {' | '.join(['set', 'rows', *map(_plain, metrics)])} |", "|---" * (2 + len(metrics)) + "|"]
    for name, summary in summaries.items():
        means, spread = _named(summary.mean), _named(summary.deviation) if summary.deviation else {}
        cells = [
            f"{means[m]:.2f}" + (f" ± {spread[m]:.2f}" if m in spread else "") if m in means else "-" for m in metrics
        ]
        lines.append(f"| {' | '.join([_code(_shown(name)), str(summary.rows), *cells])} |")
    return [
        *lines,
        "",
        f"ROUGE-L and exact match go from 0 to 100; mean ± deviation over {len(evaluation.seeds)} sampling seed(s); {drawn}, at "
        f"most {sampling.max_new_tokens} new tokens; {evaluation.date[:10]}, switchkd {version('switchkd')}.",
    ]


def _named(scores: Scores) -> dict[str, float]:
    """The scores of answers by the names that a reader knows; what could not be scored is left out."""
    named = {"ROUGE-L": scores.rouge_l, "exact match": scores.exact_match, **scores.own}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def _data_names(data: Any) -> tuple[list[str], list[str]]:
    """The sources as a card may name them, and those among them that are on the hub."""
    names, on_hub = [], []
    for source in sources_of(data) if data else []:
        names.append(":".join(part for part in (_shown(source.path), source.name, source.split) if part))
        hub_name = SETS[source.path].hub_name if source.path in SETS else source.path
        if "/" in hub_name and not Path(hub_name).exists() and _is_repository(hub_name):
            on_hub.append(hub_name)
    return names, list(dict.fromkeys(on_hub))


def _is_on_hub(name: str) -> bool:
    """Whether a model's name is a hub id; it is not looked up."""
    try:
        return bool(name) and find_source(name).on_hub and _is_repository(name)
    except UserError:
        return False


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _shown(name: str) -> str:
    """A name without the folders of this machine."""
    if _is_on_hub(name):
        return name
    path = Path(name).expanduser()
    is_place = path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1
    return path.absolute().name if is_place else name


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _plain(text: str) -> str:
    """Text that is neither HTML nor Markdown."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(_printable(text), quote=False))


def _code(text: str) -> str:
    """Text as inline code, in a table too, whatever it holds."""
    shown = _printable(text).replace("|", "\\|")
    marks = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    return f"{marks} {shown} {marks}" if "`" in shown else f"{marks}{shown}{marks}"


def _fenced(language: str, text: str) -> str:
    marks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{marks}{language}\n{text}\n{marks}"
