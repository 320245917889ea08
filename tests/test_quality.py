"""The quality benchmark: held-out tools are not trained, runs end with their budgets, verdicts of its tests."""

import json
from argparse import Namespace

import pytest

from benchmarks import quality, quality_report


def test_no_held_out_tool_is_trained():
    tools = [["a", "b"], ["x"], ["b", "c"], ["d"], ["d", "e"], ["c"], ["e", "f"], ["f", "a"]]
    trained, held_out = quality.split_by_tools(tools)
    assert (trained, held_out) == ([0, 2, 3, 4, 5, 6, 7], [1])
    # The last row joins the families of a and of d.
    assert quality.split_by_tools([*tools[:-1], ["a"]]) == ([0, 2, 5, 7], [1, 3, 4, 6])


def test_held_out_rows_of_live_multiple():
    pytest.importorskip("bfcl_eval")
    trained, items = quality.conversations_and_items("live_multiple", 0)
    assert len(trained) + len(items) == 1053
    known = {tool["function"]["name"] for one in trained for tool in one["tools"]}
    assert not known & {tool["function"]["name"] for item in items for tool in item.tools}


def test_all_trainers_get_the_same_order():
    first, again = (quality.steps_to_train("demo", 1, 8, 3) for _ in range(2))
    assert first == again
    assert first != quality.steps_to_train("demo", 2, 8, 3)
    assert [len(step) for step in first] == [8, 8, 8]


def train_steps(callback, monkeypatch) -> tuple[list[float], list[float]]:
    """Steps of 20 s, each of which writes its number into the weights: (learning rates, weights that are kept)."""
    import torch
    from peft import LoraConfig, get_peft_model

    clock = [0]
    monkeypatch.setattr(quality.time, "process_time", lambda: clock[0])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    weight = next(value for name, value in model.named_parameters() if "lora_B" in name)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    control, rates = Namespace(should_training_stop=False), []
    callback.on_train_begin(None, None, control, model=model)
    for step in range(20):
        callback.on_step_begin(None, Namespace(global_step=step), control, model=model, optimizer=optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        clock[0] += 20
        weight.data.fill_(step + 1)
        callback.on_step_end(None, Namespace(global_step=step + 1), control, model=model)
        if control.should_training_stop:
            break
    return rates, sorted({float(value.unique()) for name, value in callback.kept.items() if "lora_B" in name})


def test_run_ends_with_its_minutes(monkeypatch):
    """A minute has three steps of 20 s; the fourth, which ends after it, does not count."""
    budget = quality.make_budget(0.6, minutes=1)
    rates, kept = train_steps(budget, monkeypatch)
    assert rates == pytest.approx([0.6, 0.4, 0.2, 0.0])
    assert (budget.at, kept, budget.ended) == ({"step": 3, "cpu_minutes": 1.0}, [3.0], True)


def test_run_ends_with_its_steps(monkeypatch):
    budget = quality.make_budget(0.6, steps=6)
    rates, kept = train_steps(budget, monkeypatch)
    assert rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert (budget.at, kept, budget.ended) == ({"step": 6, "cpu_minutes": 2.0}, [6.0], True)


def test_trained_budgets_are_not_trained_again(tmp_path, monkeypatch):
    """A rerun trains only the budgets that a file lacks, and refuses a file made with another rate."""
    started = []
    monkeypatch.setattr(quality, "child", lambda *words: started.append(words[0]))
    command = ["--tasks", "demo", "--trainers", "ours", "--seeds", "0", "--minutes", "1", "--equal_steps", "4"]
    command += ["--out", str(tmp_path)]
    done = run("ours", [1], step_rows=8, max_steps=100, items=150, lr=2e-3)
    file = tmp_path / "demo_ours_0.json"
    file.write_text(json.dumps(done), encoding="utf-8")
    assert quality.main(command) == 0 and started == []
    assert quality.main([*command, "--lr", "0.1"]) == 2
    del done["saved"]["step_4"]
    file.write_text(json.dumps(done), encoding="utf-8")
    assert quality.main(command) == 0 and started == ["train"]


def run(trainer: str, right: list[int], **more) -> dict:
    saved = {"step": 4, "cpu_minutes": 0.9, "right": right, "tool": [1] * len(right), "examples": ["secret"]}
    origins = [["rows.jsonl", row, 1] for row in range(len(right))]
    return {"task": "demo", "trainer": trainer, "seed": 0, "minutes": [1], "equal_steps": [4], "origins": origins,
            "saved": {"minute_1": saved, "step_4": dict(saved)}, **more}  # fmt: skip


def test_record_says_better_and_not_worse(tmp_path):
    ours, plain = run("ours", [1] * 30 + [0] * 10), run("plain", [0] * 20 + [1] * 10 + [0] * 10)
    plain["saved"]["step_4"]["right"] = ours["saved"]["step_4"]["right"]
    for one in (ours, plain):
        (tmp_path / f"demo_{one['trainer']}_0.json").write_text(json.dumps(one), encoding="utf-8")
    quality_report.write_record(tmp_path, tmp_path / "record", {"processor": "a"})
    lines = (tmp_path / "record.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if "all right |" in line and "against" not in line and "CPU" not in line]
    assert [line.split(" | ")[-1] for line in rows] == ["better |", "not worse |"]
    assert "+0.500" in rows[0] and "+0.000" in rows[1]
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["runs"][0]["saved"]["minute_1"]["right"] == "1" * 30 + "0" * 10
    assert "secret" not in json.dumps(record)
    assert (tmp_path / "record.png").stat().st_size > 5_000


def test_unfinished_runs_are_not_recorded(tmp_path):
    unscored = run("ours", [1])
    del unscored["saved"]["step_4"]["right"]
    (tmp_path / "demo_ours_0.json").write_text(json.dumps(unscored), encoding="utf-8")
    with pytest.raises(quality.UserError, match="no finished runs"):
        quality_report.write_record(tmp_path, tmp_path / "record", {})
