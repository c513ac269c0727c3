"""A key/value cache in which every row advances at its own pace, and a model that decodes with it.

A token's keys and values lie in the slot of its position in its own row. A rejected token needs no hole and no
compaction: the next token at that position overwrites it, and until then the mask hides it, since a query attends only to
slots up to its own position. Rows in use are the first ones, so a forward reads them without a copy.

Shape letters: A rows in use, T new positions, S slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from switchkd.models.heads import Head, backbone, base_of, cache_argument, computing_dtype, evaluating
from switchkd.models.pair import position_limit

# The tokens that one forward of a prefill reads, rows times positions. The widest activations of a 7B model then take about
# 1 GB, and the matrix products of any machine are long since large enough.
_PREFILL_TOKENS = 8192


class _Place(NamedTuple):
    """Where a forward writes, rows (A, 1) and slots (A, T), and how many slots it reads."""

    row_A1: Tensor
    slot_AT: Tensor
    width: int


@dataclass
class _Shared:
    """What the layers of a cache share: its size, and the place of the forward that runs.

    It knows neither cache nor layers. In a reference cycle the tensors would live on until a full garbage collection.
    """

    rows: int
    slots: int
    place: _Place | None = None


class _RaggedLayer(CacheLayerMixin):
    """The keys and values of one layer: (rows, heads, slots, head size), allocated at a call's first forward if need be."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, shared: _Shared) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._room(self.keys, key_states), self._room(self.values, value_states)
        self.is_initialized = True

    def _room(self, kept: Tensor | None, like: Tensor) -> Tensor:
        # Rotated keys are float32 under autocast, but its attention computes in the lower type: cast once, not in each forward.
        dtype = computing_dtype(like)
        # The model may have moved or changed its type since, and inference tensors cannot be written outside their mode.
        kind = (dtype, like.device, like.is_inference())
        if kept is not None and (kept.dtype, kept.device, kept.is_inference()) == kind:
            return kept
        return like.new_zeros(self.shared.rows, like.shape[1], self.shared.slots, like.shape[3], dtype=dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.shared.place is not None
        row_A1, slot_AT, width = self.shared.place
        used = row_A1.shape[0]
        self.keys[row_A1, :, slot_AT] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[row_A1, :, slot_AT] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[:used, :, :width], self.values[:used, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return 0 if self.shared.place is None else self.shared.place.width

    def get_max_length(self) -> int:
        return self.shared.slots


class RaggedCache(Cache):
    """The cache of one model for `rows` rows of up to `slots` positions each.

    It may serve one call after another. Nothing of an earlier call is ever attended to: its slots are written again first.
    """

    def __init__(self, rows: int, slots: int) -> None:
        self.shared = _Shared(rows, slots)
        # Layers are made as the model asks for them; any callable that makes one will do.
        super().__init__(layer_class_to_replicate=cast(type[CacheLayerMixin], partial(_RaggedLayer, self.shared)))

    def restarted(self) -> RaggedCache:
        """The same cache for another call, which keeps the layers' tensors where they still fit the model."""
        for layer in cast(list[_RaggedLayer], self.layers):
            layer.is_initialized = False
        return self

    def copy_prefixes(self, source: RaggedCache, moves: Sequence[tuple[int, int]], length: int) -> None:
        """Copy the first `length` positions of rows of another cache, or of this one: (their row, our row) for each of `moves`.

        All rows are read before the first is written.
        """
        while len(self.layers) < len(source.layers):
            self.layers.append(_RaggedLayer(self.shared))
        layers = zip(cast(list[_RaggedLayer], self.layers), cast(list[_RaggedLayer], source.layers), strict=True)
        place_M2 = torch.tensor(moves)
        for ours, theirs in layers:
            if not ours.is_initialized:
                ours.lazy_initialization(theirs.keys, theirs.values)
            # Copied once for all layers, but where they lie on several devices.
            place_M2 = place_M2.to(ours.keys.device)
            theirs_M, ours_M = place_M2.unbind(dim=1)
            ours.keys[ours_M, :, :length] = theirs.keys[theirs_M, :, :length]
            ours.values[ours_M, :, :length] = theirs.values[theirs_M, :, :length]


class CachedModel:
    """A model that reads new tokens into a `RaggedCache` and returns the hidden states that predict the next ones."""

    def __init__(
        self, model: PreTrainedModel, head: Head, rows: int, slots: int, kept: RaggedCache | None = None
    ) -> None:
        """`kept` is the cache of a call that is over; it is used again if it has enough rows and slots."""
        self.model = model
        self.head = head
        self.backbone = backbone(model)
        self.cache_argument = cache_argument(self.backbone)
        enough = kept is not None and kept.shared.rows >= rows and kept.shared.slots >= slots
        self.cache = kept.restarted() if kept is not None and enough else RaggedCache(rows, slots)
        config = base_of(model).config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self.window: int | None = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            self.window = None
        # Families that mix both kinds of layer take a mask for each kind, the others one mask.
        self.kinds = kinds if "sliding_attention" in kinds else None
        self.eager = config._attn_implementation == "eager"
        self.limit = position_limit(model)

    def read(self, ids_AT: Tensor, start_A: Tensor, width: int) -> Tensor:
        """Hidden states (A, T, H) after each of the new tokens, row r's first one at position `start_A[r]`.

        `width` is the number of slots read: at least the last new position plus one. Nothing here waits for the device.
        """
        used, new = ids_AT.shape
        slot_AT = start_A[:, None] + torch.arange(new, device=start_A.device)
        shared = self.cache.shared
        shared.place = _Place(torch.arange(used, device=start_A.device)[:, None], slot_AT, width)
        # Drafts may overshoot the last position a model knows. They are thrown away, but must not fail.
        positions = slot_AT if self.limit is None else slot_AT.clamp(max=self.limit - 1)
        output = self.backbone(
            input_ids=ids_AT,
            attention_mask=self._mask(slot_AT, width),
            position_ids=positions,
            **{self.cache_argument: self.cache},
            use_cache=True,
        )
        # What a graph leaves behind on an object stays alive with it.
        shared.place = None
        hidden: Tensor = output.last_hidden_state
        return hidden

    def prefill(self, texts: Sequence[Sequence[int]], pad_id: int) -> int:
        """Read texts into the first rows, all from position 0, a piece at a time; memory is bounded whatever their length.

        Returns the number of forwards.
        """
        width, device = max(map(len, texts)), self.model.device
        ids_AT = torch.tensor([[*text, *[pad_id] * (width - len(text))] for text in texts], device=device)
        size = max(1, _PREFILL_TOKENS // len(texts))
        starts = range(0, width, size)
        for start in starts:
            piece_AT = ids_AT[:, start : start + size]
            start_A = torch.full((len(texts),), start, device=device)
            self.read(piece_AT, start_A, start + piece_AT.shape[1])
        return len(starts)

    def prepare_for_graphs(self) -> None:
        """Allocate what the model's layers keep, for a graph must not, and promise that it stays where it is."""
        layers = cast(list[_RaggedLayer], self.cache.layers)
        if not layers or not all(layer.is_initialized for layer in layers):
            # Nothing has been read yet, so this token is overwritten before a row attends to it.
            nothing = torch.zeros(1, dtype=torch.long, device=self.model.device)
            self.read(nothing[:, None], nothing, 1)
        for layer in layers if self.model.device.type == "cuda" else ():
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)

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
        # Eager attention adds its mask to the scores; sdpa takes a bool mask and converts it itself.
        if not self.eager:
            return allowed
        smallest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(allowed, dtype=self.model.dtype).masked_fill(~allowed, smallest)


def why_not_ragged(model: PreTrainedModel) -> str | None:
    """Why a model's configuration rules out a `RaggedCache`, or None where it may work: `cache_mismatch` tries it out."""
    config = base_of(model).config.get_text_config()
    if getattr(base_of(model), "_is_stateful", False):
        return "it keeps a recurrent state, which cannot take a token back"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}, which takes no mask of our own (sdpa and eager do)"
    return None


@contextmanager
def taking_masks(*models: PreTrainedModel | None) -> Iterator[None]:
    """Let models with flash attention compute with sdpa, which takes a mask of our own; afterwards all are as before."""
    configs = [base_of(model).config.get_text_config() for model in models if model is not None]
    # Listed before the first change: two models may share a configuration.
    flash = [(each, each._attn_implementation) for each in configs if "flash" in (each._attn_implementation or "")]
    for config, _ in flash:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, implementation in flash:
            config._attn_implementation = implementation


def cache_mismatch(cached: CachedModel) -> str | None:
    """Why the states of two ragged rows read through a fresh cache (2 rows, 5 slots) are wrong, or None where they are right."""
    model, vocabulary = cached.model, cached.head.vocabulary_size
    ids = torch.arange(5, device=model.device)[None].repeat(2, 1) * 7 % vocabulary
    with evaluating(model):
        plain = cached.backbone(input_ids=ids, use_cache=False).last_hidden_state
        try:
            # A wrong token at position 2 of row 0 is overwritten, while row 1 is one position ahead.
            places = torch.tensor([[0, 0], [2, 2], [2, 3]], device=model.device)
            cached.read(ids[:, :2], places[0], 2)
            cached.read(torch.stack([(ids[0, 2:3] + 1) % vocabulary, ids[1, 2:3]]), places[1], 3)
            ragged = cached.read(torch.stack([ids[0, 2:4], ids[1, 3:5]]), places[2], 5)
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            return f"its forward does not take our cache and mask ({type(error).__name__}: {error})"
    expected = torch.stack([plain[0, 2:4], plain[1, 3:5]])
    # Kernels choose by shape, so the roundings of a few layers differ: 7e-7 of the largest in float32, in bfloat16 none on a CPU
    # and 1 to 3 % a layer at worst. With the mask all True it is 34 % or more, in any type (nine families and the world's pair).
    tolerance = min(1e3 * torch.finfo(computing_dtype(model)).eps, 0.1) * expected.abs().max()
    if not bool(((ragged - expected).abs() <= tolerance).all()):
        return "its states through our cache differ from those without a cache"
    return None
