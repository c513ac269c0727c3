"""What vLLM was started with, told before the first step: its room, its ids, and the sizes of its two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from switchkd.errors import UserError
from switchkd.models.heads import base_of
from switchkd.models.pair import ModelPair, name_of
from switchkd.settings.typed import typed

# Enough to tell two models of one family apart. Not the family: vLLM has names of its own for some.
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Started:
    """The longest prompt and response together, in tokens, the number of ids, and by role what `sizes_of` says of the models."""

    max_tokens: int
    vocabulary_size: int
    models: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """The mapping that `started_of` reads."""
        return asdict(self)

    def check_models(self, pair: ModelPair) -> None:
        """Raise UserError where vLLM has other models than the pair."""
        remedy = "start vLLM with the models of the run"
        for role, model in pair.models.items():
            ours, theirs = sizes_of(base_of(model).config), self.models.get(role, {})
            if any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
                raise UserError(
                    f"the {role} here, {name_of(model)}, has {_in_words(ours)}, but that of vLLM {_in_words(theirs)}; {remedy}"
                )
        if pair.vocabulary_size > self.vocabulary_size:
            raise UserError(
                f"student and teacher here share {pair.vocabulary_size} ids, but those of vLLM {self.vocabulary_size}; {remedy}"
            )


def started_of(given: Mapping[str, Any]) -> Started | None:
    """What a server says of itself; None of an older one, which says nothing. Raises UserError for what is none."""
    if "max_tokens" not in given:
        return None
    hints = {"max_tokens": int, "vocabulary_size": int, "models": dict[str, dict[str, int]]}
    return Started(**{key: typed(f"the server's {key}", given.get(key), hint) for key, hint in hints.items()})


def sizes_of(config: Any) -> dict[str, int]:
    """Those sizes of a model that its configuration names."""
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def check_lengths(max_tokens: int, longest: int, shortest_prompt: int, prompt: str = "a prompt") -> None:
    """Raise UserError for texts that vLLM, started with `max_tokens`, cannot write; `longest` is a prompt and its response.

    `prompt` names what is too long or too short in the message.
    """
    if shortest_prompt < 2:
        raise UserError(
            f"{prompt} is one token long, and vLLM drafts from a prompt's second token on; begin prompts with a "
            f"begin-of-text token (add_bos: always)"
        )
    if longest > max_tokens:
        raise UserError(
            f"{prompt} and its response come to {longest} tokens, and vLLM takes {max_tokens}; start it with a larger max_tokens, "
            f"or lower max_new_tokens or max_prompt_tokens"
        )


def _in_words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {sizes[name]}" for name in _SIZES if name in sizes)
