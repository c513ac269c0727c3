import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchkd.data.collate import collate, groups_of_like_length, micro_batches, response_ids
from switchkd.records import Example, FinishReason, Prompt, Rollout, teacher_share_of

PAD = 0
HIDDEN = 3


def example(prompt, response, prompt_id=0):
    return Example(Prompt(tuple(prompt), prompt_id), tuple(response))


def rollout(prompt, response, by_teacher, hidden=None):
    nothing = (math.nan,) * len(response)
    return Rollout(
        Prompt(tuple(prompt), 0), tuple(response), tuple(by_teacher), nothing, nothing, nothing, nothing,
        FinishReason.LENGTH, hidden,
    )  # fmt: skip


def test_examples_and_rollouts_in_one_batch():
    batch = collate([example([5, 6], [7]), rollout([8], [9, 4, 3], [True, False, True])], PAD)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, PAD], [8, 9, 4, 3]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.response_mask_BT.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert batch.rolled_out_BT.tolist() == [[False] * 4, [False, True, True, True]]
    assert batch.written_by_teacher_BT.tolist() == [[False] * 4, [False, True, False, True]]
    assert batch.response_tokens == 4
    assert batch.teacher_hidden is None
    assert (batch.input_ids_BT.dtype, batch.attention_mask_BT.dtype) == (torch.int64, torch.int64)


def test_log_probabilities_of_a_rollout_stand_at_its_tokens_and_0_elsewhere():
    names = ("student_logp", "teacher_logp", "law_logp")
    # Numbers that float32 does not hold.
    values = {name: tuple(-0.1 * (10 * at + step) for step in (1, 2)) for at, name in enumerate(names)}
    batch = collate([example([5, 6], [7]), dataclasses.replace(rollout([8], [9, 4], [True, False]), **values)], PAD)
    for name in names:
        logp_BT = getattr(batch, f"{name}_BT")
        assert logp_BT.dtype == torch.float64
        assert logp_BT.tolist() == [[0, 0, 0], [0, *values[name]]]


def test_what_a_rollout_did_not_record_is_unknown():
    batch = collate([rollout([8], [9, 4], [True, False])], PAD)
    for recorded_BT in (batch.law_logp_BT, batch.margin_BT):
        assert recorded_BT is not None
        assert recorded_BT.isnan().tolist() == [[False, True, True]]


def test_the_teachers_tokens_are_its_parts_where_they_are_known_and_else_its_writing():
    plain = rollout([8], [9, 4, 3], [True, False, True])
    assert (plain.teacher_tokens, plain.teacher_share) == (2, 2 / 3)
    parts = dataclasses.replace(plain, teacher_part=(0.5, 0.25, 0.0))
    assert (parts.teacher_tokens, parts.teacher_share) == (0.75, 0.25)
    assert teacher_share_of([plain, parts]) == 2.75 / 6


def test_padding_is_by_length_also_where_the_end_token_is_the_padding_token():
    batch = collate([example([PAD, 5], [6, PAD]), example([5], [PAD])], PAD)
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.response_mask_BT.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_a_prompt_without_response_counts_nothing():
    batch = collate([example([5, 6], [])], PAD)
    assert batch.input_ids_BT.tolist() == [[5, 6]]
    assert batch.response_tokens == 0


def test_no_sequences_are_refused():
    with pytest.raises(ValueError, match="no sequences"):
        collate([], PAD)


def test_teacher_hidden_is_in_the_order_of_the_counted_positions():
    # Row r, response token t carries the hidden state (token id, r, t).
    responses = [[11, 12, 13], [21], [31, 32]]
    rollouts = [
        rollout([1] * (r + 1), ids, [False] * len(ids), torch.tensor([[float(i), r, t] for t, i in enumerate(ids)]))
        for r, ids in enumerate(responses)
    ]
    batch = collate(rollouts, PAD)
    (hidden_NH,) = batch.teacher_hidden.values()
    assert hidden_NH.shape == (batch.response_tokens, HIDDEN)
    assert hidden_NH[:, 0].tolist() == batch.input_ids_BT[batch.response_mask_BT].tolist()


@pytest.mark.parametrize("other", [example([1], [2]), rollout([1], [2], [False])], ids=["example", "rollout"])
def test_one_sequence_without_teacher_hidden_leaves_the_batch_without(other):
    batch = collate([rollout([1], [2], [True], torch.zeros(1, HIDDEN)), other], PAD)
    assert batch.teacher_hidden is None


@pytest.mark.parametrize("hidden", [None, torch.zeros(1, HIDDEN)], ids=["without hidden", "with hidden"])
def test_a_batch_moves_whole(hidden):
    moved = collate([rollout([1], [2], [True], hidden)], PAD).to("meta")
    fields = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    tensors = [*filter(torch.is_tensor, fields), *(moved.teacher_hidden or {}).values()]
    # Not every device has float64.
    places = {(tensor.device.type, tensor.dtype == torch.float64) for tensor in tensors}
    assert places == {("meta", False), ("cpu", True)}
    assert (moved.teacher_hidden is None) == (hidden is None)


ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(st.lists(st.tuples(ids, st.lists(st.integers(0, 9), max_size=6)), min_size=1, max_size=5))
def test_a_batch_says_what_its_sequences_say(pairs):
    sequences = [example(prompt, response) for prompt, response in pairs]
    batch = collate(sequences, PAD)
    assert batch.input_ids_BT.shape[1] == max(len(prompt) + len(response) for prompt, response in pairs)
    for row, sequence in enumerate(sequences):
        there = batch.attention_mask_BT[row].bool()
        assert tuple(batch.input_ids_BT[row][there].tolist()) == sequence.prompt.token_ids + sequence.response_ids
        assert tuple(batch.input_ids_BT[row][batch.response_mask_BT[row]].tolist()) == response_ids(sequence)
        assert (batch.input_ids_BT[row][~there] == PAD).all()
        assert (there.int().diff() <= 0).all(), "padding is on the right"


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 8))
def test_micro_batches_hold_each_index_once_longest_first_ties_in_order(lengths, size):
    groups = micro_batches(lengths, size)
    order = [index for group in groups for index in group]
    assert sorted(order) == list(range(len(lengths)))
    assert order == sorted(order, key=lambda index: (-lengths[index], index))
    assert all(len(group) == size for group in groups[:-1])
    assert all(1 <= len(group) <= size for group in groups)


def padded_tokens(groups, lengths):
    return sum(len(group) * max(lengths[index] for index in group) for group in groups)


@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_full_micro_batches_never_pad_more_than_the_given_order(data, size, count):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=size * count, max_size=size * count))
    as_given = [list(range(start, start + size)) for start in range(0, len(lengths), size)]
    assert padded_tokens(micro_batches(lengths, size), lengths) <= padded_tokens(as_given, lengths)


def test_micro_batches_of_no_size_are_refused():
    with pytest.raises(ValueError, match="size is 0"):
        micro_batches([1], 0)


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(1, 9))
def test_groups_of_like_length_hold_every_row_once_and_little_padding(lengths: list[int], size: int) -> None:
    groups = groups_of_like_length(lengths, size)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = lengths[group[0]]
        assert len(group) <= size
        assert longest == max(lengths[index] for index in group)
        for place, index in enumerate(group):
            assert lengths[index] >= 0.9 * longest or place * longest < 256
