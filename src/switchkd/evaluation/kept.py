"""What an evaluation finds in its folder: the scores of other sets stay, and those of another evaluation are not written over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from switchkd.data.examples import Rendering
from switchkd.data.faults import BadRow
from switchkd.errors import UserError
from switchkd.evaluation.score import RESULT_FILE, Evaluation, EvaluationSettings, Scores, SetResult, Summary
from switchkd.records import Sampling

_REMEDY = "give another --output, or --force to replace what is there"


def sets_that_stay(
    folder: Path, model: str, settings: EvaluationSettings, limit: int | None, *, force: bool
) -> dict[str, SetResult]:
    """The sets of the folder's eval.json that stay beside those that this evaluation adds or repeats.

    None do where it was another evaluation (model, settings, limit) and `force` is given; without it, that raises UserError.
    """
    path = folder / RESULT_FILE
    try:
        earlier = read_evaluation(path) if path.is_file() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if force:
            return {}
        raise UserError(
            f"{path} is no evaluation that can be read ({type(error).__name__}: {error}); {_REMEDY}"
        ) from None
    if earlier is None:
        return {}
    own = next((sorted(each.overall.mean.own) for each in earlier.sets.values()), [])
    then, now = asdict(earlier.sampling), asdict(settings.sampling)
    pairs: dict[str, tuple[Any, Any]] = {
        **{key: (then[key], now[key]) for key in then},
        "seeds": (list(earlier.seeds), list(settings.used_seeds)),
        "limit": (earlier.limit, limit),
        "max_prompt_tokens": (earlier.max_prompt_tokens, settings.max_prompt_tokens),
        "match": (earlier.match, settings.match),
        "chat_template_kwargs": (earlier.rendering.template_kwargs, settings.rendering.template_kwargs),
        "add_bos": (earlier.rendering.add_bos, settings.rendering.add_bos),
        "eval_scores": (own, sorted(score.name for score in settings.scores)),
    }
    if not _is_same_model(earlier.model, model, folder):
        pairs["model"] = earlier.model, model
    differing = [
        f"{name} was {_word(one)} and is {_word(other)} now" for name, (one, other) in pairs.items() if one != other
    ]
    if _written(Path(model)) > datetime.fromisoformat(earlier.date).timestamp():
        differing.append(f"the model was written after it, which is of {earlier.date}")
    if differing and not force:
        raise UserError(f"{path} holds another evaluation ({'; '.join(differing)}); {_REMEDY}")
    return {} if differing else earlier.sets


def _word(value: Any) -> Any:
    return "none" if value is None else value


def _written(model: Path) -> float:
    """When the newest weights of a model's folder were written, in seconds since 1970; 0 where it is no folder of weights."""
    return max((path.stat().st_mtime for path in model.glob("*.safetensors")), default=0.0) if model.is_dir() else 0.0


def _is_same_model(ours: str, theirs: str, folder: Path) -> bool:
    # A folder can be named in several ways, and what lies inside a model's folder is about that model.
    same = ours == theirs or Path(ours).resolve() == Path(theirs).resolve()
    return same or Path(theirs).resolve() in folder.resolve().parents


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation that an eval.json holds. Raises OSError, ValueError, TypeError, KeyError or AttributeError for others."""
    values: Any = json.loads(path.read_text(encoding="utf-8"))
    rendering: dict[str, Any] = values.get("rendering", {})
    return Evaluation(
        values["model"],
        values["date"],
        Sampling(**values["sampling"]),
        tuple(values["seeds"]),
        values["max_prompt_tokens"],
        {name: _set_result(each) for name, each in values["sets"].items()},
        # Files of earlier versions say less.
        values.get("match", "text"),
        Rendering(**{**rendering, "teachers": tuple(rendering.get("teachers", ()))}),
        values.get("limit"),
    )


def _set_result(values: Mapping[str, Any]) -> SetResult:
    buckets = {name: _summary(each) for name, each in values["by_bucket"].items()}
    return SetResult(_summary(values["overall"]), buckets, [BadRow(**each) for each in values["skipped"]])


def _summary(values: Mapping[str, Any]) -> Summary:
    deviation = values["deviation"]
    per_seed = {int(seed): _scores(each) for seed, each in values["per_seed"].items()}
    return Summary(values["rows"], _scores(values["mean"]), None if deviation is None else _scores(deviation), per_seed)


def _scores(values: Mapping[str, Any]) -> Scores:
    flat = {**{key: value for key, value in values.items() if key != "own"}, **values.get("own", {})}
    # Where there was no number, JSON has null.
    return Scores.of_flat({key: math.nan if value is None else float(value) for key, value in flat.items()})
