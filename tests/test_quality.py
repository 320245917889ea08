"""The quality benchmark: held-out tools are not trained, snapshots lie within their budgets, verdicts of its tests."""

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


def test_snapshots_lie_within_their_budgets(tmp_path, monkeypatch):
    """Steps of 20 s: a minute ends with step 3, two minutes with step 6; what the callback takes does not count."""
    import torch
    from peft import LoraConfig, get_peft_model, load_peft_weights

    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(quality.time, "process_time", lambda: next(clock))
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"]))
    weight = next(value for name, value in model.named_parameters() if "lora_B" in name)
    snapshots = quality.make_snapshots(tmp_path, [1, 2], [2])
    control = Namespace(should_training_stop=False)
    snapshots.on_train_begin(None, None, control, model=model)
    for step in range(1, 20):
        with torch.no_grad():
            weight.fill_(step)
        snapshots.on_step_end(None, Namespace(global_step=step), control, model=model)
        if control.should_training_stop:
            break
    assert {name: saved["step"] for name, saved in snapshots.saved.items()} == {
        "step_2": 2,
        "minute_1": 3,
        "minute_2": 6,
    }
    assert step == 7
    saved = load_peft_weights(str(tmp_path / "minute_1"), device="cpu")
    assert {float(value.unique()) for name, value in saved.items() if "lora_B" in name} == {3.0}


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
