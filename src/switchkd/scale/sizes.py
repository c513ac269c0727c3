"""How large a model is, from its configuration alone: no weight is loaded, and none is made."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from switchkd.errors import UserError
from switchkd.models.heads import base_of, head_rows
from switchkd.models.layers import decoder_layers, linear_weights
from switchkd.models.sources import find_source


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a decoder that memory and time follow. Counts are of numbers (weights), not of bytes.

    `parameters` counts tied weights once, `trained` those that get a gradient, and `linear` the
    weights of linear layers that are no embedding as well. `layer` is the largest decoder layer. `outside`
    are the weights in no layer: embeddings, last norm and head. `idle` are those of the experts that a token passes by. `heads` x
    `head_size` is as wide as the queries, `kv_heads` x `head_size` as the keys. `cached_a_layer` are the numbers that a layer keeps
    of a position. Of quantized weights, `packed` are in `bits` bits.
    """

    name: str
    parameters: int
    trained: int
    linear: int
    layers: int
    layer: int
    outside: int
    idle: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    cached_a_layer: int
    packed: int = 0
    bits: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """The size of a model, which may be on the meta device. Raises UserError where its layers are not found."""
        config = base_of(model).config.get_text_config()
        layers = decoder_layers(model)
        if layers is None:
            raise UserError(
                f"switchkd does not know where {type(base_of(model)).__name__} keeps its layers, so it cannot plan"
            )
        in_layers = [_count(layer) for layer in layers]
        heads = config.num_attention_heads
        embedding: Any = base_of(model).get_input_embeddings()
        return cls(
            name=base_of(model).name_or_path or "",
            parameters=_count(model),
            trained=sum(each.numel() for each in model.parameters() if each.requires_grad),
            linear=sum(each.numel() for each in linear_weights(model)),
            layers=len(layers),
            layer=max(in_layers),
            outside=_count(model) - sum(in_layers),
            idle=_idle(model, config),
            hidden=config.hidden_size,
            # GPT-2 and its kin leave it open: four times the hidden size.
            inner=_first_of(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * config.hidden_size,
            heads=heads,
            kv_heads=_first_of(config, "num_key_value_heads") or heads,
            head_size=_first_of(config, "qk_head_dim", "head_dim") or config.hidden_size // heads,
            vocabulary=head_rows(model),
            tied=base_of(model).get_output_embeddings().weight is embedding.weight,
            cached_a_layer=_cached_a_layer(model, config),
        )

    @property
    def head(self) -> int:
        """The weights of the head."""
        return self.vocabulary * self.hidden

    @property
    def multiplied(self) -> int:
        """The weights that a batch of tokens is multiplied with: all but an embedding that only is looked up in."""
        return self.parameters if self.tied else self.parameters - self.head

    @property
    def multiplied_a_token(self) -> int:
        """Those that one token is multiplied with."""
        return self.multiplied - self.idle

    def cached(self, rows: int, slots: int) -> int:
        """The numbers in the keys and values of `rows` texts of `slots` positions."""
        return self.layers * rows * slots * self.cached_a_layer

    def weight_bytes(self, each: int) -> int:
        """The bytes of all weights, `each` for one that is not packed; the scales of packed ones are not counted."""
        return (self.parameters - self.packed) * each + self.packed * self.bits // 8


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _cached_a_layer(model: PreTrainedModel, config: PreTrainedConfig) -> int:
    heads = config.num_attention_heads
    rank = _first_of(config, "kv_lora_rank")
    if rank is None:
        head_size = _first_of(config, "head_dim") or config.hidden_size // heads
        return 2 * (_first_of(config, "num_key_value_heads") or heads) * head_size
    # DeepSeek's attention: a vector for all heads is kept, and made into keys and values when it is read.
    if any(hasattr(each, "expand_kv") for each in model.modules()):
        return rank + int(config.qk_rope_head_dim)
    # Earlier versions of transformers made them first.
    return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))


def _idle(model: PreTrainedModel, config: PreTrainedConfig) -> int:
    experts = _first_of(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = _first_of(config, "num_experts_per_tok", "moe_k", "moe_topk")
    if experts is None or chosen is None:
        return 0
    weights = sum(_count(each) for name, each in model.named_modules() if name.endswith(".experts"))
    return weights * (experts - chosen) // experts


def _first_of(config: PreTrainedConfig, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def known_models() -> dict[str, dict[str, Any]]:
    """The configurations that come with switchkd, by the name on the hub."""
    text = (Path(str(files("switchkd"))) / "assets" / "scale" / "models.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def size_of(name: str) -> ModelSize:
    """The size of the model that `name` means: a hub id, a folder, a config.json, or a name that `known_models` has.

    A known name may be cut to what follows its owner, such as Qwen2.5-7B. Raises UserError where there is no configuration.
    """
    known = {short: full for full in known_models() for short in (full, full.partition("/")[2])}
    if name in known:
        values = dict(known_models()[known[name]])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        config = _configuration(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.name_or_path = known.get(name, name)
        size, bits = ModelSize.of(model), _bits(config, name)
        layers = decoder_layers(model) if bits else None
        packed = sum(each.numel() for each in layers.parameters() if each.ndim > 1) if layers else 0
        return replace(size, packed=packed, bits=bits)
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{name} is no causal language model that can be planned ({type(error).__name__}: {error})"
        ) from None


def _bits(config: PreTrainedConfig, name: str) -> int:
    """The bits of the weights in layers where these are quantized, else 0. Raises UserError where they cannot be told."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return 0
    values = given if isinstance(given, dict) else given.to_dict()
    if values.get("load_in_4bit"):
        return 4
    if values.get("load_in_8bit") or values.get("quant_method") == "fp8":
        return 8
    if (bits := values.get("bits", values.get("w_bit"))) in (4, 8):
        return int(bits)
    raise UserError(
        f"{name} has quantized weights ({values.get('quant_method')}) whose bits cannot be told; give the configuration of the "
        f"model that it was made from"
    )


def _configuration(name: str) -> PreTrainedConfig:
    try:
        if Path(name).suffix == ".json":
            values = json.loads(Path(name).read_text(encoding="utf-8"))
            given: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
            return given
        source = find_source(name)
        if source.gguf_file is not None:
            raise UserError(
                f"model {name!r} is a .gguf file; give the folder, config.json or hub id that it was made from"
            )
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(source.place))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the configuration of {name!r} cannot be read ({str(error).splitlines()[0]}); give a hub id, a folder, a config.json, "
            f"or one of {', '.join(known_models())}"
        ) from error
