"""Quality per minute: ours, Unsloth's trainer as it comes and Transformers + PEFT train the same model on the same rows
in the same order; adapters saved at equal CPU minutes and after equal steps answer the same held-out requests.

    python benchmarks/quality.py --tasks demo --seeds 0 1 2 --out quality
    python benchmarks/quality.py --out quality --record 2026-11-30_quality_cpu     writes .json, .md and .png

Minutes are of one thread's processor time from the start of training (imports, loading, tokenizing and scoring not
counted), so that other programs on the machine change them little. Each adapter is the last one finished within its
minutes, of one run at a constant learning rate. A rerun of the same command trains and scores only what --out lacks;
several at a time may share --out if their tasks or seeds differ.
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
    "demo": "the demo's five GEN NX tools; held out: its rows of other wordings; right: tools and all arguments",
    "live_multiple": "BFCL live_multiple, rows with the same tools in the same step; held out: tool sets that share no "
    "tool with the trained ones; right: accepted by BFCL's checker",
}
MAX_TOKENS = 1024  # longer rows of live_multiple are omitted, on both sides


def conversations_and_items(task: str, limit: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """(conversations to train on, `limit` held-out items that expect calls)."""
    from finetune.evaluation.items import CALL, load_items

    if task == "demo":
        from finetune.reading.conversations import load_conversations

        samples = ROOT / "data" / "samples"
        items = [item for item in load_items([samples / "demo_heldout.jsonl"]) if item.kind == CALL]
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
    groups = groups_for("group_tools" if task == "live_multiple" else "shuffle", conversations, kept)
    rng, steps = np.random.default_rng(seed), []
    while len(steps) < count:
        epoch = steps_of_epoch(len(kept), step_rows, rng, groups)
        steps += [[rows[kept[at]] for at in step] for step in epoch if len(step) == step_rows]
    return steps[:count]


def make_snapshots(folder: Path, minutes: Sequence[float], steps: Sequence[int]):
    """A Trainer callback that saves adapters at CPU minutes and steps, and ends the run after the last of them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    class Snapshots(TrainerCallback):
        def __init__(self):
            self.minutes, self.steps = sorted(minutes), sorted(steps)
            self.saved: dict[str, dict[str, float]] = {}
            self.losses: list[float] = []
            self.not_counted = 0.0

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.started = time.process_time()
            self.keep(model, 0, 0.0)

        def keep(self, model, step: int, seconds: float) -> None:
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
            self.kept = {name: value.detach().clone().contiguous() for name, value in state.items()}
            self.at = {"step": step, "cpu_minutes": round(seconds / 60, 3)}

        def save(self, model, name: str) -> None:
            path = folder / name
            path.mkdir(parents=True, exist_ok=True)
            save_file(self.kept, path / "adapter_model.safetensors")
            model.peft_config["default"].save_pretrained(str(path))
            self.saved[name] = self.at

        def on_step_end(self, args, state, control, model=None, **kwargs):
            now = time.process_time()
            seconds = now - self.started - self.not_counted
            while self.minutes and seconds > 60 * self.minutes[0]:
                self.save(model, f"minute_{self.minutes.pop(0):g}")
            self.keep(model, state.global_step, seconds)
            if self.steps and state.global_step == self.steps[0]:
                self.save(model, f"step_{self.steps.pop(0)}")
            control.should_training_stop = not self.minutes and not self.steps
            self.not_counted += time.process_time() - now

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs and "grad_norm" in logs:
                self.losses.append(round(float(logs["loss"]), 4))

    return Snapshots()


def train(cell: Namespace) -> None:
    """Train one (task, trainer, seed) and write its JSON and adapters. Runs in a process of its own."""
    from finetune.models.loading import default_dtype, import_unsloth

    if cell.trainer != "plain":
        import_unsloth()  # before Transformers, or some of its optimizations are off
    import torch

    from benchmarks.throughput_parts import trainers
    from finetune.models.bundled import resolve_model

    torch.set_num_threads(1)
    steps = steps_to_train(cell.task, cell.seed, cell.step_rows, cell.max_steps)
    task = Namespace(
        model=resolve_model(MODEL), device="cpu", dtype=default_dtype(), load_in_4bit=False, checkpointing=False,
        steps=1, warmup=0, batch_size=min(4, cell.step_rows), grad_accum=max(1, cell.step_rows // 4), profile=None,
        optim="adamw_torch", max_seq_length=2 * MAX_TOKENS, our_flags=[], threads=1, lr=cell.lr, seed=cell.seed,
    )  # fmt: skip
    snapshots = make_snapshots(Path(cell.file).with_suffix(""), cell.minutes, cell.equal_steps)
    with tempfile.TemporaryDirectory() as folder:
        notes = getattr(trainers, cell.trainer)(cell.trainer, steps, task, snapshots, folder)
    if snapshots.minutes or snapshots.steps:
        raise UserError(f"{cell.file}: {cell.max_steps} steps ended before the last budget; raise --max_steps")
    record = vars(cell) | {"dtype": task.dtype, "losses": snapshots.losses, "notes": notes, "saved": snapshots.saved}
    write_text_atomic(Path(cell.file), json.dumps(record, indent=1, default=str))


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
        saved["right"] = [int(one.get("bfcl_valid", one["arguments_correct"])) for one in verdicts]
        saved["tool"] = [int(one["name_correct"]) for one in verdicts]
        saved["examples"] = texts[:3]
        record["origins"] = [[*item.origin, item.turn] for item in prompts.items]
        write_text_atomic(path, json.dumps(record, indent=1))
        print(f"{path.stem} {name}: {np.mean(saved['right']):.3f} right, {np.mean(saved['tool']):.3f} tools, step "
              f"{saved['step']}, {saved['cpu_minutes']:.2f} CPU minutes", flush=True)  # fmt: skip


def run_cells(args: argparse.Namespace) -> None:
    """Train and score what is missing, one process each."""
    for seed in args.seeds:
        for task in args.tasks:
            for trainer in args.trainers:
                file = args.out / f"{task}_{trainer}_{seed}.json"
                cell = {"task": task, "trainer": trainer, "seed": seed, "file": str(file), "minutes": args.minutes}
                cell |= {name: getattr(args, name) for name in ("equal_steps", "step_rows", "max_steps", "items", "lr")}
                if not file.is_file():
                    child("train", json.dumps(cell))
                record = json.loads(file.read_text(encoding="utf-8"))
                if different := [name for name, value in cell.items() if name != "file" and record[name] != value]:
                    raise UserError(f"{file} was made with other {', '.join(different)}; use another --out")
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
    add("--equal_steps", type=int, nargs="+", default=[24], help="also score after these steps (default 24)")
    add("--step_rows", type=int, default=8, help="rows of an optimizer step (default 8)")
    add("--max_steps", type=int, default=200, help="end of a run whose budgets are not reached (default 200)")
    add("--items", type=int, default=100, help="held-out requests, at most (default 100)")
    add("--lr", type=float, default=2e-3, help="constant learning rate of all trainers (default 2e-3)")
    add("--out", type=Path, default=Path("quality"), help="one JSON and the adapters of each run (default quality/)")
    add("--record", metavar="FILE", help="train nothing; write FILE.json, FILE.md and FILE.png from --out")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
