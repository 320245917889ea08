"""The order of rows: every row once per epoch, steps of equal size, with group_tools the same tools together, with
spread_answers the same share of each kind of answer in every step."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.training.order import Groups, StepSampler, groups_for, steps_of_epoch
from tests.rows import LAMP

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def groups_of(sizes, together=True):
    return Groups(np.repeat(np.arange(len(sizes)), sizes), together)


def count_prefixes(steps, groups):
    """Number of (step, group) pairs: each costs one computation of the group's prefix."""
    return sum(len({groups.numbers[row] for row in step}) for step in steps)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 16), st.integers(0, 5), st.sampled_from([None, True, False]))
def test_every_row_once_in_full_steps(sizes, step_rows, seed, together):
    groups = None if together is None else groups_of(sizes, together)
    steps = steps_of_epoch(sum(sizes), step_rows, np.random.default_rng(seed), groups)
    assert sorted(row for step in steps for row in step) == list(range(sum(sizes)))
    assert len(steps) == math.ceil(sum(sizes) / step_rows)
    assert all(len(step) == step_rows for step in steps[:-1])


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(2, 16), st.integers(0, 5))
def test_grouping_computes_few_prefixes(sizes, step_rows, seed):
    groups = groups_of(sizes)
    grouped = steps_of_epoch(sum(sizes), step_rows, np.random.default_rng(seed), groups)
    shuffled = steps_of_epoch(sum(sizes), step_rows, np.random.default_rng(seed))
    # The size of a group sets its lowest number of steps; it rarely needs more.
    least = sum(math.ceil(size / step_rows) for size in sizes)
    assert least <= count_prefixes(grouped, groups) <= max(least + len(grouped), 1)
    assert count_prefixes(grouped, groups) <= count_prefixes(shuffled, groups) + len(grouped)


def test_small_tool_sets_are_rarely_split():
    groups = groups_of([3] * 351)
    steps = steps_of_epoch(1053, 8, np.random.default_rng(0), groups)
    assert count_prefixes(steps, groups) <= 351 * 1.35  # 8 is not a multiple of 3: about every fourth set is split
    assert count_prefixes(steps_of_epoch(1053, 8, np.random.default_rng(0)), groups) > 351 * 2.9


def test_groups_and_rows_are_shuffled_in_each_epoch():
    groups = groups_of([20] * 6)
    sampler = StepSampler(120, 10, seed=1, groups=groups)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert {frozenset(step) for step in first} != {frozenset(step) for step in second}
    assert all(len({groups.numbers[row] for row in step}) == 1 for step in first)
    group_order = [groups.numbers[step[0]] for step in first]
    assert group_order != sorted(group_order)
    assert any(step != sorted(step) for step in first)
    # A resumed run creates a new sampler and sets its epoch.
    resumed = StepSampler(120, 10, seed=1, groups=groups)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_ranks_split_each_step():
    groups = groups_of([7, 5, 9])
    steps = list(StepSampler(21, 8, seed=0, groups=groups))
    parts = [list(StepSampler(21, 8, seed=0, rank=rank, world_size=2, groups=groups)) for rank in range(2)]
    for step, *slices in zip(steps, *parts, strict=True):
        assert sorted(step) == sorted(row for part in slices for row in part)


def test_tool_sets_compare_content():
    other = LAMP | {"name": "other"}
    reordered = dict(reversed(LAMP.items()))
    conversations = [{"tools": [LAMP]}, {"tools": [other]}, {"tools": [reordered]}, {"tools": None}, {}]
    groups = groups_for("group_tools", conversations, [0, 0, 1, 2, 3, 4])
    assert (groups.numbers.tolist(), groups.together) == ([0, 0, 1, 0, 2, 2], True)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 16), st.integers(0, 5))
def test_spread_groups_have_the_same_share_everywhere(sizes, step_rows, seed):
    groups = groups_of(sizes, together=False)
    rows = sum(sizes)
    steps = steps_of_epoch(rows, step_rows, np.random.default_rng(seed), groups)
    order = [groups.numbers[row] for step in steps for row in step]
    for group, size in enumerate(sizes):
        seen = np.cumsum(np.equal(order, group))
        expected = size * np.arange(1, rows + 1) / rows
        assert np.abs(seen - expected).max() <= 1 + len(sizes) * size / rows  # a shuffle is off by about sqrt(size)


def test_answers_are_grouped_by_their_calls_or_first_words():
    def conversation(*answers):
        return {"messages": [{"role": "user", "content": "hi"}, *({"role": "assistant", **one} for one in answers)]}

    call = {"content": "", "tool_calls": [{"type": "function", "function": {"name": "lamp", "arguments": "{}"}}]}
    conversations = [
        conversation(call), conversation({"content": "Which lamp?"}), conversation({"content": "Which one?"}),
        conversation(call, {"content": "Which lamp?"}), conversation(call | {"content": "Switched on."}),
        conversation({"content": None}), {"messages": []}, conversation({"content": "Which lamp now?"}),
    ]  # fmt: skip
    groups = groups_for("spread_answers", conversations, range(8))
    assert groups.numbers.tolist() == [0, 1, 2, 3, 0, 4, 5, 6] and not groups.together
