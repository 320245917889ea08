"""The training rows that a run fits least: the real 135M model finds a spoiled call, with the place that differs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.evaluation import suspects
from finetune.passes.plan import Predictions
from tests import training_runs
from tests.scripts import run_script


def called(*calls: tuple[str, dict]) -> dict:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": "", "tool_calls": made}


@pytest.mark.parametrize(
    ("marked", "where"),
    [
        ('<tool_call>\n{"name": "se^t_load", "arguments": {', "name of the tool"),
        ('{"name": "set_load", "argum^ents": {"node": 3', "node"),
        ('{"name": "set_load", "arguments": {"node": 3^, "force": {"x": -2.5', "force.x"),
        ('{"name": "set_load", "arguments": {"node": 3, "force": {"x": -2^.5, "unit"', "force.x"),
        ('"node": 3, "force": {"x": -2.5, "unit": "k^N"}}}', "force.unit"),
        ('"node": 3, "force": {"x": -2.5, "unit": "kN"}^}}\n</tool_call>', "after force.unit"),
    ],
)
def test_place_in_calls(marked, where):
    message = called(("set_load", {"node": 3, "force": {"x": -2.5, "unit": "kN"}}))
    full = (
        '<tool_call>\n{"name": "set_load", "arguments": {"node": 3, "force": {"x": -2.5, "unit": "kN"}}}\n</tool_call>'
    )
    start = full.index(marked.replace("^", ""))
    assert suspects.place_in_calls(message, full, start + marked.index("^")) == where


def test_place_in_the_second_of_parallel_calls():
    message = called(("lamp", {"room": "hall"}), ("lamp", {"room": "attic"}))
    text = "[lamp(room='hall'), lamp(room='attic')]"
    assert suspects.place_in_calls(message, text, text.index("attic")) == "room"
    assert suspects.place_in_calls(message, text, len(text) - 1) == "after room"
    assert suspects.place_in_calls({"role": "assistant", "content": "Which?"}, "Which?", 2) == "text"


def predictions(log_p: list[float], best: list[float]):
    return Predictions(np.array(log_p), np.array(best), np.zeros(len(log_p), dtype=int))


def test_scores():
    """The margin is the largest of a turn, averaged over the adapters; the excess is that over the usual one."""
    turns = [
        suspects.Turn("a", row, 1, called((name, {})), 0, 0, 2, [predictions(*early), predictions(*late)])
        for row, name, early, late in (
            (1, "x", ([-1.0, -4.0], [-1.0, -0.5]), ([-0.1, -2.0], [-0.1, -0.2])),
            (2, "x", ([-1.0, -1.0], [-1.0, -1.0]), ([-1.0, -1.0], [-1.0, -1.0])),
            (3, "y", ([-2.0, -2.0], [-0.5, -2.0]), ([-2.0, -2.0], [-2.0, -2.0])),
        )
    ]
    suspects._score(turns)
    assert [turn.scores["margin"] for turn in turns] == pytest.approx([(3.5 + 1.8) / 2, 0.0, 0.75])
    assert [turn.scores["loss"] for turn in turns] == pytest.approx([7.1 / 4, 1.0, 2.0])
    # Tools with few turns have the median of all calls.
    assert [turn.scores["excess_margin"] for turn in turns] == pytest.approx([1.9, -0.75, 0.0])
    assert [turn.scores["excess_loss"] for turn in turns] == pytest.approx([0.0, -0.775, 0.225])


def test_a_kind_of_answer_that_is_not_learned_is_not_suspect():
    """All texts have large margins; one call has a smaller one, which is large for its tool."""
    margins = {"(text)": [9.0] * 6, "lamp": [0.1, 0.1, 0.2, 0.1, 4.0]}
    turns = [
        suspects.Turn(
            "a", row, 1, {"role": "assistant", "content": "x"} if tool == "(text)" else called((tool, {})), 0, 0, 1,
            [predictions([-margin], [0.0])],
        )
        for tool, values in margins.items() for row, margin in enumerate(values)
    ]  # fmt: skip
    suspects._score(turns)
    assert max(turns, key=lambda turn: turn.scores[suspects.RANKED_BY]) is turns[-1]


def test_trained_spans_belong_to_their_turns():
    """Of rows with several turns; a row that a weight repeats is listed once."""
    from finetune.encoding.encode import encode_conversations
    from finetune.reading.load_result import LoadResult
    from finetune.reading.normalize import normalize_row
    from formats import get_format
    from tests import parts

    tokenizer = parts.tokenizer("smollm2")
    rows = [normalize_row(training_runs.conversation(number)) for number in range(3)]
    encoded = encode_conversations(rows, tokenizer, get_format("chatml", tokenizer), progress=False)
    loaded = LoadResult(rows, [("a", number) for number in (1, 2, 2)])  # a weight repeats the second row
    found = []
    for _, labels in encoded.sequences:
        count = sum(label >= 0 for label in labels)
        found.append(predictions([-1.0] * count, [-0.5] * count))
    turns = list(suspects._turns(loaded, encoded.rows, encoded.sequences, [found], ()))
    assert [(turn.row, turn.turn, turn.tool) for turn in turns] == [
        (1, 1, "get_weather"), (1, 3, "(text)"), (2, 1, "get_weather"), (2, 3, "(text)"),
    ]  # fmt: skip
    for turn in turns:
        text = tokenizer.decode(encoded.sequences[turn.sequence][0][turn.first : turn.end])
        assert (turn.message["content"] or turn.tool) in text and text.count("<|im_end|>") == 1
        assert len(turn.margins()) == turn.end - turn.first

    # Without one of its answers, the turns of a row cannot be told apart.
    ids, labels = encoded.sequences[0]
    trained = np.flatnonzero(np.asarray(labels) >= 0)
    end = int(trained[np.flatnonzero(np.diff(trained) > 1)[0]]) + 1
    assert not list(suspects._turns(loaded, encoded.rows, [(ids, [-100] * end + labels[end:])], [found], ()))


@pytest.mark.parametrize(
    ("steps", "adapter", "ending", "early"),
    [
        ([6], "final_model", 6, None),  # the same weights twice
        ([3, 6], "final_model", 6, 3),
        ([3, 6], "final_model", 3, None),  # --load_best kept the first
        ([3, 6], "checkpoint-6", None, 3),  # a run that was stopped
        ([3], "checkpoint-3", None, None),
        ([3, 6], "final_model", None, 3),  # of an older version
    ],
)
def test_early_checkpoint(tmp_path, steps, adapter, ending, early):
    paths = [tmp_path / f"checkpoint-{step}" for step in steps]
    for path in paths:
        path.mkdir()
        (path / "adapter_model.safetensors").touch()
    experiment = SimpleNamespace(
        checkpoints=lambda: paths, config={"ending": {"adapter_step": ending}} if ending else {}
    )
    found = suspects.early_checkpoint(SimpleNamespace(experiment=experiment, adapter=tmp_path / adapter))
    assert (found and found.name) == (early and f"checkpoint-{early}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Thirty steps of the 135M model on twenty-four rows of one tool, the row 5 of which asks for another city."""
    folder = tmp_path_factory.mktemp("suspects")
    rows = [training_runs.conversation(number) for number in range(24)]
    rows[4]["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": "Paris"})
    path = training_runs.write_rows(folder / "rows.jsonl", rows)
    result = training_runs.run(
        "--model", "smollm2-135m", "--dataset", path, "--format", "chatml", "--batch_size", 8, "--grad_accum", 1,
        "--max_steps", 12, "--save_steps", 6, "--lr", "2e-3", "--rank", 8, "--experiments_dir", folder, "--name", "run",
        "--max_grad_norm", 0.5, "--warmup_steps", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_planted_error_is_found(run):
    result = run_script("evaluate_lora.py", run, "--suspects", 3)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (run / "evaluation" / "suspects.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 48, "every turn once"
    first = lines[0]
    assert (first["row"], first["turn"], first["tool"], first["where"]) == (5, 1, "get_weather", "city")
    assert first["trained"].startswith("Paris") and first["model"].startswith("Seoul")
    assert len({line["row"] for line in lines[:3]}) == 3
    table = (run / "evaluation" / "suspects.md").read_text("utf-8")
    assert "checkpoint-6" in table and "rows.jsonl row 5, turn 1" in table

    with (run.parent / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(training_runs.conversation(99)) + "\n")
    changed = run_script("evaluate_lora.py", run, "--suspects", 3)
    assert changed.returncode == 2 and "the training rows of" in changed.stderr and "have changed" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dataset", "x.jsonl"], "--suspects and --dataset exclude each other"),
        (["--ranks", "2"], "--suspects and --ranks exclude each other"),
        (["--decisions"], "--suspects and --decisions exclude each other"),
        (["--only", "base"], "--suspects and --only exclude each other"),
        (["--limit", "10"], "--suspects lists rows of the whole training data; omit --limit"),
    ],
)
def test_flags_that_exclude_each_other(arguments, reason, capsys):
    import evaluate_lora

    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(evaluate_lora.main(["RUN", "--suspects", "5", *arguments]))
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
