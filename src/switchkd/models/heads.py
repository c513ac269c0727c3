"""A model's head apart from the model, so that logits can be made from hidden states in chunks.

Shape letters: B rows, T positions, V vocabulary, H hidden, N any number of leading positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from switchkd.errors import UserError

# What a family does to its logits after the projection, in order of application, by the config attribute that sets it:
# Cohere, Granite, Falcon-H1, Muse; then Gemma, RecurrentGemma. A new family is a row.
LOGIT_TRANSFORMS: tuple[tuple[str, Callable[[Tensor, float], Tensor]], ...] = (
    ("logit_scale", lambda logits, scale: logits * scale),
    ("logits_scaling", lambda logits, divisor: logits / divisor),
    ("lm_head_multiplier", lambda logits, scale: logits * scale),
    ("output_multiplier", lambda logits, scale: logits * scale),
    ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),
    ("logits_soft_cap", lambda logits, cap: torch.tanh(logits / cap) * cap),
)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    # PEFT is optional, so its classes cannot be imported here.
    unwrap = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if unwrap is None else unwrap())


def backbone(model: nn.Module) -> nn.Module:
    """All of a causal LM but its head: the module whose `last_hidden_state` the head projects."""
    # A PEFT wrapper passes the call on; a teacher that is its student without the adapter answers it itself.
    return cast(nn.Module, cast(PreTrainedModel, model).get_decoder())


def cache_argument(model: nn.Module) -> str:
    """The name under which a model, or its backbone, takes a cache of keys and values; empty if it takes none.

    It is `cache` from transformers 5.24 on, and `past_key_values` before and in others' code.
    """
    base = base_of(model)
    taken = inspect.signature(base.forward).parameters
    # In XLM and xLSTM this name means something else.
    if "cache" in taken and re.search(r"\bCache\b", str(taken["cache"].annotation)):
        # Mamba takes a cache too, but where rows are padded it does not go on from one.
        kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
        return "" if kinds == {"linear_attention"} else "cache"
    return "past_key_values" if "past_key_values" in taken else ""


def last_hidden(wrapped: nn.Module, model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The last hidden states (B, T, H) of `model`, from a forward of `wrapped`: its wrapper, or `model` itself.

    Data parallelism works by hooks on the wrapper's forward. The model's own head runs on one position only.
    """
    tap = _Tap.on(backbone(model))
    tap.is_open = True
    try:
        wrapped(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, logits_to_keep=1)
        if tap.hidden_BTH is None:
            raise RuntimeError("the wrapper's forward did not run the model's own backbone")
        return tap.hidden_BTH
    finally:
        # The states hold the whole graph of the forward.
        tap.is_open, tap.hidden_BTH = False, None


def put_tap(model: nn.Module) -> None:
    """Put on the hook that `last_hidden` reads by. A graph that was compiled before it was on would be compiled again."""
    _Tap.on(backbone(model))


class _Tap:
    """A forward hook that stays on its module: putting one on and off at each call would recompile a compiled model each time."""

    def __init__(self) -> None:
        self.is_open = False
        self.hidden_BTH: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: BaseModelOutput) -> None:
        if self.is_open:
            self.hidden_BTH = output.last_hidden_state

    @classmethod
    def on(cls, module: nn.Module) -> _Tap:
        """The module's own tap. A copied module has a copy of it, so no list of taps is kept elsewhere."""
        for hook in module._forward_hooks.values():
            if isinstance(hook, cls):
                return hook
        module.register_forward_hook(tap := cls())
        return tap


def computing_dtype(weights: Tensor | PreTrainedModel) -> torch.dtype:
    """The type that matrix products with these weights are computed in: that of autocast where it is on, or their own."""
    kind = weights.device.type
    # Autocast leaves float64 alone.
    lowers = torch.is_autocast_enabled(kind) and weights.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowers else weights.dtype


def head_rows(model: nn.Module) -> int:
    """The number of token ids that a model scores, padding included."""
    return int(_projection_of(model).out_features)


def _projection_of(model: nn.Module) -> nn.Linear:
    projection = cast(PreTrainedModel, model).get_output_embeddings()
    # PEFT's modules_to_save trains a copy of the layer and keeps both in a wrapper.
    if (copies := getattr(projection, "modules_to_save", None)) is not None:
        projection = copies[projection.active_adapter]
    if not isinstance(projection, nn.Linear):
        kind = f"{type(projection).__module__}.{type(projection).__name__}"
        raise UserError(
            f"the head of {type(base_of(model)).__name__} is a {kind}, not a plain linear layer; take a causal language "
            f"model, and adapt its head with PEFT's modules_to_save, not with target_modules"
        )
    return projection


@dataclass(frozen=True, eq=False)
class Head:
    """Callable from last hidden states (N, H) to the model's logits (N, V), in any leading shape, with gradients.

    V is `vocabulary_size`; larger ids are left out. Each call reads the weight from the model, so the head follows
    training. Build it once, with `Head.of`.
    """

    projection: nn.Linear
    vocabulary_size: int
    transform: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, model: nn.Module, vocabulary_size: int | None = None) -> Head:
        """The head of `model`, cut to `vocabulary_size` rows (None: all), proven on a forward of three tokens.

        Raises UserError if the model computes its logits in a way that is not known here.
        """
        projection = _projection_of(model)
        head = cls(projection, vocabulary_size or projection.out_features, _transform_of(base_of(model)))
        head._compare_with(model)
        return head

    @property
    def weight_VH(self) -> Tensor:  # noqa: N802
        """The projection's weight, cut to the vocabulary."""
        return self.projection.weight[: self.vocabulary_size]

    @property
    def bias_V(self) -> Tensor | None:  # noqa: N802
        """The projection's bias, cut likewise, or None."""
        bias = cast(Tensor | None, self.projection.bias)
        return None if bias is None else bias[: self.vocabulary_size]

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, H), in the weight's type and on its device."""
        hidden_NH = hidden_NH.to(self.projection.weight.device)
        return self.transform(nn.functional.linear(hidden_NH, self.weight_VH, self.bias_V))

    def _compare_with(self, model: nn.Module) -> None:
        token_ids = torch.arange(min(3, self.vocabulary_size), device=self.projection.weight.device)[None]
        inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "use_cache": False}
        with evaluating(model):
            expected = model(**inputs).logits[..., : self.vocabulary_size]
            # Through the whole projection, as in the model itself: for a cut weight a GPU may choose another kernel, whose result
            # in TF32 differs by a thousand roundings of float32. Shapes and numbers are the same here; allow a few roundings.
            logits = self.transform(self.projection(backbone(model)(**inputs).last_hidden_state))
            logits = logits[..., : self.vocabulary_size]
        tolerance = 8 * torch.finfo(computing_dtype(self.projection.weight)).eps * expected.abs().max()
        if logits.shape != expected.shape or not bool(((logits - expected).abs() <= tolerance).all()):
            raise UserError(
                f"switchkd does not know how {type(base_of(model)).__name__} computes its logits: they are not its projected "
                f"last hidden states; choose another family, or add a row to LOGIT_TRANSFORMS in heads.py"
            )


def _transform_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    config = model.config.get_text_config()
    named = [(getattr(config, attribute, None), function) for attribute, function in LOGIT_TRANSFORMS]
    steps = [(float(value), function) for value, function in named if isinstance(value, int | float)]

    def transform(logits: Tensor) -> Tensor:
        for value, function in steps:
            logits = function(logits, value)
        return logits

    return transform


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module, frozen parts included, is back in its own mode.

    Evaluation mode also keeps the key/value cache, which gradient checkpointing would turn off in training mode.
    """
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for model in models:
        if model is not None:
            model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
