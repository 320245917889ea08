"""Plans of optimizer steps: every row keeps its tokens, positions and targets, whatever is shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.passes.plan import MIN_SHARED_TOKENS, common_prefix, make_row, plan_padded, plan_passes
from formats import IGNORE_INDEX


def row(ids, trained):
    labels = [token if i in trained else IGNORE_INDEX for i, token in enumerate(ids)]
    return make_row(ids, labels)


def visible_to(pass_, index):
    """(ids, indices) of the tokens that the token at `index` of a pass attends to, itself included, in order."""
    seen = []
    for segment in pass_.segments:
        if segment.start <= index < segment.end:
            seen.extend(range(segment.start, index + 1))
        elif segment.end <= index < segment.subtree_end:
            seen.extend(range(segment.start, segment.end))
    return [int(pass_.input_ids[i]) for i in sorted(seen)], sorted(seen)


def test_row_is_cut_after_its_last_trained_token():
    cut = row([5, 6, 7, 8, 9], trained={2, 3})
    assert cut.input_ids.tolist() == [5, 6, 7]
    assert cut.positions.tolist() == [1, 2]
    assert cut.targets.tolist() == [7, 8]
    assert cut.length == 5


def test_row_without_trained_token_is_refused():
    with pytest.raises(ValueError, match="no trained token"):
        row([1, 2, 3], trained=set())
    with pytest.raises(ValueError, match="no trained token"):
        row([1, 2, 3], trained={0})  # nothing predicts the first token


def test_shared_prefix_is_computed_once():
    prefix = list(range(100, 200))
    rows = [row([*prefix, i, i + 1, i + 2], trained={101, 102}) for i in (1, 11, 21)]
    (pass_,) = plan_passes(rows, 10_000)
    assert len(pass_.input_ids) == 100 + 3 * 2
    assert [(s.start, s.end, s.subtree_end) for s in pass_.segments] == [
        (0, 100, 106), (100, 102, 102), (102, 104, 104), (104, 106, 106),
    ]  # fmt: skip
    assert pass_.position_ids.tolist() == [*range(100), 100, 101, 100, 101, 100, 101]


def test_nested_prefixes_form_a_tree():
    tools, turn = list(range(1000, 1100)), list(range(2000, 2050))
    rows = [
        row([*tools, *turn, 1, 2], trained={151}),
        row([*tools, *turn, 3, 4], trained={151}),
        row([*tools, 5, 6], trained={101}),
    ]
    (pass_,) = plan_passes(rows, 10_000)
    assert len(pass_.input_ids) == 100 + 50 + 3
    assert sorted(s.end - s.start for s in pass_.segments) == [1, 1, 1, 50, 100]


def test_equal_rows_are_computed_once():
    rows = [row(list(range(50)), trained={49})] * 2
    (pass_,) = plan_passes(rows, 10_000)
    assert len(pass_.input_ids) == 49
    assert pass_.weights.tolist() == [2.0]


def test_row_that_is_a_prefix_adds_no_tokens():
    long = list(range(100))
    (pass_,) = plan_passes([row(long, trained={99}), row(long[:60], trained={59})], 10_000)
    assert len(pass_.input_ids) == 99
    assert sorted(pass_.positions.tolist()) == [58, 98]


def test_budget_splits_a_step_into_sharing_passes():
    prefix = list(range(100, 200))
    rows = [row([*prefix, i, i, i], trained={102}) for i in range(10)]
    passes = plan_passes(rows, tokens_per_pass=110)
    assert [len(pass_.rows) for pass_ in passes] == [5, 5]
    assert all(len(pass_.input_ids) == 110 for pass_ in passes)


def test_full_pass_accepts_only_rows_that_share_much():
    header, prefix = list(range(40)), list(range(100, 200))
    apart = [row([*header, *[200 + i] * 40], trained={79}) for i in range(6)]
    alike = [row([*prefix, i, i, i], trained={102}) for i in range(60)]
    passes = plan_passes([*apart, *alike], 10_000, target_tokens=100)
    assert sorted(len(pass_.rows) for pass_ in passes) == [2, 2, 2, 60]
    assert len(plan_passes([*apart, *alike], 10_000)) == 1
    assert sorted(n for pass_ in passes for n in pass_.rows) == list(range(66))


def test_passes_of_a_step_have_similar_size():
    prefix = list(range(1000, 1100))
    rows = [row([*prefix, *[i] * 50], trained={149}) for i in range(12)]
    full, rest = 100 + 8 * 49, 100 + 4 * 49  # what a budget of 500 would take first, and the rest
    passes = plan_passes(rows, 500)
    assert [len(pass_.rows) for pass_ in passes] == [6, 6]
    assert sum(pass_.input_ids.size for pass_ in passes) == full + rest
    apart = [row([i] * 70, trained={69}) for i in range(8)]  # 69 tokens each: seven reach the target
    assert [len(pass_.rows) for pass_ in plan_passes(apart, 1 << 20, target_tokens=450)] == [4, 4]


def test_row_longer_than_the_budget_gets_its_own_pass():
    rows = [row(list(range(500)), trained={499}), row([7, 8, 9], trained={2})]
    passes = plan_passes(rows, tokens_per_pass=100)
    assert sorted(len(pass_.input_ids) for pass_ in passes) == [2, 499]


def test_nothing_is_shared_without_share_prefix():
    rows = [row([*range(100), i], trained={100}) for i in (1, 2)]
    (pass_,) = plan_passes(rows, 10_000, share_prefix=False)
    assert len(pass_.input_ids) == 200
    assert all(s.subtree_end == s.end for s in pass_.segments)


rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 3),  # which prefix
        st.integers(0, 120),  # how much of it
        st.lists(st.integers(0, 2), min_size=2, max_size=60),  # own tokens, some equal by chance
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(rows_strategy, st.sampled_from([64, 200, 10**9]), st.booleans())
def test_every_token_attends_to_exactly_its_row(drawn, budget, share):
    prefixes = [np.random.default_rng(i).integers(0, 3, 120).tolist() for i in range(4)]
    rows = []
    for which, shared, own, seed in drawn:
        ids = [*prefixes[which][:shared], *own]
        trained = set(np.random.default_rng(seed).integers(1, len(ids), 5).tolist())
        rows.append(row(ids, trained))
    passes = plan_passes(rows, budget, share_prefix=share)
    assert sorted(n for pass_ in passes for n in pass_.rows) == list(range(len(rows)))
    expected: dict = {}
    for r in rows:
        for position, target in zip(r.positions, r.targets, strict=True):
            key = (tuple(r.input_ids[: position + 1].tolist()), int(target))
            expected[key] = expected.get(key, 0) + 1
    actual: dict = {}
    for pass_ in passes:
        for position, target, weight in zip(pass_.positions, pass_.targets, pass_.weights, strict=True):
            visible, indices = visible_to(pass_, position)
            assert pass_.position_ids[indices].tolist() == list(range(len(indices)))
            key = (tuple(visible), int(target))
            actual[key] = actual.get(key, 0) + int(weight)
    assert actual == expected


def test_short_common_prefix_is_not_shared():
    common = list(range(MIN_SHARED_TOKENS - 1))
    rows = [row([*common, i, i], trained={len(common) + 1}) for i in (50, 60)]
    (pass_,) = plan_passes(rows, 10_000)
    assert [s.subtree_end - s.end for s in pass_.segments] == [0, 0]


def test_padded_plan_keeps_every_target():
    rows = [row(list(range(n)), trained={n - 1, n // 2}) for n in (4, 9, 30, 31)]
    batches = plan_padded(rows, tokens_per_pass=64, pad_token_id=99)
    assert sorted(n for b in batches for n in b.rows) == [0, 1, 2, 3]
    for batch in batches:
        flat = batch.input_ids.reshape(-1)
        mask = batch.attention_mask.reshape(-1)
        assert (flat[mask == 0] == 99).all()
        assert mask[batch.positions].all()
        # ids count up from 0 in each row, so the target is the id after the position's own
        assert (flat[batch.positions] + 1 == batch.targets).all()
        assert batch.input_ids.size <= 64 or len(batch.rows) == 1


def test_common_prefix():
    a = np.array([1, 2, 3], dtype=np.int32)
    assert common_prefix(a, np.array([1, 2, 4], dtype=np.int32)) == 2
    assert common_prefix(a, a[:2]) == 2
    assert common_prefix(a, np.array([9], dtype=np.int32)) == 0
