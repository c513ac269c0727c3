"""Train the tokenizer, the teacher and the student of the small world from nothing.

    python scripts/train_world_pair.py [--role teacher|student|both] [--resume]
    python scripts/train_world_pair.py --role student-small --out FOLDER [--steps 700] [--name NAME] [--world world-free]

Writes src/switchkd/assets/world/{teacher,student}, or with --out the folder FOLDER/NAME with the model and its log beside it.
A checkpoint lies in --work.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from muon import Muon
from switchkd.data import world
from switchkd.data.free_world import WORLDS
from switchkd.evaluation.measures import exact_match

SIZES = {  # width, layers, heads, mlp, steps
    "teacher": (96, 4, 6, 256, 4000),
    "student": (64, 3, 4, 160, 1250),
    # For the question how large a gap to the teacher may be; these do not ship.
    "student-small": (40, 3, 4, 64, 1250),
    "student-large": (80, 4, 5, 216, 1250),
}
BATCH_TOKENS = 3600
Row = dict[str, Any]


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer trained on the world's train text."""
    raw = Tokenizer(models.WordLevel(unk_token=world.UNK))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(world.TOKEN_PATTERN), "isolated")
    raw.decoder = decoders.Fuse()
    rows = world.make_rows("train", 3000, seed=seed)
    text = [row["prompt"] + row["completion"] for row in rows]
    every = [*world.LETTERS, *"0123456789", *world.WORDS, *world.NAMES, *world.CITIES]
    text += [blank + item for item in every for blank in ("", " ")]
    special = [world.PAD, world.END, world.UNK]
    raw.train_from_iterator(text, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=world.PAD,
        eos_token=world.END,
        unk_token=world.UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(role: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a fresh model; a token and its form with a blank before it start alike."""
    width, layers, heads, mlp, _ = SIZES[role]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )
    vocabulary = tokenizer.get_vocab()
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            blank = torch.randn(width) * 0.02
            for token, index in vocabulary.items():
                if token[0] == " " and token[1:] in vocabulary:
                    table[index] = table[vocabulary[token[1:]]] + blank
    return model


def answers(row: Row) -> list[str]:
    """Return the right answers of a row, the first of which is trained on."""
    completion = row["completion"]
    return completion if isinstance(completion, list) else [completion]


def length(row: Row) -> int:
    """Return the length of a row in characters, to sort by."""
    return len(row["prompt"]) + len(answers(row)[0])


def collate(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, ...]:
    """Return right-padded ids and labels; labels are -100 outside completion and end."""
    ids, labels = [], []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        answer = tokenizer.encode(answers(row)[0], add_special_tokens=False)
        answer.append(tokenizer.eos_token_id)
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id
    x = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    return x, torch.tensor([row + [-100] * (longest - len(row)) for row in labels])


def batches(bucket: str, seed: int, chosen: world.World) -> Iterator[list[Row]]:
    """Yield batches of one bucket, alike in length and near BATCH_TOKENS, without end."""
    source, rng = world.stream("train", seed, bucket=bucket, world=chosen), random.Random(seed)
    per_row = {"short": 36, "medium": 96, "long": 210}[bucket]
    size = BATCH_TOKENS // per_row
    while True:
        pool = [next(source) for _ in range(4 * size)]
        pool.sort(key=length)
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks


def drill(rng: random.Random, tokenizer: PreTrainedTokenizerFast, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels that teach looking up: items in a row, then pieces of that row.

    Without this, looking up in the prompt comes so late that the tasks are not learnt in time.
    """
    vocabulary = tokenizer.get_vocab()
    items = [*world.LETTERS, *world.WORDS, *world.NAMES, *world.CITIES]
    size, ids, labels = rng.randint(5, longest), [], []
    for _ in range(BATCH_TOKENS // (2 * size + 1)):
        row = rng.sample(items, size)
        x = [vocabulary[f" {item}"] for item in row] + [vocabulary["\n"]]
        y = [-100] * len(x)
        while len(x) < 2 * size + 1:
            place, blank = rng.randrange(size - 1), rng.choice(("", " "))
            first, *rest = row[place : place + rng.randint(2, 6)]
            x += [vocabulary[blank + first], *(vocabulary[f" {item}"] for item in rest)]
            y += [-100, *(vocabulary[f" {item}"] for item in rest)]
        ids.append(x[: 2 * size + 1])
        labels.append(y[: 2 * size + 1])
    return torch.tensor(ids), torch.tensor(labels)


def right_rows(model: LlamaForCausalLM, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return for each row whether the greedy answer given the right prefix is right to the end."""
    with torch.no_grad():
        guess = model(input_ids=x, use_cache=False).logits[:, :-1].argmax(-1)
    return ((guess == y[:, 1:]) | (y[:, 1:] == -100)).all(1)


def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[bool]:
    """Return for each row whether the greedily generated text is a right answer, and ends."""
    tokenizer.padding_side, hits = "left", []
    for start in range(0, len(rows), 30):
        part = rows[start : start + 30]
        given = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=world.BUCKETS["long"][1] + 8,
            do_sample=False,
        )
        for row, new in zip(part, out[:, given["input_ids"].shape[1] :].tolist(), strict=True):
            stop = tokenizer.eos_token_id
            ended = stop in new
            text = tokenizer.decode(new[: new.index(stop)] if ended else new)
            right = exact_match(text, answers(row), row["match"]) if "match" in row else text == row["completion"]
            hits.append(ended and right)
    return hits


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer; each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.padding_side = "right"
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)


def optimizers_of(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, tuple[torch.optim.Optimizer, float]]:
    """Return Muon for the matrices of the layers and AdamW for the rest, each with its rate."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = Muon(hidden, lr=args.muon_lr, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return {"muon": (muon, args.muon_lr), "adam": (adam, args.adam_lr)}


def fit(
    model: LlamaForCausalLM,
    place: Path,
    steps: int,
    args: argparse.Namespace,
    batches_from: Callable[[int], Callable[[int], tuple[torch.Tensor, torch.Tensor]]],
    look: Callable[[], dict[str, Any]],
    keep: Callable[[], None],
) -> float:
    """Train to `steps` and return the seconds that it took, those before a resumption included.

    `batches_from` makes, of the step that is begun at, a function from a step to its ids and labels. Every `args.every` steps
    the log (`place`.jsonl) gets what `look` sees, a checkpoint is written (`place`.pt), and `keep` is called.
    """
    checkpoint, optimizers = place.with_suffix(".pt"), optimizers_of(model, args)
    start, before = 0, 0.0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for name, (optimizer, _) in optimizers.items():
            optimizer.load_state_dict(saved[name])
        start, before = saved["step"], saved["seconds"]
    next_batch = batches_from(start)
    log(place, parameters=sum(p.numel() for p in model.parameters()), steps=steps, vocab=model.config.vocab_size)
    began, losses = time.time(), []
    for step in range(start, steps):
        scale = min(1.0, (step + 1) / 100, (1 - step / steps) / args.decay)
        for optimizer, rate in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate * scale
        x, y = next_batch(step)
        loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % args.every == 0 or step + 1 == steps:
            seen = look()
            seconds = round(before + time.time() - began)
            log(place, step=step + 1, seconds=seconds, loss=round(sum(losses) / len(losses), 4), **seen)
            losses = []
            state = {name: optimizer.state_dict() for name, (optimizer, _) in optimizers.items()}
            fresh = checkpoint.with_suffix(".new")
            torch.save({"model": model.state_dict(), **state, "step": step + 1, "seconds": seconds}, fresh)
            fresh.replace(checkpoint)
            keep()
    return before + time.time() - began


def loss_of(model: LlamaForCausalLM, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the labels that are not -100, in nats a token."""
    inner = model.model(input_ids=x, use_cache=False).last_hidden_state[:, :-1]
    asked = y[:, 1:] != -100
    return functional.cross_entropy(model.lm_head(inner[asked]), y[:, 1:][asked])


def log(place: Path, **entry: object) -> None:
    """Print a line and add it to the log."""
    line = json.dumps({"role": place.name, **entry})
    print(line, flush=True)
    with place.with_suffix(".jsonl").open("a") as file:
        file.write(line + "\n")


def curriculum(
    chosen: world.World, steps: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, start: int
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that gives a step's ids and labels: the drill, then from short to all."""
    # A resumed run goes on with fresh rows, not with those it has already seen.
    sources = {b: batches(b, args.seed + 1000 + start, chosen) for b in world.BUCKETS}
    rng = random.Random(args.seed + start)

    def next_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        way = step / steps
        ease = max(0.0, 1 - way / 0.3)
        shares = (0.2 + 0.35 * ease, 0.35, 0.45 - 0.35 * ease)
        if step < args.drill or (way < 0.3 and rng.random() < 0.1):
            return drill(rng, tokenizer, min(28, 8 + step // 15))
        return collate(next(sources[rng.choices(list(sources), shares)[0]]), tokenizer)

    return next_batch


def train(role: str, args: argparse.Namespace) -> None:
    """Train one model, with a curriculum from short to all, and save it as it goes."""
    chosen, tokenizer = WORLDS[args.world], build_tokenizer(args.seed)
    model = build_model(role, tokenizer, args.seed)
    steps = args.steps or SIZES[role][-1]
    name, folder = args.name or role, args.out or args.assets
    place = args.work / name
    # With several right answers the likeliest next token says nothing; such models are looked at when they are trained.
    measured = () if chosen.match else world.BUCKETS
    held = {b: world.make_rows("test", 105, seed=args.seed, bucket=b) for b in measured}

    def look() -> dict[str, Any]:
        exact, wrong = {}, Counter[str]()
        for bucket, rows in held.items():
            hits = []
            for i in range(0, len(rows), 35):
                hits += right_rows(model, *collate(rows[i : i + 35], tokenizer)).tolist()
            exact[bucket] = round(sum(hits) / len(hits), 3)
            wrong.update(r["task"] for r, h in zip(rows, hits, strict=True) if not h)
        return {"exact": exact, "wrong": dict(wrong)}

    def keep() -> None:
        if not args.pilot:
            save(model, tokenizer, folder / name)

    began_from = partial(curriculum, chosen, steps, args, tokenizer)
    seconds, began = fit(model, place, steps, args, began_from, look, keep), time.time()
    table: dict[str, dict[str, float]] = {}
    for bucket in world.BUCKETS:
        rows = world.make_rows("test", args.final, seed=args.seed + 1, bucket=bucket, world=chosen)
        rows.sort(key=lambda row: len(answers(row)[0]))
        hits = list(zip(rows, generate(model, tokenizer, rows), strict=True))
        table[bucket] = {"all": round(sum(h for _, h in hits) / len(hits), 3)}
        for task in chosen.tasks:
            own = [h for row, h in hits if row["task"] == task]
            table[bucket][task] = round(sum(own) / len(own), 3)
    log(place, final=table, rows_per_bucket=args.final, seconds=round(seconds + time.time() - began))
    if not args.pilot:
        logs = args.out or args.assets.parents[3] / "docs/results"
        shutil.copy(place.with_suffix(".jsonl"), logs / f"world-{name}.jsonl")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `fit` reads."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the role's own number")
    parser.add_argument("--every", type=int, default=200, help="steps between log lines")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=0.006)
    parser.add_argument("--decay", type=float, default=0.5, help="share of steps that decay")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("/tmp/world-pair"))


def main() -> None:
    """Read the arguments and train what was asked for."""
    home = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--role", choices=(*SIZES, "both"), default="both", help="both: the shipped teacher and student"
    )
    add_training_arguments(parser)
    parser.add_argument("--world", choices=WORLDS, default="world")
    parser.add_argument("--final", type=int, default=210, help="test rows per bucket at the end")
    parser.add_argument("--drill", type=int, default=300, help="first steps that only teach looking up")
    parser.add_argument("--pilot", action="store_true", help="leave the assets alone")
    parser.add_argument("--out", type=Path, help="save here, and leave the assets alone")
    parser.add_argument("--name", help="of the folder in --out; the role if left out")
    parser.add_argument("--assets", type=Path, default=home / "src/switchkd/assets/world")
    args = parser.parse_args()
    if args.name and (args.role == "both" or not args.out):
        parser.error("--name goes with --out and one role")
    if args.world != "world" and not args.out:
        parser.error("the assets are of the usual world; give --out")
    args.work.mkdir(parents=True, exist_ok=True)
    for role in ("teacher", "student") if args.role == "both" else (args.role,):
        train(role, args)


if __name__ == "__main__":
    main()
