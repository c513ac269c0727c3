"""A smaller student from a larger model: decoder layers removed by number."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from switchkd.errors import UserError
from switchkd.models.heads import backbone


def remove_layers(model: PreTrainedModel, layers: str) -> None:
    """Remove decoder layers in place; what is left saves and reloads equal.

    `layers` lists numbers and ranges, both ends included: "10-19", "0,2,4-6". Raises UserError if it cannot be read,
    names a layer that does not exist, or leaves none.
    """
    decoder: Any = backbone(model)
    config = decoder.config
    count = config.num_hidden_layers
    dropped = _parse_ranges(layers)
    if not dropped < set(range(count)):
        raise UserError(
            f"drop_layers {layers!r} does not fit a model of {count} layers: name layers from 0 to {count - 1} "
            f"and leave at least one"
        )
    name = _name_of_layers(decoder)
    # GPT-2 can scale attention by the layer's number: a layer that has moved would reload with another scale.
    if name is None or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"drop_layers does not know where {type(model).__name__} keeps its layers; leave drop_layers out"
        )
    kept = [index for index in range(count) if index not in dropped]
    stack = nn.ModuleList(getattr(decoder, name)[index] for index in kept)
    setattr(decoder, name, stack)
    module: Any
    for index, layer in enumerate(stack):
        # Attention finds its place in the key/value cache by this number.
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(kept)
    for attribute in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if (per_layer := getattr(config, attribute, None)) is not None:
            setattr(config, attribute, [per_layer[index] for index in kept])


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The decoder layers of a model, or None where they are not found."""
    decoder = backbone(model)
    name = _name_of_layers(decoder)
    return None if name is None else getattr(decoder, name)


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of a model's linear layers, each once, without those that are an embedding too.

    Under autocast nothing reads them but in its type.
    """
    modules = list(model.modules())
    looked_up = {id(each.weight) for each in modules if isinstance(each, nn.Embedding)}
    found = {
        id(weight): weight
        for each in modules
        if isinstance(each, nn.Linear)
        for weight in each.parameters(recurse=False)
    }
    return [weight for key, weight in found.items() if key not in looked_up]


def _name_of_layers(decoder: nn.Module) -> str | None:
    count = cast(PreTrainedModel, decoder).config.num_hidden_layers
    found = [
        name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    return found[0] if len(found) == 1 else None


def _parse_ranges(text: str) -> set[int]:
    compact = text.replace(" ", "")
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", compact):
        raise UserError(
            f"drop_layers {text!r} cannot be read; write layer numbers and ranges, such as 10-19 or 0,2,4-6"
        )
    parts = [[int(end) for end in part.split("-")] for part in compact.split(",")]
    if any(part[0] > part[-1] for part in parts):
        raise UserError(
            f"drop_layers {text!r} holds a range that ends before it starts; write the smaller number first"
        )
    return {index for part in parts for index in range(part[0], part[-1] + 1)}
