"""Attention heads of a width that vLLM's kernels on a CPU do not take, filled up with zeros to one that they do.

A head of 16 numbers becomes one of 32: the added queries, keys and values are 0, and so are the columns that read them, so every
score and every state is what it was. Queries are scaled, since attention divides by the root of the width; the turned part of a
head stays the first 16 numbers. For Llamas alone, which the embedded pair is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# vLLM 0.32, v1/attention/backends/cpu_attn.py.
WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Padding:
    """From a head's `width` to the `wider` one."""

    width: int
    wider: int

    def weights(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a Llama with its heads filled up."""
        return {name: self._filled(name, weight).contiguous() for name, weight in found.items()}

    def _filled(self, name: str, weight: Tensor) -> Tensor:
        kind = next(
            (each for each in ("q_proj", "k_proj", "v_proj", "o_proj") if f"self_attn.{each}.weight" in name), ""
        )
        more = self.wider - self.width
        if kind == "o_proj":
            heads_HNW = weight.unflatten(1, (-1, self.width))
            return torch.nn.functional.pad(heads_HNW, (0, more)).flatten(1)
        if kind:
            heads_NWH = weight.unflatten(0, (-1, self.width))
            scale = math.sqrt(self.wider / self.width) if kind == "q_proj" else 1.0
            return torch.nn.functional.pad(heads_NWH * scale, (0, 0, 0, more)).flatten(0, 1)
        return weight


def padding_of(folder: Path) -> Padding | None:
    """How the model in a folder has to be filled up; None where it has not, or is of another family."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError):
        # A name on the hub, or a family that words it otherwise: vLLM says what it cannot take.
        return None
    wider = next((each for each in WIDTHS if each >= width), None)
    if config.get("model_type") != "llama" or config.get("attention_bias") or wider in (None, width):
        return None
    return Padding(width, wider) if (folder / _WEIGHTS).is_file() else None


def padded_copy(folder: Path, padding: Padding, into: Path) -> Path:
    """The model of a folder with its heads filled up, in the folder `into`."""
    into.mkdir(parents=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, into / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["head_dim"] = padding.wider
    config["rope_parameters"] = {**config.get("rope_parameters", {}), "rope_dim": padding.width}
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(padding.weights(load_file(folder / _WEIGHTS)), into / _WEIGHTS, metadata={"format": "pt"})
    return into
