"""Small models and tokenizers made on the spot, for every test that needs one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from switchkd.models.pair import ModelPair

PAD_ID, EOS_ID, VOCABULARY = 0, 1, 64

_LLAMA_LIKE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
_GEMMA_LIKE = _LLAMA_LIKE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
_FALCON_H1 = _LLAMA_LIKE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

# A family is a config class and what it needs beyond sizes and ids.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"num_attention_heads": 4, "max_position_embeddings": 512}),
    "opt": (
        OPTConfig,
        {"num_attention_heads": 4, "max_position_embeddings": 512, "ffn_dim": 64, "word_embed_proj_dim": 16},
    ),
    "llama": (LlamaConfig, _LLAMA_LIKE),
    "qwen2": (Qwen2Config, _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, _LLAMA_LIKE | {"head_dim": 8}),
    "mistral": (MistralConfig, _LLAMA_LIKE | {"sliding_window": 16}),
    "gemma2": (Gemma2Config, _GEMMA_LIKE | {"final_logit_softcapping": 10.0}),
    "gemma3": (Gemma3TextConfig, _GEMMA_LIKE | {"final_logit_softcapping": 10.0}),
    "cohere": (CohereConfig, _LLAMA_LIKE | {"logit_scale": 0.5}),
    "granite": (GraniteConfig, _LLAMA_LIKE | {"logits_scaling": 2.0}),
    "falcon_h1": (FalconH1Config, _FALCON_H1 | {"lm_head_multiplier": 0.5}),
}


def tiny_model(
    family: str,
    *,
    vocab: int = VOCABULARY,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    scale: float = 20.0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A random causal LM in evaluation mode that ends a text with `EOS_ID`; `options` go to its config.

    `attn_implementation` None is transformers' own choice, so that a model that was saved and loaded is bitwise the same.

    Weight matrices are multiplied by `scale`: as initialised, every distribution is flat, no policy ever switches, and
    a test on it proves nothing. At the default the entropy is about 2.4 nats of 4.2. The price: cached and one-pass
    float32 logits, of deviation 2.3, differ by up to 3e-5.
    """
    config_class, extra = FAMILIES[family]
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden}
    ids = {"pad_token_id": PAD_ID, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID}
    config = config_class(**{**sizes, **ids, **extra, "attn_implementation": attn_implementation, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.to(dtype).eval()


def tiny_pair(
    family: str, *, noise: float = 0.2, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0, **options: Any
) -> ModelPair:
    """A teacher and a student with its weights and some noise; `options` go to `tiny_model`.

    The noise is relative to each weight matrix's own deviation. At the default the Jensen-Shannon divergence varies
    from position to position, mostly between 0.1 and 0.5 nats (OPT 0.15 to 0.6, Gemma 0.01 to 0.1), so that a threshold
    in between switches back and forth.
    """
    teacher = tiny_model(family, seed=seed, **options)
    return ModelPair(noisy_copy(teacher, noise, seed=seed + 1), teacher, tokenizer)


def noisy_copy(model: PreTrainedModel, noise: float, *, seed: int = 1) -> PreTrainedModel:
    """A copy whose weight matrices have normal noise added, `noise` times their own standard deviation."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim == 2:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
                parameter.add_(noise * parameter.std() * draw)
    return copied


WORDS = ("one", "two", "three", "sun", "rain", "wind", "bird", "fish", "tree", "red", "green", "blue", "says", "and")
# Of a chat whose turns are words of that vocabulary.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_tokenizer(
    words: Sequence[str] = WORDS, *, vocab: int = VOCABULARY, pad_is_eos: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly `vocab` tokens with its pad and end-of-text ids at `PAD_ID` and `EOS_ID`.

    Words are split at blanks and marks; what is neither in `words` nor a filler "w17" is "<unk>", id 2. With
    `pad_is_eos` the pad token is the end-of-text token, as in many published models.
    """
    tokens = ["<pad>", "<eos>", "<unk>", ".", ",", "?", ":", *words]
    tokens += [f"w{token_id}" for token_id in range(len(tokens), vocab)]
    core = Tokenizer(models.WordLevel({token: token_id for token_id, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
