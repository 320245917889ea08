"""--eval_calls: calls scored at each evaluation of a run, and the checkpoint that is kept by them."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from finetune.reading.conversations import load_conversations
from formats import get_format
from tests import parts
from tests.helpers import lazy
from tests.training_runs import config_of, conversation, log_rows, run, write_rows

call_scores = lazy("finetune.training.call_scores")
trainer_module = lazy("finetune.training.trainer")
generate = lazy("finetune.generation.generate")


class Oracle:
    """Answers in the place of `generate`: the right call, a wrong argument from item `wrong_from` on."""

    def __init__(self, tokenizer, wrong_from):
        self.tokenizer, self.wrong_from, self.sizes, self.answered = tokenizer, wrong_from, [], 0

    def __call__(self, model, prompts, *, decoding):
        self.sizes.append(len(prompts))
        results = []
        for prompt in prompts:
            city = self.tokenizer.decode(prompt).rpartition("Weather in ")[2].partition(",")[0]
            city = city if self.answered < self.wrong_from else "Nowhere"
            self.answered += 1
            text = "<tool_call>\n" + json.dumps({"name": "get_weather", "arguments": {"city": city}}) + "\n</tool_call>"
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            results.append(generate.Generation(ids, "stop", 0.1))
        report = generate.GenerationReport("shared_prefix")
        report.results = results
        return report


@pytest.fixture
def held_out(tmp_path):
    return load_conversations([str(write_rows(tmp_path / "rows.jsonl", map(conversation, range(40))))])


def scorer_of(held_out, **options):
    tokenizer = parts.tokenizer("smollm2")
    flags = {"count": 40, "budget": 0.1, "seed": 0, "longest": 9000}
    end = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return call_scores.CallScorer(
        held_out, range(len(held_out.conversations)), tokenizer, get_format("chatml", tokenizer), end, **flags | options
    )


def test_accuracies_are_those_of_the_answers(held_out, monkeypatch):
    monkeypatch.setattr(generate, "generate", Oracle(parts.tokenizer("smollm2"), wrong_from=30))
    scores = scorer_of(held_out).score(None, seconds=1e9)
    assert scores == {"eval_tool_name_accuracy": 1.0, "eval_parameter_accuracy": 0.75}


def test_budget_decides_at_the_first_evaluation(held_out, monkeypatch):
    """A second per answer, 10% of 80 seconds: 4 fit; the 8 that would follow do not."""
    oracle, clock = Oracle(parts.tokenizer("smollm2"), wrong_from=99), [0.0]
    monkeypatch.setattr(call_scores.time, "monotonic", lambda: clock[0] + oracle.answered)
    monkeypatch.setattr(generate, "generate", oracle)
    chosen = []
    scorer = scorer_of(held_out)
    scorer.begin(on_chosen=chosen.append)
    scorer.score(None, seconds=80)
    scorer.score(None, seconds=10_000)  # later evaluations answer the same requests
    assert (oracle.sizes, chosen) == ([4, 4], [4])
    clock[0] = 72.0
    assert scorer.share() == pytest.approx(8 / 80)


def test_processes_decide_alike(held_out, monkeypatch):
    """Two processes whose clocks say 80 and 0 seconds stop at the same request."""
    oracle = Oracle(parts.tokenizer("smollm2"), wrong_from=99)
    monkeypatch.setattr(generate, "generate", oracle)
    monkeypatch.setattr(call_scores.time, "monotonic", lambda: float(oracle.answered))
    chosen = []
    for seconds, other in ((80, 0), (0, 80)):
        oracle.answered = 0
        monkeypatch.setattr(call_scores.distributed, "size", lambda: 2)
        monkeypatch.setattr(
            call_scores.distributed, "totals",
            lambda values, other=other: [2 * values[0], values[1] + 0.1 * other] if len(values) == 2 else values,
        )  # fmt: skip
        scorer = scorer_of(held_out)
        scorer.begin(on_chosen=chosen.append)
        scorer.score(None, seconds=seconds)
    assert chosen[0] == chosen[1] < 40


def test_items_without_a_usable_prompt_are_replaced(held_out, caplog):
    """N requests that can be answered, not N of which some cannot."""
    for row in held_out.conversations[:36]:
        row["messages"][0]["content"] += " and tomorrow" * 200
    caplog.set_level("INFO")
    scorer = scorer_of(held_out, count=4, longest=400)
    assert len(scorer.prompts.items) == 4 and not caplog.records
    assert len(scorer_of(held_out, count=10, longest=400).prompts.items) == 4
    assert "--eval_calls 10: only 4 requests held out" in caplog.text and "rows.jsonl row" in caplog.text


def test_formats_whose_calls_cannot_be_read_are_refused(held_out, monkeypatch):
    unreadable = replace(get_format("chatml"), read_calls=None)
    monkeypatch.setattr("tests.test_call_scores.get_format", lambda *_: unreadable)
    with pytest.raises(UserError, match=r"--eval_calls: .*; choose another --format, or omit --eval_calls"):
        scorer_of(held_out)


def test_accuracies_of_a_loss_that_is_not_finite_are_never_the_best():
    trainer = SimpleNamespace(call_scorer=object())
    scores = trainer_module.SandwichTrainer._score_calls(trainer, is_finite=False)
    assert set(scores) == {"eval_tool_name_accuracy", "eval_parameter_accuracy"}
    assert all(value != value for value in scores.values())


@pytest.mark.parametrize(
    "evaluations,best",
    [
        ([(0.75, 0.5), (0.75, 0.25), (0.5, 0.125)], 2),  # (accuracy, loss)
        ([(0.75, 0.25), (0.75, 0.5)], 1),
        ([(0.5, 0.25), (0.75, 0.5)], 2),
        ([(0.75, math.nan), (0.75, 0.5)], 1),
        ([(0.75, 0.5), (math.nan, 0.25)], 1),
    ],
)
def test_of_equal_accuracies_the_lower_loss_is_the_best(evaluations, best):
    import transformers

    state = transformers.TrainerState()
    args = transformers.TrainingArguments(
        "unused", metric_for_best_model="eval_parameter_accuracy", greater_is_better=True
    )
    trainer = object.__new__(trainer_module.SandwichTrainer)
    trainer.state, trainer.args = state, args
    for state.global_step, (accuracy, loss) in enumerate(evaluations, 1):
        metrics = {"eval_parameter_accuracy": accuracy, "eval_loss": loss}
        state.log_history.append({**metrics, "step": state.global_step})
        trainer._determine_best_metric(metrics, None)
    assert state.best_global_step == best


def test_rows_without_calls_are_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    with pytest.raises(UserError, match="no row held out for evaluation has a call"):
        scorer_of(load_conversations([str(write_rows(tmp_path / "rows.jsonl", [row]))]))


def test_run_logs_the_scores(rows, tiny_model, tmp_path):
    flags = ["--model", tiny_model, "--dataset", rows, "--eval_fraction", "0.25", "--format", "chatml", "--batch_size",
             2, "--grad_accum", 1, "--eval_steps", 2, "--save_steps", 2, "--experiments_dir", tmp_path,
             "--eval_calls", 8, "--eval_calls_budget", "0.9", "--metric_for_best_model", "eval_parameter_accuracy",
             ]  # fmt: skip
    whole = run(*flags, "--max_steps", 4, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "--eval_calls took" in whole.stderr
    config = config_of(tmp_path / "whole")
    assert config["scored_calls"] == config["eval_data"]["rows"] > 0  # one call in each row that is held out
    assert 0 < config["result"]["eval_calls_share"] < 1
    names = ("step", "eval_loss", "eval_tool_name_accuracy", "eval_parameter_accuracy")
    values = [[row[name] for name in names] for row in log_rows(tmp_path / "whole")]
    assert [row[2:] for row in values] == [["", ""], ["0.0", "0.0"], ["", ""], ["0.0", "0.0"]]
    # No checkpoint answers better than another one, so that of the lowest loss is kept.
    losses = {float(loss): int(step) for step, loss, *_ in values if loss}
    assert config["ending"]["adapter_step"] == losses[min(losses)] == 4


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--eval_calls", 4], "--eval_calls needs evaluation rows"),
        (
            [
                "--eval_fraction",
                "0.5",
                "--eval_calls",
                4,
                "--metric_for_best_model",
                "eval_parameter_accuracy",
                "--save_steps",
                0,
            ],
            "--metric_for_best_model needs checkpoints, and --save_steps is 0",
        ),
        (["--eval_fraction", "0.5", "--metric_for_best_model", "eval_parameter_accuracy"], "needs --eval_calls N"),
    ],
)
def test_flags_that_lack_another_are_refused(flags, message, tiny_model, rows):
    done = run("--model", tiny_model, "--dataset", rows, *flags)
    assert done.returncode == 2
    assert message in done.stderr
