"""Laws of batches: padding changes nothing, and every example occurs exactly once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.batching import Batch, collate, epoch_batches, length_batches, spread_out
from gradsift.data.tokens import Encoded

LENGTHS = st.lists(st.integers(1, 40), max_size=80)


def encoded(row: int, ids: list[int], prompt: int) -> Encoded:
    return Encoded(row, row, np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt)


def test_collate_pads_by_mask_on_either_side() -> None:
    examples = [encoded(7, [5, 2, 6, 2], 2), encoded(3, [8, 2], 1)]  # 2 is a token and the pad id
    right = collate(examples, pad_id=2)
    assert right.input_ids.tolist() == [[5, 2, 6, 2], [8, 2, 2, 2]]
    assert right.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert right.places.tolist() == [1, 2, 4]
    assert right.targets.tolist() == [6, 2, 2]
    assert right.counts.tolist() == [2, 1]
    assert right.model_inputs().keys() == {"input_ids"}
    assert right.rows.tolist() == [7, 3]
    left = collate(examples, pad_id=2, padding_side="left")
    assert left.input_ids.tolist() == [[5, 2, 6, 2], [2, 2, 8, 2]]
    assert left.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert left.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert left.places.tolist() == [1, 2, 6]
    assert left.targets.tolist() == [6, 2, 2]
    assert left.model_inputs().keys() == {"input_ids", "attention_mask", "position_ids"}


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["left", "right"]))
def test_real_tokens_of_a_batch_are_the_examples(lengths: list[int], side: str) -> None:
    examples = [encoded(row, list(range(1, length + 1)), length // 2) for row, length in enumerate(lengths)]
    batch = collate(examples, 0, side)
    real = batch.attention_mask.bool()
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert batch.input_ids[row][real[row]].tolist() == example.input_ids.tolist()
        assert batch.position_ids[row][real[row]].tolist() == list(range(length))
    responses = [example.input_ids[1:][example.is_response[1:]] for example in examples]
    assert batch.targets.tolist() == np.concatenate(responses).tolist()
    assert batch.counts.tolist() == [len(response) for response in responses]
    assert batch.input_ids.flatten()[batch.places + 1].tolist() == batch.targets.tolist()
    assert real.flatten()[batch.places].all()


def test_batch_types_and_device() -> None:
    batch = collate([encoded(0, [1, 2], 1)], 0).to("cpu")
    assert isinstance(batch, Batch)
    integers = (batch.input_ids, batch.attention_mask, batch.position_ids, batch.rows)
    assert all(tensor.dtype == torch.int64 for tensor in integers)
    assert batch.counts.dtype == torch.float32
    assert batch.to("meta").input_ids.device.type == "meta"


@given(LENGTHS, st.integers(1, 100))
def test_length_batches_hold_every_position_once_within_the_bound(lengths: list[int], bound: int) -> None:
    batches = length_batches(lengths, bound)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= bound
    flat = [lengths[position] for batch in batches for position in batch]
    assert flat == sorted(flat, reverse=True)
    assert batches == length_batches(lengths, bound)


def test_every_part_of_a_pass_is_like_the_whole_and_the_longest_go_first() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 2000).astype(int).clip(2, 600).tolist()
    batches = length_batches(lengths, 1024)
    order = spread_out(batches)
    assert order[0] == batches[0]
    assert sorted(order) == sorted(batches)
    times = np.array([sum(lengths[p] ** 2 for p in batch) for batch in order], dtype=float)  # as attention takes
    done = np.cumsum([sum(lengths[p] for p in batch) for batch in order]) / sum(lengths)
    taken = np.cumsum(times) / times.sum()
    assert np.abs(taken[len(order) // 10 :] / done[len(order) // 10 :] - 1).max() < 0.35
    assert [spread_out(few) for few in ([], [1], [1, 2])] == [[], [1], [1, 2]]


@given(LENGTHS, st.integers(1, 9), st.sampled_from(["bucketed", "random"]), st.integers(0, 3))
def test_epoch_batches_are_a_permutation(lengths: list[int], size: int, batching: str, seed: int) -> None:
    batches = epoch_batches(lengths, size, batching, seed)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    assert len(batches) == -(-len(lengths) // size)
    assert batches == epoch_batches(lengths, size, batching, seed)


@pytest.mark.parametrize("batching", ["bucketed", "random"])
def test_epochs_with_other_seeds_differ_in_order_and_in_company(batching: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 300).tolist()
    first, second = (epoch_batches(lengths, 8, batching, seed) for seed in (1, 2))
    assert first != second
    shared = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    assert len(shared) < len(first) / 10


def test_bucketed_batches_hold_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1000).tolist()

    def real_share(batching: str) -> float:
        padded = sum(len(b) * max(lengths[p] for p in b) for b in epoch_batches(lengths, 8, batching, 0))
        return sum(lengths) / padded

    assert real_share("bucketed") > 0.9 > 0.7 > real_share("random")
