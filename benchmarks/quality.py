"""Quality per minute: ours, Unsloth's trainer as it comes and Transformers + PEFT train the same model on the same rows
in the same order, for equal CPU minutes and for equal steps; the adapters answer the same held-out requests.

    python benchmarks/quality.py --tasks demo --seeds 0 1 2 --out quality
    python benchmarks/quality.py --out quality --record 2026-12-01_quality_cpu     writes .json, .md and .png

Each budget is a run of its own whose learning rate falls linearly to zero over it, as for somebody who has that time.
Minutes are of one thread's processor time from the start of training (imports, loading, tokenizing and scoring not
counted), so that other programs on the machine change them little; the adapter is that of the last step finished
within them. A rerun of the same command trains and scores only what --out lacks; several at a time may share --out if
their tasks or seeds differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.quality_report import NAMES, write_record  # noqa: E402
from benchmarks.throughput import machine, selected  # noqa: E402
from benchmarks.throughput_parts import rows as throughput_rows  # noqa: E402
from finetune.errors import UserError, one_line_errors  # noqa: E402
from finetune.files import write_text_atomic  # noqa: E402

MODEL, FORMAT = "smollm2-135m", "chatml"
TASKS = {
    "demo": "the demo's five GEN NX tools, every step with the same mix of answers; held out: its rows of other "
    "wordings; right: tools and all arguments, or no call where a question or a refusal is expected",
    "live_multiple": "BFCL live_multiple, rows with the same tools in the same step; held out: tool sets that share no "
    "tool with the trained ones; right: accepted by BFCL's checker",
}
ORDERS = {"demo": "spread_answers", "live_multiple": "group_tools"}
MAX_TOKENS = 1024  # longer rows of live_multiple are omitted, on both sides


def conversations_and_items(task: str, limit: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """(conversations to train on, `limit` held-out items)."""
    from finetune.evaluation.items import load_items

    if task == "demo":
        from finetune.reading.conversations import load_conversations

        samples = ROOT / "data" / "samples"
        items = load_items([samples / "demo_heldout.jsonl"])
        return load_conversations([samples / "demo_train.jsonl"]).conversations, items[:limit]
    from finetune.evaluation import bfcl

    items = bfcl.load_items("live_multiple")
    trained, held_out = split_by_tools([[tool["function"]["name"] for tool in item.tools] for item in items])
    random.Random(0).shuffle(held_out)
    return [throughput_rows.conversation_of(items[at]) for at in trained], [items[at] for at in held_out]


def split_by_tools(tools: Sequence[Sequence[str]]) -> tuple[list[int], list[int]]:
    """(rows of the largest family, all others); rows that share a tool, directly or through others, are a family."""
    family: dict[str, set[str]] = {}
    for names in tools:
        joined = set(names).union(*(family.get(name, ()) for name in names))
        family.update(dict.fromkeys(joined, joined))
    sizes: dict[int, int] = {}
    for names in tools:
        sizes[id(family[names[0]])] = sizes.get(id(family[names[0]]), 0) + 1
    largest = max(sizes, key=lambda key: sizes[key])
    rows = [[], []]
    for at, names in enumerate(tools):
        rows[id(family[names[0]]) != largest].append(at)
    return rows[0], rows[1]


def loaded_parts() -> tuple[Any, Any]:
    """(tokenizer, format) of the model."""
    from transformers import AutoTokenizer

    from finetune.models.bundled import resolve_model
    from formats import get_format

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    return tokenizer, get_format(FORMAT, tokenizer=tokenizer)


@cache
def encoded(task: str) -> tuple[list[dict[str, Any]], list[throughput_rows.Row]]:
    """(conversations to train on, their ids and labels)."""
    conversations, _ = conversations_and_items(task, 0)
    return conversations, throughput_rows._encode(conversations, *loaded_parts())


def steps_to_train(task: str, seed: int, step_rows: int, count: int) -> list[list[throughput_rows.Row]]:
    """`count` steps of encoded rows, epoch after epoch, in an order that depends on the seed only."""
    from finetune.training.order import groups_for, steps_of_epoch

    conversations, rows = encoded(task)
    kept = [at for at, (ids, _) in enumerate(rows) if len(ids) <= MAX_TOKENS]
    groups = groups_for(ORDERS[task], conversations, kept)
    rng, steps = np.random.default_rng(seed), []
    while len(steps) < count:
        epoch = steps_of_epoch(len(kept), step_rows, rng, groups)
        steps += [[rows[kept[at]] for at in step] for step in epoch if len(step) == step_rows]
    return steps[:count]


def budgets_of(cell: Namespace) -> dict[str, dict[str, float]]:
    """{name: minutes or steps} of a cell's runs."""
    minutes = {f"minute_{minutes:g}": {"minutes": minutes} for minutes in cell.minutes}
    return minutes | {f"step_{steps}": {"steps": steps} for steps in cell.equal_steps}


def make_budget(rate: float, *, minutes: float | None = None, steps: int | None = None):
    """A Trainer callback that lowers the learning rate from `rate` linearly to zero over a budget, and ends with it."""
    from peft import get_peft_model_state_dict
    from transformers import TrainerCallback

    class Budget(TrainerCallback):
        def __init__(self):
            self.losses: list[float] = []
            self.not_counted = 0.0
            self.ended = False

        def seconds(self) -> float:
            return time.process_time() - self.started - self.not_counted

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.started = time.process_time()
            self.keep(model, 0, 0.0)

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            spent = state.global_step / steps if steps else self.seconds() / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = rate * max(0.0, 1 - spent)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seconds = self.seconds()
            over = minutes is not None and seconds > 60 * minutes
            if not over:
                before = time.process_time()
                self.keep(model, state.global_step, seconds)
                self.not_counted += time.process_time() - before
            self.ended = control.should_training_stop = over or state.global_step == steps

        def keep(self, model, step: int, seconds: float) -> None:
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
            self.kept = {name: value.detach().clone().contiguous() for name, value in state.items()}
            self.at = {"step": step, "cpu_minutes": round(seconds / 60, 3)}
            self.config = model.peft_config["default"]

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs and "grad_norm" in logs:
                self.losses.append(round(float(logs["loss"]), 4))

    return Budget()


def train(cell: Namespace) -> None:
    """Train the budgets of one (task, trainer, seed) that its JSON lacks. Runs in a process of its own."""
    from finetune.models.loading import default_dtype, import_unsloth

    if cell.trainer != "plain":
        import_unsloth()  # before Transformers, or some of its optimizations are off
    import torch
    from safetensors.torch import save_file

    from benchmarks.throughput_parts import trainers
    from finetune.models.bundled import resolve_model

    torch.set_num_threads(1)
    steps = steps_to_train(cell.task, cell.seed, cell.step_rows, cell.max_steps)
    task = Namespace(
        model=resolve_model(MODEL), device="cpu", dtype=default_dtype(), load_in_4bit=False, checkpointing=False,
        steps=1, warmup=0, batch_size=min(4, cell.step_rows), grad_accum=max(1, cell.step_rows // 4), profile=None,
        optim="adamw_torch", max_seq_length=2 * MAX_TOKENS, our_flags=[], threads=1, lr=cell.lr, seed=cell.seed,
    )  # fmt: skip
    file = Path(cell.file)
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {**vars(cell), "saved": {}}
    for name, budget in budgets_of(cell).items():
        if name in record["saved"]:
            continue
        callback = make_budget(cell.lr, **budget)
        with tempfile.TemporaryDirectory() as folder:
            notes = getattr(trainers, cell.trainer)(cell.trainer, steps, task, callback, folder)
        if not callback.ended:
            raise UserError(f"{file}: {cell.max_steps} steps ended before {name}; raise --max_steps")
        adapter = file.with_suffix("") / name
        adapter.mkdir(parents=True, exist_ok=True)
        save_file(callback.kept, adapter / "adapter_model.safetensors")
        callback.config.save_pretrained(str(adapter))
        record["saved"][name] = {**callback.at, "losses": callback.losses}
        write_text_atomic(file, json.dumps(record | {"dtype": task.dtype, "notes": notes}, indent=1, default=str))


def score(file: str) -> None:
    """Answer the held-out requests with each adapter of a cell that has no answers yet. In a process of its own."""
    from finetune.models.loading import import_unsloth, load_base

    import_unsloth()  # before Transformers and PEFT
    from peft import load_peft_weights, set_peft_model_state_dict

    from finetune.evaluation.run import answer_token_limit, judge, make_prompts
    from finetune.generation.generate import Decoding, generate
    from finetune.models.adapter import attach_adapter
    from formats import decode

    path = Path(file)
    record = json.loads(path.read_text(encoding="utf-8"))
    model = load_base(MODEL, dtype=record["dtype"]).model
    tokenizer, fmt = loaded_parts()
    _, items = conversations_and_items(record["task"], record["items"])
    prompts = make_prompts(items, tokenizer, fmt, longest=MAX_TOKENS)
    prompts.items, prompts.input_ids = prompts.items[: record["items"]], prompts.input_ids[: record["items"]]
    stops = tuple(tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    decoding = Decoding(stops, answer_token_limit(prompts.items, tokenizer))
    adapted = None
    for name, saved in record["saved"].items():
        folder = path.with_suffix("") / name
        if adapted is None:
            adapted = attach_adapter(model, folder)
        set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
        if "right" in saved:
            continue
        answers = generate(adapted, prompts.input_ids, decoding=decoding).results
        texts = [decode(answer.input_ids, tokenizer, fmt) for answer in answers]
        verdicts = [judge(*pair, tokenizer, fmt)["verdicts"] for pair in zip(prompts.items, texts, strict=True)]
        saved["right"] = [first_of(one, "bfcl_valid", "arguments_correct", "no_call_correct") for one in verdicts]
        saved["tool"] = [first_of(one, "name_correct", "no_call_correct") for one in verdicts]
        saved["examples"] = texts[:3]
        record["origins"] = [[*item.origin, item.turn] for item in prompts.items]
        write_text_atomic(path, json.dumps(record, indent=1))
        print(f"{path.stem} {name}: {np.mean(saved['right']):.3f} right, {np.mean(saved['tool']):.3f} tools, step "
              f"{saved['step']}, {saved['cpu_minutes']:.2f} CPU minutes", flush=True)  # fmt: skip


def first_of(verdicts: dict[str, Any], *names: str) -> int:
    """The first of these verdicts that the request has, as 0 or 1."""
    return int(next(verdicts[name] for name in names if name in verdicts))


def run_cells(args: argparse.Namespace) -> None:
    """Train and score what is missing, one process each."""
    for seed in args.seeds:
        for task in args.tasks:
            for trainer in args.trainers:
                file = args.out / f"{task}_{trainer}_{seed}.json"
                cell = {"task": task, "trainer": trainer, "seed": seed, "file": str(file), "minutes": args.minutes}
                cell |= {name: getattr(args, name) for name in ("equal_steps", "step_rows", "max_steps", "items", "lr")}
                record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"saved": {}, **cell}
                if different := [name for name, value in cell.items() if name != "file" and record[name] != value]:
                    raise UserError(f"{file} was made with other {', '.join(different)}; use another --out")
                if budgets_of(args).keys() - record["saved"].keys():
                    child("train", json.dumps(cell))
                    record = json.loads(file.read_text(encoding="utf-8"))
                if any("right" not in saved for saved in record["saved"].values()):
                    child("score", str(file))


def child(*words: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__)), "--child", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise UserError(f"{words[0]} {words[1]} failed; its last lines are above")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.child:
        verb, what = args.child
        train(Namespace(**json.loads(what))) if verb == "train" else score(what)
        return 0
    args.tasks = selected(args.tasks, list(TASKS), "--tasks")
    args.trainers = selected(args.trainers, list(NAMES), "--trainers")
    if args.record:
        write_record(args.out, Path(args.record), machine())
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    run_cells(args)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    listed = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    add("--tasks", default="all", help=f"comma-separated, or all. {listed}")
    listed = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    add("--trainers", default="all", help=f"comma-separated, or all. {listed}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="order of the rows and LoRA's start (default 0 1 2)")
    add("--minutes", type=float, nargs="+", default=[1, 2, 4], help="budgets in CPU minutes (default 1 2 4)")
    add("--equal_steps", type=int, nargs="+", default=[12], help="also train for these steps (default 12)")
    add("--step_rows", type=int, default=8, help="rows of an optimizer step (default 8)")
    add("--max_steps", type=int, default=100, help="end of a run that does not reach its minutes (default 100)")
    add("--items", type=int, default=150, help="held-out requests, at most (default 150)")
    add("--lr", type=float, default=2e-3, help="learning rate at the start, of all trainers (default 2e-3)")
    add("--out", type=Path, default=Path("quality"), help="one JSON and the adapters of each run (default quality/)")
    add("--record", metavar="FILE", help="train nothing; write FILE.json, FILE.md and FILE.png from --out")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
