"""Train a Llama pair of 5.8M and 0.7M parameters with a vocabulary of 4,096 on Dolly, from nothing.

    python scripts/train_dolly_pair.py DATA --out FOLDER [--role teacher|student|both] [--steps 500] [--resume]

DATA is the training part of Dolly, as `instruction`, `input` and `output` a line; its last 60 rows are held out. Prompts have
the Alpaca template, as in a run. All tokens are trained on, so that so small a text also teaches the language. Writes
FOLDER/{teacher,student} and their logs; checkpoints lie in --work.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from switchkd.data.rows import read_rows
from switchkd.data.shapes import row_text
from train_world_pair import add_training_arguments, fit, loss_of, save

PAD, END = "<|pad|>", "<|end|>"
VOCABULARY, LONGEST, HELD_OUT = 4096, 256, 60
# Half of the world's: the text is small, and many steps teach more than large ones.
BATCH_TOKENS = 1800
SIZES = {  # width, layers, heads, mlp, steps
    "teacher": (256, 6, 4, 688, 800),
    "student": (96, 3, 4, 256, 500),
}
Text = tuple[str, str]
# Ids, and how many of them are the prompt.
Encoded = tuple[list[int], int]


def build_tokenizer(texts: list[Text]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on prompts and answers."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, END], initial_alphabet=alphabet)
    raw.train_from_iterator((part for text in texts for part in text), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=2 * LONGEST,
    )


def build_model(role: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a fresh model whose head is its embedding."""
    width, layers, heads, mlp, _ = SIZES[role]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=2 * LONGEST,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )


def encode(texts: list[Text], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Return the ids of prompt, answer and end, cut after LONGEST; prompts that leave no room are left out."""
    prompts, answers = (tokenizer([text[part] for text in texts], verbose=False)["input_ids"] for part in (0, 1))
    both = zip(prompts, answers, strict=True)
    rows = [((prompt + answer + [tokenizer.eos_token_id])[:LONGEST], len(prompt)) for prompt, answer in both]
    return [(ids, prompt) for ids, prompt in rows if prompt < LONGEST - 16]


def collate(rows: list[Encoded], pad: int, *, answers_alone: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and labels; labels are -100 at padding, and with `answers_alone` in prompts."""
    longest = max(len(ids) for ids, _ in rows)
    x = torch.full((len(rows), longest), pad)
    y = torch.full((len(rows), longest), -100)
    for row, (ids, prompt) in enumerate(rows):
        x[row, : len(ids)] = torch.tensor(ids)
        first = prompt if answers_alone else 0
        y[row, first : len(ids)] = torch.tensor(ids[first:])
    return x, y


def batches(rows: list[Encoded], seed: int) -> Iterator[list[Encoded]]:
    """Yield batches of like length and at most BATCH_TOKENS, epoch after epoch."""
    rng = random.Random(seed)
    while True:
        order = sorted(rng.sample(rows, len(rows)), key=lambda row: len(row[0]))
        groups: list[list[Encoded]] = [[]]
        for row in order:
            # Sorted: this row is the longest so far.
            if (len(groups[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from groups


def order(rows: list[Encoded], seed: int, pad: int, start: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that gives a step's ids and labels; a resumed run goes on where it was."""
    source = batches(rows, seed)
    for _ in range(start):
        next(source)
    return lambda step: collate(next(source), pad)


def train(role: str, args: argparse.Namespace) -> None:
    """Train one model, and save it as it goes."""
    texts = [(text.prompt, text.references[0]) for text in map(row_text, read_rows(args.data)) if text.references]
    tokenizer = build_tokenizer(texts[:-HELD_OUT])
    model, pad = build_model(role, tokenizer, args.seed), tokenizer.pad_token_id
    rows, held = encode(texts[:-HELD_OUT], tokenizer), encode(texts[-HELD_OUT:], tokenizer)

    @torch.no_grad()
    def look() -> dict[str, Any]:
        ordered, parts = sorted(held, key=lambda row: len(row[0])), []
        for i in range(0, len(ordered), 14):
            x, y = collate(ordered[i : i + 14], pad, answers_alone=True)
            parts.append((loss_of(model, x, y).item(), int((y[:, 1:] != -100).sum())))
        tokens = sum(count for _, count in parts)
        return {"held_out_nats_per_answer_token": round(sum(loss * count for loss, count in parts) / tokens, 4)}

    began, place = time.time(), args.work / f"dolly-{role}"
    keep = partial(save, model, tokenizer, args.out / role)
    fit(model, place, args.steps or SIZES[role][-1], args, partial(order, rows, args.seed, pad), look, keep)
    print(f"{role}: {sum(len(ids) for ids, _ in rows):,} tokens an epoch, {time.time() - began:.0f} s", flush=True)
    shutil.copy(place.with_suffix(".jsonl"), args.out)


def main() -> None:
    """Read the arguments and train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--role", choices=(*SIZES, "both"), default="both")
    add_training_arguments(parser)
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    for role in SIZES if args.role == "both" else (args.role,):
        train(role, args)


if __name__ == "__main__":
    main()
