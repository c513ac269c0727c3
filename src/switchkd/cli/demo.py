"""`switchkd demo`: the embedded pair, measured before and after a run of assets/demo.yaml."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from switchkd.data.sets import resolve
from switchkd.errors import UserError
from switchkd.evaluation.score import Evaluation, EvaluationSettings, evaluate
from switchkd.methods.config import SwitchConfig
from switchkd.models.load import load_pair
from switchkd.models.pair import ModelPair
from switchkd.records import Sampling
from switchkd.report.terminal import comparison_table, print_rollouts
from switchkd.rollout.speculative import SpeculativeEngine
from switchkd.run.file import RunConfig, read_mapping, run_from_values
from switchkd.run.folder import RUN_FILE, check_output_dir
from switchkd.run.launch import train_run
from switchkd.training.dataset import tokenized

RUN_NAME = "switchkd demo"
TEST_SET = "world:test"
TEST_ROWS = 300
SHOWN_ROLLOUTS = 2


def run_demo(changes: Mapping[str, Any], console: Console) -> None:
    """Distil the embedded student as assets/demo.yaml says, with some of its values changed, and show what came of it.

    The same held-out prompts are answered greedily by the student before, the student after and the teacher. A folder
    that holds the run of an earlier demo is replaced; any other is refused (UserError).
    """
    path = Path(str(files("switchkd"))) / "assets" / "demo.yaml"
    run = run_from_values({"output_dir": "runs/demo", **read_mapping(path), **changes}, f"in {path}")
    folder = Path(run.output_dir)
    is_earlier_demo = _holds_demo(folder)
    if not is_earlier_demo:
        check_output_dir(run, resume=False)
    config = run.config()
    assert run.teacher is not None
    place = config.placement
    pair = load_pair(run.student, run.teacher, placement=place)
    if is_earlier_demo:
        # Only now that the pair has loaded: a failed attempt leaves the earlier run.
        shutil.rmtree(folder)
    before = _measured("student before", pair, config, console)
    teacher = _measured("teacher", load_pair(run.teacher, None, placement=place), config, console)
    train_run(run, console)
    trained = load_pair(str(folder), None, placement=place)
    after = _measured("student after", trained, config, console)
    console.print("\nWhat the student was first trained on, written by student and teacher together:")
    _show_training_text(pair, run, config, console)
    console.print(comparison_table({"before": before, "after": after, "teacher": teacher}, TEST_SET))
    console.print(Text(_next_steps(run, config)), soft_wrap=True)


def _holds_demo(folder: Path) -> bool:
    """Whether an earlier demo wrote the folder's run; raises UserError where another run is there."""
    saved = folder / RUN_FILE
    if not saved.is_file():
        return False
    # A demo that is repeated must never delete somebody's own work.
    if read_mapping(saved).get("run_name") != RUN_NAME:
        raise UserError(f"{folder} holds a run that is no demo; give another folder with --output")
    return True


def _measured(label: str, pair: ModelPair, config: SwitchConfig, console: Console) -> Evaluation:
    assert pair.tokenizer is not None
    console.print(Text(f"{label}: answering {TEST_SET} greedily"))
    greedy = Sampling(config.max_new_tokens, temperature=0)
    return evaluate(
        SpeculativeEngine(pair),
        pair.tokenizer,
        {TEST_SET: resolve(TEST_SET, limit=TEST_ROWS)},
        model_name=label,
        settings=EvaluationSettings(greedy, (config.seed,), config.max_prompt_tokens, config.rendering),
        show_progress=console.is_terminal,
    )


def _show_training_text(pair: ModelPair, run: RunConfig, config: SwitchConfig, console: Console) -> None:
    assert pair.tokenizer is not None
    rows = resolve(run.train_data, limit=SHOWN_ROLLOUTS)
    prompts = [each.prompt for each in tokenized(rows, pair.tokenizer, config, need_response=False)]
    rollouts = SpeculativeEngine(pair).generate(prompts, config.plan.policy, config.sampling, seed=config.seed)
    print_rollouts(rollouts, pair.tokenizer, console)


def _next_steps(run: RunConfig, config: SwitchConfig) -> str:
    folder = run.output_dir
    lengths = f"--max-prompt-tokens {config.max_prompt_tokens} --max-new-tokens {config.max_new_tokens}"
    return (
        f"The run is in {folder}: its model (AutoModelForCausalLM.from_pretrained reads it), run.yaml, log.jsonl.\n"
        f"Try next:\n"
        f"  switchkd eval {folder} --sets world --seeds 10 {lengths}\n"
        f"  switchkd rollout --student {folder} --teacher world:teacher --data world:test --limit 4 {lengths}\n"
        f"  switchkd train {folder}/{RUN_FILE} --set method=gkd --set output_dir={folder}-gkd --set run_name=gkd\n"
        f"  switchkd methods"
    )
