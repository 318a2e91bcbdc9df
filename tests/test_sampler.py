"""Exactly once an epoch, whatever the batches, processes and restarts; uniform; and the same for ever."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnet_lib.sampler import ExactlyOnceSampler, uniforms


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_epoch_is_the_data_set_whatever_the_schedule(data):
    n = data.draw(st.integers(1, 300))
    exclude = data.draw(st.lists(st.integers(0, n - 1), max_size=n // 2, unique=True))
    exclude = np.array(exclude[: n - 1], np.int64)
    seed = data.draw(st.integers(0, 2**32 - 1))
    sampler = ExactlyOnceSampler(n, seed, exclude)
    seen, position = [], 0
    while position < 3 * len(sampler):  # each leg: a restart with another batch size and number of processes
        processes = data.draw(st.sampled_from([1, 2, 3, 4]))
        batch = processes * data.draw(st.integers(1, 20))
        for _ in range(data.draw(st.integers(1, 5))):
            for index in range(processes):
                seen.append(sampler.process_ids(position, position + batch, index, processes))
            position += batch
    seen = np.concatenate(seen)
    kept = np.setdiff1d(np.arange(n), exclude)
    for epoch in range(3):
        ids = seen[epoch * len(sampler) : (epoch + 1) * len(sampler)]
        np.testing.assert_array_equal(np.sort(ids), kept)


def test_the_order_is_uniform_over_seeds():
    """Chi-square of where each of 12 examples lands in 6,000 shuffles; 121 degrees of freedom."""
    n, shuffles = 12, 6000
    counts = np.zeros((n, n))
    for seed in range(shuffles):
        counts[np.arange(n), ExactlyOnceSampler(n, seed).example_ids(0, n)] += 1
    expected = shuffles / n
    assert 75 < ((counts - expected) ** 2 / expected).sum() < 180


def test_seeds_and_epochs_are_unrelated():
    n = 1000
    first, second = ExactlyOnceSampler(n, 0), ExactlyOnceSampler(n, 1)
    orders = [
        first.example_ids(0, n),
        first.example_ids(n, 2 * n),
        second.example_ids(0, n),
        second.example_ids(n, 2 * n),
    ]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).sum() < 12, "about one agreement is expected of unrelated orders"


def test_four_thousand_million_examples_need_no_table():
    sampler = ExactlyOnceSampler(4_000_000_000, 3)
    ids = sampler.example_ids(3_999_990_000, 4_000_010_000)
    assert ids.min() >= 0 and ids.max() < 4_000_000_000
    assert len(np.unique(ids[:10_000])) == 10_000


def test_golden_order():
    """Changes only with sampler.VERSION: checkpoints made before must not resume on another order."""
    assert ExactlyOnceSampler(10, 0).example_ids(0, 20).tolist() == GOLDEN


GOLDEN = [3, 7, 2, 5, 1, 4, 0, 8, 6, 9, 4, 8, 3, 5, 7, 6, 9, 0, 2, 1]


def test_state_is_small_json_and_a_mismatch_names_both_values():
    sampler = ExactlyOnceSampler(100, 7)
    state = json.loads(json.dumps(sampler.state(42, "abc")))
    assert len(json.dumps(state)) < 200
    assert ExactlyOnceSampler.check(state, 100, 7, "abc") == 42
    for change, words in (((101, 7, "abc"), "100.*101"), ((100, 8, "abc"), "7.*8"), ((100, 7, "abd"), "abc.*abd")):
        with pytest.raises(ValueError, match=words):
            ExactlyOnceSampler.check(state, *change)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: ExactlyOnceSampler(0, 0), "num_examples"),
        (lambda: ExactlyOnceSampler(3, 0, np.array([3])), "exclude"),
        (lambda: ExactlyOnceSampler(2, 0, np.array([0, 1])), "nothing is left"),
        (lambda: ExactlyOnceSampler(5, 0).process_ids(0, 5, 0, 2), "5 examples.*2"),
        (lambda: ExactlyOnceSampler(5, 0).example_ids(3, 2), "positions"),
    ],
)
def test_bad_requests(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_uniforms_are_addressed_not_drawn():
    whole = uniforms(5, np.arange(100), 0, 4)
    np.testing.assert_array_equal(whole[37], uniforms(5, np.array([37]), 0, 4)[0])
    assert (whole != uniforms(5, np.arange(100), 1, 4)).all() and (whole != uniforms(6, np.arange(100), 0, 4)).all()
    many = uniforms(0, np.arange(50_000), 0, 1)[:, 0]
    assert abs(many.mean() - 0.5) < 0.005 and abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.02
