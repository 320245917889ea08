"""Plans of optimizer steps: every row keeps its tokens, its positions and its targets, whatever is shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.passes.plan import MIN_SHARED, common_prefix, make_row, plan_padded, plan_passes
from formats import IGNORE_INDEX


def row(ids, trained):
    labels = [token if i in trained else IGNORE_INDEX for i, token in enumerate(ids)]
    return make_row(ids, labels)


def path_of(one, index):
    """Token ids that the token at `index` of a pass can see, itself included, oldest first."""
    seen = []
    for segment in one.segments:
        if segment.start <= index < segment.end:
            seen.extend(range(segment.start, index + 1))
        elif segment.end <= index < segment.subtree_end:
            seen.extend(range(segment.start, segment.end))
    return [int(one.input_ids[i]) for i in sorted(seen)], sorted(seen)


def test_row_ends_at_the_token_that_predicts_the_last_trained_one():
    made = row([5, 6, 7, 8, 9], trained={2, 3})
    assert made.input_ids.tolist() == [5, 6, 7]
    assert made.positions.tolist() == [1, 2]
    assert made.targets.tolist() == [7, 8]
    assert made.length == 5


def test_row_without_trained_tokens_is_refused():
    with pytest.raises(ValueError, match="no token"):
        row([1, 2, 3], trained=set())
    with pytest.raises(ValueError, match="no token"):
        row([1, 2, 3], trained={0})  # nothing predicts the first token


def test_shared_prefix_is_computed_once():
    prefix = list(range(100, 200))
    rows = [row([*prefix, i, i + 1, i + 2], trained={101, 102}) for i in (1, 11, 21)]
    (one,) = plan_passes(rows, 10_000)
    assert len(one.input_ids) == 100 + 3 * 2
    assert [(s.start, s.end, s.subtree_end) for s in one.segments] == [
        (0, 100, 106), (100, 102, 102), (102, 104, 104), (104, 106, 106),
    ]  # fmt: skip
    assert one.position_ids.tolist() == [*range(100), 100, 101, 100, 101, 100, 101]


def test_nested_prefixes_make_a_tree():
    tools, turn = list(range(1000, 1100)), list(range(2000, 2050))
    rows = [
        row([*tools, *turn, 1, 2], trained={151}),
        row([*tools, *turn, 3, 4], trained={151}),
        row([*tools, 5, 6], trained={101}),
    ]
    (one,) = plan_passes(rows, 10_000)
    assert len(one.input_ids) == 100 + 50 + 3
    assert sorted(s.end - s.start for s in one.segments) == [1, 1, 1, 50, 100]


def test_equal_rows_are_computed_once_and_weigh_twice():
    rows = [row(list(range(50)), trained={49})] * 2
    (one,) = plan_passes(rows, 10_000)
    assert len(one.input_ids) == 49
    assert one.weights.tolist() == [2.0]


def test_a_row_that_is_all_prefix_adds_no_tokens():
    long = list(range(100))
    (one,) = plan_passes([row(long, trained={99}), row(long[:60], trained={59})], 10_000)
    assert len(one.input_ids) == 99
    assert sorted(one.positions.tolist()) == [58, 98]


def test_budget_cuts_a_step_and_shares_again_in_each_pass():
    prefix = list(range(100, 200))
    rows = [row([*prefix, i, i, i], trained={102}) for i in range(10)]
    passes = plan_passes(rows, tokens_per_pass=110)
    assert [len(one.rows) for one in passes] == [5, 5]
    assert all(len(one.input_ids) == 110 for one in passes)


def test_a_full_pass_takes_no_row_that_shares_little_with_it():
    frame, prefix = list(range(40)), list(range(100, 200))
    apart = [row([*frame, *[200 + i] * 40], trained={79}) for i in range(6)]
    alike = [row([*prefix, i, i, i], trained={102}) for i in range(60)]
    passes = plan_passes([*apart, *alike], 10_000, enough=100)
    assert sorted(len(one.rows) for one in passes) == [2, 2, 2, 60]
    assert len(plan_passes([*apart, *alike], 10_000)) == 1
    assert sorted(n for one in passes for n in one.rows) == list(range(66))


def test_passes_of_a_step_are_of_like_size():
    prefix = list(range(1000, 1100))
    rows = [row([*prefix, *[i] * 50], trained={149}) for i in range(12)]
    full, rest = 100 + 8 * 49, 100 + 4 * 49  # what a budget of 500 would take first, and what it would leave
    passes = plan_passes(rows, 500)
    assert [len(one.rows) for one in passes] == [6, 6]
    assert sum(one.input_ids.size for one in passes) == full + rest
    apart = [row([i] * 70, trained={69}) for i in range(8)]  # 69 tokens each: seven would be enough, one would be left
    assert [len(one.rows) for one in plan_passes(apart, 1 << 20, enough=450)] == [4, 4]


def test_a_row_longer_than_the_budget_gets_its_own_pass():
    rows = [row(list(range(500)), trained={499}), row([7, 8, 9], trained={2})]
    passes = plan_passes(rows, tokens_per_pass=100)
    assert sorted(len(one.input_ids) for one in passes) == [2, 499]


def test_nothing_is_shared_when_sharing_is_off():
    rows = [row([*range(100), i], trained={100}) for i in (1, 2)]
    (one,) = plan_passes(rows, 10_000, share_prefix=False)
    assert len(one.input_ids) == 200
    assert all(s.subtree_end == s.end for s in one.segments)


rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 3),  # which long beginning
        st.integers(0, 120),  # how much of it
        st.lists(st.integers(0, 2), min_size=2, max_size=60),  # own tokens: few values, so accidental prefixes happen
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(rows_strategy, st.sampled_from([64, 200, 10**9]), st.booleans())
def test_every_token_sees_exactly_its_own_row(drawn, budget, share):
    beginnings = [np.random.default_rng(i).integers(0, 3, 120).tolist() for i in range(4)]
    rows = []
    for which, shared, own, seed in drawn:
        ids = [*beginnings[which][:shared], *own]
        trained = set(np.random.default_rng(seed).integers(1, len(ids), 5).tolist())
        rows.append(row(ids, trained))
    passes = plan_passes(rows, budget, share_prefix=share)
    assert sorted(n for one in passes for n in one.rows) == list(range(len(rows)))
    wanted: dict = {}
    for r in rows:
        for position, target in zip(r.positions, r.targets, strict=True):
            key = (tuple(r.input_ids[: position + 1].tolist()), int(target))
            wanted[key] = wanted.get(key, 0) + 1
    got: dict = {}
    for one in passes:
        for position, target, weight in zip(one.positions, one.targets, one.weights, strict=True):
            seen, where = path_of(one, position)
            assert one.position_ids[where].tolist() == list(range(len(where)))
            key = (tuple(seen), int(target))
            got[key] = got.get(key, 0) + int(weight)
    assert got == wanted


def test_short_common_runs_are_not_worth_a_branch():
    common = list(range(MIN_SHARED - 1))
    rows = [row([*common, i, i], trained={len(common) + 1}) for i in (50, 60)]
    (one,) = plan_passes(rows, 10_000)
    assert [s.subtree_end - s.end for s in one.segments] == [0, 0]


def test_padded_plan_keeps_every_target():
    rows = [row(list(range(n)), trained={n - 1, n // 2}) for n in (4, 9, 30, 31)]
    batches = plan_padded(rows, tokens_per_pass=64, pad_token_id=99)
    assert sorted(n for b in batches for n in b.rows) == [0, 1, 2, 3]
    for batch in batches:
        flat = batch.input_ids.reshape(-1)
        mask = batch.attention_mask.reshape(-1)
        assert (flat[mask == 0] == 99).all()
        assert mask[batch.positions].all()
        # ids count upwards from 0 in each row, so the target is the id after the position's own
        assert (flat[batch.positions] + 1 == batch.targets).all()
        assert batch.input_ids.size <= 64 or len(batch.rows) == 1


def test_common_prefix():
    a = np.array([1, 2, 3], dtype=np.int32)
    assert common_prefix(a, np.array([1, 2, 4], dtype=np.int32)) == 2
    assert common_prefix(a, a[:2]) == 2
    assert common_prefix(a, np.array([9], dtype=np.int32)) == 0
