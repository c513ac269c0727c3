"""SFT, then SWITCH, on Dolly with tiny pairs of three families made from nothing: does every family train?

    SWITCHKD_DATA_DIR=data python scripts/tiny_families.py [--families gpt2,opt,llama] [--steps 60]

A pair is a teacher of about 1.1M and a student of about 0.25M parameters over a byte-level BPE of 2,048 tokens, trained on
the answers of the training set. The teacher is fine-tuned on Dolly for longer than the student; then the student learns
from it by SWITCH. Prints a Markdown table of what was measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from switchkd.data.examples import to_examples
from switchkd.data.sets import DATA_DIR_VARIABLE, load_set
from switchkd.data.shapes import row_text
from switchkd.methods.config import SwitchConfig
from switchkd.models.pair import parameter_count
from switchkd.records import Example
from switchkd.training.trainer import SwitchTrainer

VOCABULARY = 2048
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS, ROWS = 96, 64, 8
# Width and layers.
TEACHER, STUDENT = (128, 4), (64, 2)


def gpt2_config(width: int, layers: int, ids: dict[str, int]) -> PreTrainedConfig:
    return GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=4, n_positions=256, **ids)


def opt_config(width: int, layers: int, ids: dict[str, int]) -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        ffn_dim=4 * width,
        max_position_embeddings=256,
        **ids,
    )


def llama_config(width: int, layers: int, ids: dict[str, int]) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=3 * width,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **ids,
    )


FAMILIES = {"gpt2": gpt2_config, "opt": opt_config, "llama": llama_config}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, pad_token="<pad>", eos_token="<end>")


def make_model(family: str, size: tuple[int, int], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    eos_id, pad_id = tokenizer.convert_tokens_to_ids(["<end>", "<pad>"])
    config = FAMILIES[family](*size, {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": pad_id})
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


@dataclass
class Data:
    """The Dolly rows that fit into the limits."""

    tokenizer: PreTrainedTokenizerFast
    train: list[Example]
    dev: list[Example]


def load_data(folder: str | None) -> Data:
    parts = {split: load_set("dolly", split, folder) for split in ("train", "dev")}
    tokenizer = train_tokenizer([text for row in parts["train"] for text in row_text(row).references])
    examples = {
        split: to_examples(
            rows[:3000],
            tokenizer,
            max_prompt_tokens=10_000,
            max_response_tokens=MAX_NEW_TOKENS,
            need_response=True,
            skip_bad_rows=True,
        ).examples
        for split, rows in parts.items()
    }
    fitting = {
        split: [one for one in several if len(one.prompt.token_ids) <= MAX_PROMPT_TOKENS]
        for split, several in examples.items()
    }
    return Data(tokenizer, fitting["train"], fitting["dev"][:64])


def make_trainer(
    student: PreTrainedModel, teacher: PreTrainedModel | None, data: Data, *, method: str, steps: int, rate: float
) -> SwitchTrainer:
    trainer = SwitchTrainer(
        student,
        teacher,
        SwitchConfig(
            output_dir=tempfile.gettempdir(),
            method=method,
            threshold=0.3,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_new_tokens=MAX_NEW_TOKENS,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=16,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        data.train,
        data.dev,
        data.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def mean(trainer: SwitchTrainer, measure: str, part: slice = slice(None)) -> float:
    """The mean of a logged measure over some of the steps."""
    values = [line[measure] for line in trainer.state.log_history if "loss" in line]
    return sum(values[part]) / len(values[part])


def run_family(family: str, data: Data, steps: int) -> list[str]:
    """Train one family's pair; the cells of its row."""
    started = time.perf_counter()
    teacher, student = (make_model(family, size, data.tokenizer) for size in (TEACHER, STUDENT))
    sizes = " / ".join(f"{parameter_count(model) / 1e6:.2f}M" for model in (teacher, student))
    make_trainer(teacher, None, data, method="sft", steps=5 * steps, rate=3e-3).train()
    sft = make_trainer(student, None, data, method="sft", steps=2 * steps, rate=3e-3)
    sft.train()
    switch = make_trainer(student, teacher, data, method="switch", steps=steps, rate=1e-3)
    before = switch.evaluate()["eval_loss"]
    switch.train()
    after = switch.evaluate()["eval_loss"]
    first, last = slice(0, 5), slice(-5, None)
    return [
        family,
        sizes,
        f"{mean(sft, 'loss', first):.2f} / {mean(sft, 'loss', last):.2f}",
        f"{mean(switch, 'loss', first):.3f} / {mean(switch, 'loss', last):.3f}",
        f"{before:.3f} / {after:.3f}",
        f"{mean(switch, 'teacher_share'):.0%}",
        f"{mean(switch, 'rollout_tokens_per_second'):,.0f} / {mean(switch, 'train_tokens_per_second'):,.0f}",
        f"{time.perf_counter() - started:.0f}",
    ]


HEADER = [
    "family",
    "teacher / student",
    "SFT loss, first / last",
    "SWITCH loss, first / last",
    "dev divergence before / after",
    "teacher share",
    "tokens/s, rollout / training",
    "seconds",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get(DATA_DIR_VARIABLE), help="folder of the instruction sets")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which, separated by commas")
    parser.add_argument(
        "--steps", type=int, default=60, help="of SWITCH; SFT takes 2 times, the teacher 5 times as many"
    )
    options = parser.parse_args()
    data = load_data(options.data_dir and str(Path(options.data_dir)))
    print(f"{len(data.train):,} training rows, {len(data.dev)} dev rows, {ROWS} rows a step")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for family in options.families.split(","):
        print("| " + " | ".join(run_family(family, data, options.steps)) + " |", flush=True)


if __name__ == "__main__":
    main()
