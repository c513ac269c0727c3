"""A key/value cache in which every row advances at its own pace, and a model that decodes with it.

A token's keys and values lie in the slot of its position in its own row. A rejected token needs no hole and no
compaction: the next token at that position overwrites it, and until then the mask hides it, since a query attends to
slots up to its own position only. Rows in use are the first ones, so a forward reads them without a copy.

Shape letters: A rows in use, T new positions, S slots, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from switchkd.models.heads import Head, backbone, base_of
from switchkd.models.pair import position_limit


@dataclass
class _Place:
    """Where the coming forward writes and reads, for all layers: set anew before each."""

    row_A1: Tensor
    slot_AT: Tensor
    width: int


class _RaggedLayer(CacheLayerMixin):
    """The keys and values of one layer: (rows, heads, slots, head size), allocated at the first forward."""

    is_sliding = False

    def __init__(self, owner: RaggedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, slots = self.owner.rows, self.owner.slots
        self.keys = key_states.new_zeros(rows, key_states.shape[1], slots, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], slots, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, place = cast(Tensor, self.keys), cast(Tensor, self.values), cast(_Place, self.owner.place)
        keys[place.row_A1, :, place.slot_AT] = key_states.transpose(1, 2)
        values[place.row_A1, :, place.slot_AT] = value_states.transpose(1, 2)
        used = len(place.row_A1)
        return keys[:used, :, : place.width], values[:used, :, : place.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.owner.place.width if self.owner.place else query_length), 0

    def get_seq_length(self) -> int:
        return self.owner.place.width if self.owner.place else 0

    def get_max_length(self) -> int:
        return self.owner.slots


class RaggedCache(Cache):
    """The cache of one model for `rows` rows of up to `slots` positions each."""

    def __init__(self, rows: int, slots: int) -> None:
        # Layers are made as the model asks for them; any callable that makes one will do.
        super().__init__(layer_class_to_replicate=cast(type[CacheLayerMixin], partial(_RaggedLayer, self)))
        self.rows = rows
        self.slots = slots
        self.place: _Place | None = None

    def copy_prefix(self, source: RaggedCache, source_row: int, row: int, length: int) -> None:
        """Copy the first `length` positions of a row of another cache, or of this one, into a row of this one."""
        while len(self.layers) < len(source.layers):
            self.layers.append(_RaggedLayer(self))
        layers = zip(cast(list[_RaggedLayer], self.layers), cast(list[_RaggedLayer], source.layers), strict=True)
        for ours, theirs in layers:
            assert theirs.keys is not None
            assert theirs.values is not None
            if not ours.is_initialized:
                ours.lazy_initialization(theirs.keys, theirs.values)
            cast(Tensor, ours.keys)[row, :, :length] = theirs.keys[source_row, :, :length]
            cast(Tensor, ours.values)[row, :, :length] = theirs.values[source_row, :, :length]


def why_not_ragged(model: PreTrainedModel) -> str | None:
    """Why a model cannot decode with a `RaggedCache`, or None where it can; its mask and cache are tried out by the engine."""
    config = base_of(model).config.get_text_config()
    if getattr(base_of(model), "_is_stateful", False):
        return "it keeps a recurrent state, which cannot take a token back"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}, which takes no mask of our own (sdpa and eager do)"
    return None


class CachedModel:
    """A model that reads new tokens into a `RaggedCache` and returns the hidden states that predict the next ones."""

    def __init__(self, model: PreTrainedModel, head: Head, rows: int, slots: int) -> None:
        self.model = model
        self.head = head
        self.backbone = backbone(model)
        self.cache = RaggedCache(rows, slots)
        self.forwards = 0
        config = base_of(model).config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self.window: int | None = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            self.window = None
        # Families that mix both kinds of layer take a mask for each kind, the others one mask.
        self.kinds = kinds if "sliding_attention" in kinds else None
        self.eager = config._attn_implementation == "eager"
        self.limit = position_limit(model)

    def read(self, ids_AT: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states (A, T, H) after each of the new tokens, row r's first one at position `lengths[r]`."""
        device = self.model.device
        used, new = ids_AT.shape
        start_A1 = torch.tensor(lengths, device=device)[:, None]
        slot_AT = start_A1 + torch.arange(new, device=device)
        width = max(lengths) + new
        self.cache.place = _Place(torch.arange(used, device=device)[:, None], slot_AT, width)
        self.forwards += 1
        # Drafts may overshoot the last position a model knows; they are thrown away, but must not fail.
        positions = slot_AT if self.limit is None else slot_AT.clamp(max=self.limit - 1)
        output = self.backbone(
            input_ids=ids_AT.to(device),
            attention_mask=self._mask(slot_AT, width),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _mask(self, slot_AT: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """Which slots each new token attends to, (A, 1, T, S), in the form that the model's attention takes."""
        distance = slot_AT[:, None, :, None] - torch.arange(width, device=slot_AT.device)
        full = self._in_form(distance >= 0)
        if self.window is None:
            return full
        sliding = self._in_form((distance >= 0) & (distance < self.window))
        if self.kinds is None:
            return sliding
        return {"full_attention": full, "sliding_attention": sliding}

    def _in_form(self, allowed: Tensor) -> Tensor:
        if not self.eager:
            return allowed
        smallest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(allowed, dtype=self.model.dtype).masked_fill(~allowed, smallest)
