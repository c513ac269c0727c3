"""`transformers.Trainer` whose evaluation is the objective on a data set's responses, or on the student's own text.

What is summed here is divided once, by the whole set's count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from switchkd.evaluation.measures import scores_named
from switchkd.methods.plan import Plan
from switchkd.models.pair import ModelPair
from switchkd.records import Example, Rollout
from switchkd.rollout.engine import Engine
from switchkd.rollout.law import Student
from switchkd.training.dataset import without_repeats
from switchkd.training.scored_answers import ScoredAnswers
from switchkd.training.sharded_trainer import ShardedTrainer
from switchkd.training.shared_teacher import let_others_read
from switchkd.training.step_loss import StepLoss
from switchkd.training.taught import Taught

# The sample that evaluations draw: no training step and no calibration does.
_EVALUATION = -(1 << 33)


class EvaluatingTrainer(ShardedTrainer):
    """A trainer that evaluates by its `plan`'s objective and scores answers; whoever trains makes the parts."""

    pair: ModelPair
    taught: Mapping[str, Taught]
    plan: Plan
    engine: Engine
    _loss: StepLoss
    _answers: ScoredAnswers = ScoredAnswers()
    _eval_rows, _eval_sum, _eval_tokens = 0, 0.0, 0.0

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `transformers.Trainer`; eval_loss is the objective on the data set's responses, in nats a token.

        It is the sum over all their tokens / their number, whatever the batches and processes; `long_term_weight` has no part in
        it. Of a set of prompts alone, the
        responses are rollouts of the student as it is now, with the same draws in each evaluation. These are what
        `eval_scores` scores, and the means are metrics as well.
        """
        references = getattr(dataloader.dataset, "references", {})
        self._answers = ScoredAnswers(scores_named(self.args.eval_scores), references, self.pair.tokenizer)
        self._eval_rows, self._eval_sum, self._eval_tokens = len(dataloader.dataset), 0.0, 0.0
        with self.reading():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        sums = torch.tensor([[self._eval_sum, self._eval_tokens]], dtype=torch.float64)
        total, tokens = self._gathered(sums).sum(dim=0).tolist()
        if output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = total / (tokens or 1)
            means = self._answers.means(self._gathered)
            output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *ignored: Any, **also_ignored: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Add the batch's losses and tokens to the evaluation's. None is returned: the loop would take a mean of means."""
        examples = self._without_repeats(inputs["examples"], self._eval_rows)
        with self.pair.computing(), torch.no_grad(), self._head.kept():
            # Other processes have rows, and a forward of a student in parts takes all of them.
            answered = self._answered(examples) if examples else [replace(inputs["examples"][0], response_ids=())]
            inputs = self._loss.inputs(self._loss.scored(answered))
            # The long-term term has the right gradient, but no value that means anything.
            inputs = self._on_device({**inputs, "weights": replace(inputs["weights"], return_N=None)})
            let_others_read()
            loss, _ = self._loss(model, inputs, 1)
        self._eval_sum += float(loss)
        self._eval_tokens += inputs["denominator"]
        return None, None, None

    def _answered(self, examples: Sequence[Example]) -> Sequence[Example | Rollout]:
        """The examples, or where they are prompts alone, what the student writes after them; its answers are scored if asked."""
        prompts_alone = not any(example.response_ids for example in examples)
        if not prompts_alone and not self._answers.scores:
            return examples
        is_here = any(each.pair.teacher is not None for each in self.taught.values())
        asks_teacher = self.plan.objective.reads_logp and is_here
        keep = self.plan.kept_of_teacher if asks_teacher else None
        prompts = [replace(example.prompt, sample_id=_EVALUATION) for example in examples]
        rollouts = self.engine.generate(
            prompts, policy=Student(), sampling=self.args.sampling, seed=self.args.seed, keep_teacher=keep
        )
        self._answers.add(rollouts)
        return rollouts if prompts_alone else examples

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # transformers moves tensors alone, not what we made of them.
        moved = {key: inputs[key].to(self.args.device) for key in ("batch", "weights")}
        return {**self._prepare_inputs(inputs), **moved}

    def _gathered(self, values: Tensor) -> Tensor:
        """Values of all processes, along the first axis, on the CPU."""
        # Of one process they stay there: not every device has float64.
        alone = self.accelerator.num_processes == 1
        return values if alone else self.accelerator.gather(values.to(self.args.device)).cpu()

    def _without_repeats(self, examples: Sequence[Example], rows: int) -> Sequence[Example]:
        """The examples of a loader's newest batch, without those that fill up the last step; see `without_repeats`."""
        accelerator = self.accelerator
        filled_up = accelerator.even_batches and not self.args.dataloader_drop_last
        if not filled_up or not accelerator.gradient_state.end_of_dataloader:
            return examples
        return without_repeats(examples, rows, accelerator.process_index, accelerator.num_processes)
