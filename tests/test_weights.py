"""Where the loss counts: each weight against its definition, and what a step is divided by.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checks.weights import BATCHES, DROP, Text, batch_of, check_weight, text
from reference import weights as reference
from reference.divergences import reverse_kl
from reference.targets import margin, top_forward_kl
from switchkd.distributions.divergences import TopForwardKL
from switchkd.errors import UserError
from switchkd.loss.release import Release, downward_change_point
from switchkd.loss.weight import Weight, product_of
from switchkd.loss.weights import ByWriter, Importance, Prefix, Trust, Uniform
from switchkd.methods.config import SwitchConfig
from switchkd.records import Batch
from switchkd.training.step_loss import StepLoss
from tiny import tiny_pair
from trainers import EXAMPLES, Gradients, RecordingEngine, make_trainer


def by_writer(student: float, teacher: float) -> Callable[[Text], list[float]]:
    return lambda text: reference.by_writer(text.writers, student=student, teacher=teacher)


def prefix(tokens: int) -> Callable[[Text], list[float]]:
    return lambda text: reference.prefix(text.writers, tokens=tokens)


def importance(gamma: float) -> Callable[[Text], list[float]]:
    return lambda text: reference.importance(text.writers, text.student, text.teacher, gamma=gamma)


def trust(least_trust: float | None = None) -> Callable[[Text], list[float]]:
    return lambda text: reference.trust(text.writers, text.student, text.teacher, least_trust=least_trust)


def release(segment_tokens: int) -> Callable[[Text], list[float]]:
    return lambda text: reference.release(text.writers, text.margins, segment_tokens=segment_tokens)


def ones(text: Text) -> list[float]:
    return [1.0] * len(text.writers)


@pytest.mark.parametrize(
    ("weight", "of_text"),
    [
        (Uniform(), ones),
        (ByWriter(), ones),
        (ByWriter(0.25, 2.0), by_writer(0.25, 2.0)),
        (ByWriter(student=0.0), by_writer(0.0, 1.0)),
        (ByWriter(teacher=0.0), by_writer(1.0, 0.0)),
        (Prefix(tokens=1), prefix(1)),
        (Prefix(tokens=3), prefix(3)),
        (Prefix(tokens=99), ones),
        (Importance(), importance(0.5)),
        (Importance(gamma=2.0), importance(2.0)),
        (Importance(gamma=0.0), ones),
        (Trust(outliers_by="mask"), trust()),
        (Trust(0.4, outliers_by="mask"), trust(0.4)),
        (Trust(1.0, outliers_by="mask"), trust(1.0)),
        (Trust(), ones),
        (Release(segment_tokens=1), release(1)),
        (Release(segment_tokens=2), release(2)),
        (Release(segment_tokens=3), release(3)),
        (Release(segment_tokens=5), ones),
    ],
    ids=lambda part: str(part) if isinstance(part, Weight) else "defined",
)
def test_each_weight_is_that_of_its_definition(weight: Weight, of_text: Callable[[Text], list[float]]) -> None:
    check_weight(weight, of_text)


def test_the_texts_tell_the_weights_apart() -> None:
    """So that the comparison above is no comparison of ones."""
    definitions = [by_writer(0.25, 2.0), prefix(3), importance(0.5), trust(), trust(0.4), release(1), release(2)]
    found = [[of_text(each) for texts in BATCHES.values() for each in texts] for of_text in (ones, *definitions)]
    assert all(found[a] != found[b] for a in range(len(found)) for b in range(a))


@pytest.mark.parametrize(
    ("student", "teacher", "table"),
    [(1.0, 1.0, "1 1 1"), (0.5, 2.0, "0.5 2 1"), (0.0, 1.0, "0 1 1"), (1.0, 0.0, "1 0 1"), (0.0, 0.0, "0 0 1")],
)
def test_the_table_of_writers(student: float, teacher: float, table: str) -> None:
    """A token of the student's, one of the teacher's, and the data set's, in that order."""
    weight, batch = ByWriter(student, teacher), batch_of([text("st"), text("d")])
    assert weight(batch)[batch.response_mask_BT].tolist() == [float(each) for each in table.split()]
    assert [weight.trains_on("student"), weight.trains_on("teacher")] == [student > 0, teacher > 0]


@pytest.mark.parametrize("share", [0.001, 0.25, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("most", [1, 7, 10, 256])
def test_a_share_of_the_length_becomes_tokens_rounded_up(share: float, most: int) -> None:
    tokens = reference.prefix_tokens(share, most)
    assert Prefix(share=share).for_length(most) == Prefix(tokens=tokens)
    assert Prefix(tokens=tokens).longest == tokens
    assert tokens - 1 < share * most <= tokens


def test_what_needs_no_length_takes_none() -> None:
    for weight in (Uniform(), ByWriter(0.5, 2.0), Prefix(tokens=4), Importance(), Trust(), Release()):
        assert weight.for_length(10) is weight
    assert Prefix(share=0.3).longest is None
    assert [each.longest for each in (Uniform(), ByWriter(), Importance(), Trust(), Release())] == [None] * 5


def test_importance_falls_from_1_plus_gamma_towards_1() -> None:
    batch = batch_of([text("s" * 30, seed=5)])
    weights = Importance(gamma=0.7)(batch)[batch.response_mask_BT]
    assert weights[0] == 1.7
    assert (weights.diff() <= 0).all()
    assert 1 <= weights[-1] < 1.1


# ---------------------------------------------------------------------------------------------------------------- trust


@pytest.mark.parametrize("least_trust", [None, 0.4])
def test_what_is_not_trusted_goes_to_the_outliers_share(least_trust: float | None) -> None:
    def outliers(text: Text) -> list[float]:
        return [1 - trusted for trusted in trust(least_trust)(text)]

    weight = Trust(least_trust, top_k=7)

    def share(batch: Batch) -> Tensor:
        found = weight.outlier_share(batch)
        assert found is not None
        return found

    check_weight(share, outliers)
    assert weight.outlier_divergence == TopForwardKL(7)
    masked = Trust(least_trust, outliers_by="mask")
    assert masked.outlier_divergence is None
    assert masked.outlier_share(batch_of(BATCHES["one"])) is None


def test_a_token_that_the_teacher_excludes_is_not_trusted_at_all() -> None:
    batch = batch_of([Text("ss", [-1.0, -800.0], [-math.inf, 0.0], [0.0] * 2)])
    weights = Trust(outliers_by="mask")(batch)[batch.response_mask_BT]
    # The second ratio, exp(800), is no float64.
    assert weights.tolist() == [0.0, 1.0]


# -------------------------------------------------------------------------------------------------------------- release


@pytest.mark.parametrize(
    ("series", "place"),
    [
        (DROP, 6),
        ([3.0, 3.1, 0.1, 0.0], 2),
        ([5.0, 1.0, 1.01, 0.99, 1.0, 1.0], 1),
        ([1.0, 1.01, 0.99, 1.0, 1.0, -5.0], 5),
        (DROP[::-1], None),
        ([1.0, 1.2, 0.9, 1.1, 1.0, 0.95, 1.15, 1.05], None),
        ([2.0] * 8, None),
        ([0.1] * 5, None),
        ([2.0, 2.0, 2.0, 1.0, 1.0], 3),
        ([5.0, 0.0, 0.0], None),
        ([5.0], None),
        ([], None),
    ],
)
def test_where_a_series_drops_for_good(series: list[float], place: int | None) -> None:
    assert downward_change_point(series) == reference.change_point(series) == place


def test_rounding_is_no_drop() -> None:
    """Partial sums of 0.1 are not multiples of it."""
    for value in (0.1, 0.3, 1.7, 5.9):
        assert {downward_change_point([value] * count) for count in range(40)} == {None}


def series_of(seed: int) -> list[float]:
    """Some noise, and in most cases a drop or a rise in it."""
    draw = random.Random(seed)
    count = draw.randint(0, 12)
    change, step, noise = draw.randint(0, count), draw.choice([-2.0, -0.5, 0.0, 0.5, 2.0]), draw.choice([0.1, 0.5, 1.0])
    return [draw.gauss(1.0, noise) + (step if place >= change else 0.0) for place in range(count)]


def test_a_drop_is_where_trying_every_place_finds_it() -> None:
    found = [downward_change_point(series_of(seed)) for seed in range(400)]
    assert found == [reference.change_point(series_of(seed)) for seed in range(400)]
    assert 50 < sum(each is not None for each in found) < 350


# Noise, so that no two places tie.
@given(st.integers(0, 10_000), st.floats(-20, 20), st.floats(0.01, 100))
def test_no_unit_and_no_zero_of_the_margin_moves_the_drop(seed: int, added: float, factor: float) -> None:
    series = series_of(seed)
    assert downward_change_point([(value + added) * factor for value in series]) == downward_change_point(series)


def test_a_rollout_is_released_at_the_start_of_a_segment() -> None:
    weight = Release(segment_tokens=2)
    assert weight.release_at(DROP) == 6
    # The rest that fills no segment has a mean of its own.
    assert weight.release_at(DROP[:5] + [0.1] * 6) in (4, 6)
    assert weight.release_at(DROP[:6]) == 6
    assert weight.release_at([]) == 0
    assert Release(top_k=5).margin_top_k == 5
    assert Uniform().margin_top_k == 0


# ------------------------------------------------------------------------------------------------ products and refusals


def test_weights_multiply() -> None:
    def expected(text: Text) -> list[float]:
        factors = zip(importance(0.5)(text), by_writer(0.25, 2.0)(text), prefix(3)(text), strict=True)
        return [math.prod(each) for each in factors]

    weights = [Importance(), ByWriter(0.25, 2.0), Prefix(tokens=3)]
    check_weight(lambda batch: product_of(weights, batch), expected)
    check_weight(lambda batch: product_of([], batch), ones)


@pytest.mark.parametrize(
    ("weight", "settings", "message"),
    [
        (ByWriter, {"student": -0.1}, "weight.student is -0.1; it has to be 0 or more"),
        (ByWriter, {"teacher": math.inf}, "weight.teacher is inf"),
        (ByWriter, {"teacher": math.nan}, "weight.teacher is nan"),
        (Prefix, {}, "has tokens None and share None; give one of them"),
        (Prefix, {"tokens": 3, "share": 0.5}, "has tokens 3 and share 0.5; give one of them"),
        (Prefix, {"tokens": 0}, "weight.tokens is 0; at least 1 token"),
        (Prefix, {"share": 0.0}, "weight.share is 0.0; it has to be above 0 and at most 1"),
        (Prefix, {"share": 1.1}, "weight.share is 1.1"),
        (Importance, {"gamma": -1.0}, "weight.gamma is -1.0; it has to be 0 or more"),
        (Importance, {"gamma": math.nan}, "weight.gamma is nan"),
        (Trust, {"least_trust": 0.0}, "weight.least_trust is 0.0; it has to be above 0 and at most 1"),
        (Trust, {"least_trust": 1.5}, "weight.least_trust is 1.5"),
        (Trust, {"outliers_by": "clip"}, "weight.outliers_by is 'clip'; choose forward_kl or mask"),
        (Trust, {"top_k": 0}, "weight.top_k is 0; it has to be at least 1"),
        (Release, {"top_k": 1}, "weight.top_k is 1; a margin needs at least 2 candidates"),
        (Release, {"segment_tokens": 0}, "weight.segment_tokens is 0; it has to be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(weight: type[Weight], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weight(**settings)


@pytest.mark.parametrize("weight", [Importance(), Trust(outliers_by="mask")], ids=str)
def test_a_rollout_whose_log_probabilities_are_unknown_is_refused(weight: Weight) -> None:
    one = text("ss")
    for name in ("student", "teacher"):
        for known in (0, 1):
            values = [math.nan] * 2
            values[known] = -1.0
            changed: dict[str, Any] = {name: values}
            unknown = dataclasses.replace(one, **changed)
            with pytest.raises(ValueError, match=f"reads {name}_logp_BT of every rollout, but the engine recorded"):
                weight(batch_of([unknown, text("ddd")]))
        missing: dict[str, Any] = {f"{name}_logp_BT": None}
        with pytest.raises(ValueError, match="let the teacher score"):
            weight(dataclasses.replace(batch_of([one]), **missing))
    # What was not rolled out has none, and needs none.
    assert weight(batch_of([text("ddd")])).tolist() == [[1.0] * 6]


@pytest.mark.parametrize("weight", [Importance(), Trust(outliers_by="mask"), Release(segment_tokens=2)], ids=str)
def test_nothing_but_rollouts_is_read(weight: Weight) -> None:
    """Not the prompt, not padding, not the beginning, not the data set's text."""
    for texts in BATCHES.values():
        batch = batch_of(texts)
        unread: dict[str, Any] = {
            name: getattr(batch, name).masked_fill(~batch.rolled_out_BT, math.nan)
            for name in ("student_logp_BT", "teacher_logp_BT", "margin_BT")
        }
        assert torch.equal(weight(dataclasses.replace(batch, **unread)), weight(batch))


def test_a_rollout_whose_margin_is_unknown_is_refused() -> None:
    for batch in (
        batch_of([text("s" * 4, margins=[1.0, 1.0, 1.0, math.nan]), text("ddd")]),
        dataclasses.replace(batch_of([text("ss")]), margin_BT=None),
    ):
        with pytest.raises(ValueError, match="margin of every rollout, but the engine recorded none"):
            Release()(batch)


def test_an_engine_that_records_no_margin_is_refused() -> None:
    unrecorded = dataclasses.replace(text("s" * 12), margins=[])
    with pytest.raises(ValueError, match="margin of every rollout, but the engine recorded none"):
        Release()(batch_of([unrecorded]))


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_importance_is_that_of_trl(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off TRL's gradient: at the token's logit its loss has -w A (1 - p), with A = log p_T - log p_S."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    generator = torch.Generator().manual_seed(0)
    rows, most = ["s" * 9, "s" * 4, "s"], 9
    logits = (2 * torch.randn(3, most, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher_logits = 2 * torch.randn(3, most, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (3, most), generator=generator)
    student_logp, teacher_logp = (
        each.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].detach() for each in (logits, teacher_logits)
    )
    labels = torch.stack([tokens[row].masked_fill(torch.arange(most) >= len(rows[row]), -100) for row in range(3)])
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=gamma,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    loss = trl.IWOPDTrainer._compute_iw_opd_loss(trainer, logits, tokens, labels, teacher_logp, num_items_in_batch=1)
    (gradient,) = torch.autograd.grad(loss, logits)
    at_token = gradient.gather(-1, tokens[..., None])[..., 0]
    theirs = -at_token / (1 - student_logp.exp()) / (teacher_logp - student_logp)
    texts = [
        Text(row, student_logp[number].tolist()[: len(row)], teacher_logp[number].tolist()[: len(row)])
        for number, row in enumerate(rows)
    ]
    batch = batch_of(texts)
    ours = Importance(gamma)(batch)[batch.response_mask_BT]
    # Float64, divided by 1 - p and by A, which both are 1e-3 and more here.
    torch.testing.assert_close(ours, theirs[labels != -100], rtol=0, atol=1e-6)
    assert ours.max() - ours.min() > 0.3


# ------------------------------------------------------------------------------------------------------ in the trainer


@pytest.mark.parametrize("student_share", [0.5, 1.0])
@pytest.mark.parametrize("method", ["iw_opd", "tropd", "release", "tropd masked"])
def test_the_loss_of_a_weighted_method_is_that_of_its_definition(
    method: str, student_share: float, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method.split()[0], "student_share": student_share, "max_new_tokens": 24}
    if method == "release":
        options["weight"] = {"segment_tokens": 1, "top_k": 4}
    elif method == "tropd masked":
        options["weight"] = {"outliers_by": "mask", "least_trust": 0.5}
    elif method == "tropd":
        options["weight"] = {"top_k": 5}
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    trainer = make_trainer(tmp_path, pair, split=(3, 3), max_steps=1, **options)
    engine = RecordingEngine(trainer)
    trainer.train()
    rollouts = {each.prompt.prompt_id: each for each in engine.calls[0]}
    assert (len(rollouts) < 8) == (student_share < 1)
    models: list[Any] = [pair.student, pair.teacher]
    total, count = 0.0, 0
    for example in EXAMPLES:
        rollout = rollouts.get(example.prompt.prompt_id)
        response = example.response_ids if rollout is None else rollout.token_ids
        ids = torch.tensor([[*example.prompt.token_ids, *response]])
        start = len(example.prompt.token_ids)
        with torch.no_grad():
            students, teachers = (model(ids).logits[0, start - 1 : -1].softmax(-1).tolist() for model in models)
        rows = list(zip(students, teachers, strict=True))
        losses = [reverse_kl(s, t) for s, t in rows]
        writers = ("d" if rollout is None else "s") * len(response)
        logp = [[math.log(row[token]) for row, token in zip(of, response, strict=True)] for of in (students, teachers)]
        counts = [1.0] * len(response)
        if method == "iw_opd":
            counts = reference.importance(writers, *logp, gamma=0.5)
        elif method == "tropd masked":
            counts = reference.trust(writers, *logp, least_trust=0.5)
        elif method == "tropd":
            trusted = reference.trust(writers, *logp)
            outliers = [top_forward_kl(s, t, top_k=5) for s, t in rows]
            mixed = zip(trusted, losses, outliers, strict=True)
            losses = [share * inside + (1 - share) * outside for share, inside, outside in mixed]
        else:
            margins = [margin(s, t, top_k=4) for s, t in rows]
            counts = reference.release(writers, margins, segment_tokens=1)
        total += math.fsum(each * loss for each, loss in zip(counts, losses, strict=True))
        count += sum(each != 0 for each in counts)
    if method in ("release", "tropd masked") and student_share == 1:
        # Some tokens do not count.
        assert count < sum(len(each.token_ids) for each in rollouts.values())
    # Weights reach the loss in float32, and transformers adds the losses of a step up in float32.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- denominators


@dataclasses.dataclass(frozen=True)
class Halving(Weight):
    """Half as much from token to token."""

    sum_is_denominator: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Tensor:
        return 0.5 ** batch.response_mask_BT.cumsum(dim=1).double()


@dataclasses.dataclass(frozen=True)
class HalvingOfAll(Halving):
    """The same, divided by the number of tokens."""

    sum_is_denominator: ClassVar[bool] = False


@pytest.mark.parametrize("weight", [Halving(), HalvingOfAll()], ids=["sum", "count"])
def test_the_step_is_divided_by_the_sum_of_the_weights_where_one_asks_for_it(weight: Weight) -> None:
    pair = tiny_pair("llama", layers=1, dtype=torch.float64)
    step = StepLoss(pair, SwitchConfig(output_dir="unused", method="sft", weight=[Uniform(), weight]).plan, rows=4)
    losses, weights = [], []
    for example in EXAMPLES:
        ids = torch.tensor([[*example.prompt.token_ids, *example.response_ids]])
        start = len(example.prompt.token_ids)
        with torch.no_grad():
            logp = pair.student(ids).logits[0].log_softmax(-1)
        losses += [-float(logp[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])]
        weights += [0.5 ** (place + 1) for place in range(len(example.response_ids))]
    divisor = math.fsum(weights) if weight.sum_is_denominator else len(weights)
    expected = math.fsum(loss * each for loss, each in zip(losses, weights, strict=True)) / divisor
    for size in (1, 3, 8):
        parts = step.micro_batches(EXAMPLES, size)
        denominator = sum(part["denominator"] for part in parts)
        assert denominator == pytest.approx(divisor, rel=1e-14)
        with torch.no_grad():
            total = sum(float(step(pair.student, part, denominator)[0]) for part in parts)
        # Weights reach the loss in float32, which holds powers of 2 exactly; the rest is float64 in another order.
        assert total == pytest.approx(expected, rel=1e-12)


def test_no_split_of_a_step_changes_the_gradient_of_a_weighted_sum(tmp_path: Path) -> None:
    pair, found = tiny_pair("llama", layers=1, dtype=torch.float64), []
    for split in ((8, 1), (3, 3)):
        gradients = Gradients()
        options: dict[str, Any] = {"method": "kd", "weight": Halving(), "max_steps": 1, "max_grad_norm": 0.0}
        make_trainer(tmp_path, pair, split=split, callbacks=[gradients], **options).train()
        found.append(gradients.steps[0])
    assert sum(gradient.abs().sum() for gradient in found[0].values()) > 1
    for name, gradient in found[0].items():
        # The trainer hands the denominator over in float32: 6e-8 of it.
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-7, atol=1e-10)
