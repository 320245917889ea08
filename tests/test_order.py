"""The order of rows: every row once per epoch, steps of equal size, the same tools together where asked."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.training.order import steps_of_epoch, tool_sets
from tests.rows import LAMP

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def groups_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def visits(steps, groups):
    """How many (step, group) pairs there are: each costs one computation of the group's prefix."""
    return sum(len({groups[row] for row in step}) for step in steps)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 16), st.integers(0, 5), st.booleans())
def test_every_row_once_in_whole_steps(sizes, step_rows, seed, grouped):
    groups = groups_of(sizes)
    steps = steps_of_epoch(len(groups), step_rows, np.random.default_rng(seed), groups if grouped else None)
    assert sorted(row for step in steps for row in step) == list(range(len(groups)))
    assert len(steps) == math.ceil(len(groups) / step_rows)
    assert all(len(step) == step_rows for step in steps[:-1])


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(2, 16), st.integers(0, 5))
def test_groups_meet_at_least_as_often_as_by_chance(sizes, step_rows, seed):
    groups = groups_of(sizes)
    grouped = steps_of_epoch(len(groups), step_rows, np.random.default_rng(seed), groups)
    shuffled = steps_of_epoch(len(groups), step_rows, np.random.default_rng(seed))
    # A group cannot do with fewer steps than its size asks for, and rarely needs more.
    least = sum(math.ceil(size / step_rows) for size in sizes)
    assert least <= visits(grouped, groups) <= max(least + len(grouped), 1)
    assert visits(grouped, groups) <= visits(shuffled, groups) + len(grouped)


def test_351_tool_sets_of_three_rows_are_hardly_ever_cut():
    groups = groups_of([3] * 351)
    steps = steps_of_epoch(1053, 8, np.random.default_rng(0), groups)
    assert visits(steps, groups) <= 351 * 1.35  # 8 is no multiple of 3: every fourth set or so is cut
    assert visits(steps_of_epoch(1053, 8, np.random.default_rng(0)), groups) > 351 * 2.9


def test_shuffled_within_and_between_and_anew_in_each_epoch():
    from finetune.training.trainer import StepSampler

    groups = groups_of([20] * 6)
    sampler = StepSampler(120, 10, seed=1, groups=groups)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert {frozenset(step) for step in first} != {frozenset(step) for step in second}
    assert all(len({groups[row] for row in step}) == 1 for step in first)
    met = [groups[step[0]] for step in first]
    assert met != sorted(met)  # the groups do not come in their order
    assert any(step != sorted(step) for step in first)
    # A resumed run makes a new sampler and sets its epoch: it draws what the first one drew.
    resumed = StepSampler(120, 10, seed=1, groups=groups)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_ranks_share_out_each_step():
    from finetune.training.trainer import StepSampler

    groups = groups_of([7, 5, 9])
    whole = list(StepSampler(21, 8, seed=0, groups=groups))
    parts = [list(StepSampler(21, 8, seed=0, rank=rank, world_size=2, groups=groups)) for rank in range(2)]
    for step, *slices in zip(whole, *parts, strict=True):
        assert sorted(step) == sorted(row for part in slices for row in part)


def test_tools_are_compared_by_content():
    other = LAMP | {"name": "other"}
    reordered = dict(reversed(LAMP.items()))
    conversations = [{"tools": [LAMP]}, {"tools": [other]}, {"tools": [reordered]}, {"tools": None}, {}]
    assert tool_sets(conversations, [0, 0, 1, 2, 3, 4]).tolist() == [0, 0, 1, 0, 2, 2]
