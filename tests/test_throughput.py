"""The throughput benchmark compares equal work: its rows are as described, and another loss is reported."""

import pytest

from benchmarks import throughput
from benchmarks.throughput_parts.rows import WORKLOADS, load, save, steps_of
from finetune.models.bundled import smollm2_dir
from finetune.passes.plan import make_row, plan_passes
from formats import get_format


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir())


def computed_tokens(steps):
    plans = [plan_passes([make_row(*row) for row in step], 10**9) for step in steps]
    return sum(one.input_ids.size for plan in plans for one in plan)


@pytest.mark.parametrize("workload", ["fixed_tools", "multi_turn", "short_qa"])
def test_rows_are_as_described(workload, tokenizer, tmp_path):
    fmt = get_format("chatml", tokenizer=tokenizer)
    steps = steps_of(workload, tokenizer, fmt, 2, 8)
    assert [len(step) for step in steps] == [8, 8]
    assert steps == steps_of(workload, tokenizer, fmt, 2, 8)
    save(tmp_path / "steps.json", steps)
    assert [[tuple(row) for row in step] for step in load(tmp_path / "steps.json")] == steps
    lengths = [len(ids) for step in steps for ids, _ in step]
    share = computed_tokens(steps) / sum(lengths)
    if workload == "fixed_tools":
        assert 1400 + 60 < sum(lengths) / 16 < 1400 + 75 + 170  # schemas, own tokens, chat template
        assert share < 0.2
    else:
        assert share > 0.7  # only the template is shared, and tokens after the last trained one are dropped


def test_grouped_live_multiple_shares_prefixes(tokenizer):
    pytest.importorskip("bfcl_eval")
    fmt = get_format("chatml", tokenizer=tokenizer)
    share = {}
    for workload in ("live_multiple", "live_multiple_shuffle"):
        steps = steps_of(workload, tokenizer, fmt, 3, 8)
        share[workload] = computed_tokens(steps) / sum(len(ids) for step in steps for ids, _ in step)
    assert share["live_multiple"] < 0.5 < share["live_multiple_shuffle"]


def test_method_with_another_loss_is_reported():
    same = {"seconds_per_step": 2.0, "cpu_seconds_per_step": 4.0, "first_loss": 1.0}
    results = {
        "stock": same | {"seconds_per_step": 10.0},
        "ours": dict(same),
        "packed": same | {"first_loss": 1.3},
        "plain": {"error": "no"},
    }
    throughput.compare_with_stock(results)
    assert results["ours"]["times_stock"] == 5
    assert "note" not in results["ours"]
    assert "1.3000, not 1.0000" in results["packed"]["note"]
    assert "times_stock" not in results["plain"]


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no fast; there are"):
        throughput.selected("stock,fast", ["stock", "ours"], "--ways")
    assert throughput.selected("all", list(WORKLOADS), "--workload") == list(WORKLOADS)
