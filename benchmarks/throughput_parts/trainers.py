"""The trainers that throughput.py compares; each runs in a process of its own and writes its measurements.

All train the same rows in the same steps: `stock`, `packed` and `plain` in micro-batches of `batch_size` rows, `ours`
in its own passes. Same LoRA, dtype and optimizer. Gradient checkpointing is on where Unsloth and TRL turn it on by
default (`stock`, `packed`), off in `stock_fast`, and set by `--checkpointing` in the others; each result records it.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.throughput_parts import rows as throughput_rows
from formats import IGNORE_INDEX

TRAINERS = {
    "stock": "Unsloth's trainer with defaults (checkpointing), padded batches",
    "stock_fast": "Unsloth's trainer without checkpointing, padded batches",
    "packed": "Unsloth's trainer with defaults (checkpointing), packed batches",
    "plain": "Transformers + PEFT, padded batches",
    "unshared": "ours, --no-share_prefix",
    "ours": "ours",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(trainer: str, task: Namespace) -> dict[str, Any]:
    """Train `task.steps_file` with one trainer; returns its row of throughput.py's table."""
    steps = throughput_rows.load(Path(task.steps_file))
    # A short step first: threads, allocator, optimizer state and our check of the first step are not part of a step's
    # usual cost. On a GPU kernels are compiled and tuned by shape, so complete steps (--warmup) are needed too.
    warm = [[(ids[:64], ids[:64]) for ids, _ in steps[0]], *steps[: task.warmup]]
    meter = make_meter(len(warm), Path(task.turn))
    train = {"plain": plain, "stock": stock, "stock_fast": stock, "packed": packed}.get(trainer, ours)
    with tempfile.TemporaryDirectory() as folder:
        notes = train(trainer, [*warm, *steps], task, meter, folder)
    import torch

    from finetune.runs.run_log import peak_memory_gb

    measured = meter.steps[len(warm) :]
    rows = [row for step in steps for row in step]
    seconds = statistics.median(step["seconds"] for step in measured)
    tokens = sum(len(ids) for ids, _ in rows) / len(steps)
    return {
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": statistics.median(step["cpu_seconds"] for step in measured),
        "rows_per_second": len(rows) / len(steps) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gb": peak_memory_gb(),
        "first_loss": meter.losses[len(warm)] if len(meter.losses) > len(warm) else None,
        "final_loss": meter.losses[-1],
        "losses": meter.losses[len(warm) :],
        "tokens_per_step": tokens,
        "trained_tokens_per_step": sum(label != IGNORE_INDEX for _, row in rows for label in row[1:]) / len(steps),
        "gradient_checkpointing": meter.checkpointing,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        **notes,
    }


def make_meter(skipped: int, turn: Path):
    """A Trainer callback that records wall time, CPU time and loss of each step, while no other process has `turn`."""
    from filelock import FileLock
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def __init__(self):
            self.steps: list[dict[str, float]] = []
            self.checkpointing = False
            self.losses: list[float] = []
            self.turn = FileLock(turn)  # until the process ends

        def on_train_begin(self, args, state, control, **kwargs):
            self.turn.acquire()

        @staticmethod
        def now() -> tuple[float, float]:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter(), time.process_time()

        def on_step_begin(self, args, state, control, **kwargs):
            import torch

            model = kwargs["model"]
            self.checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
            if len(self.steps) == skipped and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.started = self.now()

        def on_step_end(self, args, state, control, **kwargs):
            wall, cpu = self.now()
            self.steps.append({"seconds": wall - self.started[0], "cpu_seconds": cpu - self.started[1]})

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs and "grad_norm" in logs:
                self.losses.append(float(logs["loss"]))

    return Meter()


def trainer_options(task: Namespace, folder: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": steps, "learning_rate": task.lr, "lr_scheduler_type": "constant",
        "optim": task.optim, "weight_decay": 0.01, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "seed": task.seed, "bf16": task.dtype == "bfloat16",
        "use_cpu": task.device == "cpu", "dataloader_num_workers": 0, **more,
    }  # fmt: skip


def columns(rows) -> dict[str, list]:
    return {
        "input_ids": [ids for ids, _ in rows],
        "labels": [labels for _, labels in rows],
        "attention_mask": [[1] * len(ids) for ids, _ in rows],
    }


def in_order(trainer_class: type) -> type:
    """The trainer, with its rows in the given order."""

    class InOrder(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

    return InOrder


def plain(name, steps, task, meter, folder) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    quantization = {}
    if task.load_in_4bit:
        from peft import prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, task.dtype),
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=getattr(torch, task.dtype), device_map=task.device, **quantization
    )
    if task.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=task.checkpointing)
    elif task.checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(task.seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trainer = in_order(Trainer)(
        model=model,
        args=TrainingArguments(**trainer_options(
            task, folder, len(steps), per_device_train_batch_size=task.batch_size,
            gradient_accumulation_steps=task.grad_accum, gradient_checkpointing=task.checkpointing,
        )),
        train_dataset=Dataset.from_dict(columns([row for step in steps for row in step])),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX),
        callbacks=[meter],
    )  # fmt: skip
    trainer.train()
    return {}


def unsloth_model(task: Namespace, checkpointing: bool):
    from finetune.models.loading import import_unsloth

    unsloth = import_unsloth()
    import torch

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=task.model, max_seq_length=task.max_seq_length, dtype=getattr(torch, task.dtype),
        load_in_4bit=task.load_in_4bit,
    )  # fmt: skip
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", random_state=task.seed, target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )  # fmt: skip
    return model, tokenizer


def stock(name, steps, task, meter, folder) -> dict[str, Any]:
    checkpointing = name != "stock_fast"
    model, tokenizer = unsloth_model(task, checkpointing)
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTConfig, SFTTrainer

    trainer = in_order(SFTTrainer)(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**trainer_options(
            task, folder, len(steps), per_device_train_batch_size=task.batch_size, max_length=task.max_seq_length,
            gradient_accumulation_steps=task.grad_accum, padding_free=False, gradient_checkpointing=checkpointing,
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        )),
        train_dataset=Dataset.from_dict(columns([row for step in steps for row in step])),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX),
        callbacks=[meter],
    )  # fmt: skip
    trainer.train()
    return {}


def responses(name, steps, task, meter, folder) -> dict[str, Any]:
    """As in Unsloth's notebooks: rows are texts that it tokenizes, and train_on_responses_only masks them."""
    model, tokenizer = unsloth_model(task, checkpointing=True)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth.chat_templates import train_on_responses_only

    rows = [row for step in steps for row in step]
    trainer = in_order(SFTTrainer)(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**trainer_options(
            task, folder, len(steps), per_device_train_batch_size=task.batch_size, max_length=task.max_seq_length,
            gradient_accumulation_steps=task.grad_accum, dataset_text_field="text", dataset_num_proc=1,
        )),
        train_dataset=Dataset.from_dict({"text": [tokenizer.decode(ids) for ids, _ in rows]}),
        callbacks=[meter],
    )  # fmt: skip
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    trainer = train_on_responses_only(trainer, **parts, num_proc=1)
    data = trainer.train_dataset
    trained = [sum(label != IGNORE_INDEX for labels in side for label in labels)
               for side in (data["labels"], [labels for _, labels in rows])]  # fmt: skip
    notes = {
        "rows": len(rows), "rows_kept": len(data), "tokens": sum(map(len, data["input_ids"])),
        "tokens_of_ours": sum(len(ids) for ids, _ in rows), "trained_tokens": trained[0],
        "trained_tokens_of_ours": trained[1],
    }  # fmt: skip
    trainer.train()
    return notes


def packed(name, steps, task, meter, folder) -> dict[str, Any]:
    """Unsloth's sample packing; a pack is a micro-batch, so that a step has the same rows as in the other trainers."""
    messages: list[str] = []

    class PackingMessages(logging.Handler):
        def emit(self, record):
            if "pack" in (text := record.getMessage()).lower():
                messages.append(text.splitlines()[0])

    for name in ("unsloth", "unsloth.trainer", "trl", "trl.trainer.sft_trainer"):
        logging.getLogger(name).addHandler(PackingMessages())
    model, tokenizer = unsloth_model(task, checkpointing=True)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packs: dict[str, list] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for step in steps:
        for start in range(0, len(step), task.batch_size):
            rows = step[start : start + task.batch_size]
            packs["input_ids"].append([token for ids, _ in rows for token in ids])
            # The first token of a row is not a target: it would be predicted from the previous row.
            packs["labels"].append([label for _, labels in rows for label in [IGNORE_INDEX, *labels[1:]]])
            packs["seq_lengths"].append([len(ids) for ids, _ in rows])
    trainer = in_order(SFTTrainer)(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**trainer_options(
            task, folder, len(steps), per_device_train_batch_size=1, gradient_accumulation_steps=task.grad_accum,
            packing=True, gradient_checkpointing=True, max_length=max(map(len, packs["input_ids"])),
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        )),
        train_dataset=Dataset.from_dict(packs),
        callbacks=[meter],
    )  # fmt: skip
    ignored = [text for text in messages if "ignored" in text or "not supported" in text]
    if not trainer.args.packing or ignored:
        raise RuntimeError("packing does not work here: " + ("; ".join(ignored or messages) or "Unsloth disabled it"))
    trainer.train()
    return {"said": messages}


def ours(name, steps, task, meter, folder) -> dict[str, Any]:
    from rich.console import Console

    from finetune import settings as flags
    from finetune.models.adapter import add_lora
    from finetune.models.loading import load_base
    from finetune.passes.plan import make_row
    from finetune.runs.experiment import Experiment
    from finetune.training.run import make_trainer

    arguments = [
        "--model", task.model, "--dtype", task.dtype, "--max_seq_length", str(task.max_seq_length),
        "--seed", str(task.seed), "--lr", str(task.lr),
        "--batch_size", str(task.batch_size), "--grad_accum", str(task.grad_accum), "--max_steps", str(len(steps)),
        "--scheduler", "constant", "--warmup_steps", "0", "--optim", task.optim, "--save_steps", "0",
        "--max_grad_norm", "1.0",
    ]  # fmt: skip
    arguments += ["--load_in_4bit" if task.load_in_4bit else "--no-load_in_4bit"]
    arguments += ["--gradient_checkpointing" if task.checkpointing else "--no-gradient_checkpointing"]
    arguments += ["--no-share_prefix"] if name == "unshared" else []
    settings = flags.parse([*arguments, *task.our_flags])
    loaded = load_base(task.model, dtype=task.dtype, load_in_4bit=task.load_in_4bit, max_seq_length=task.max_seq_length)
    model = add_lora(
        loaded.model, rank=16, alpha=32, dropout=0.0, target_modules=TARGETS, use_rslora=False,
        gradient_checkpointing=task.checkpointing, seed=task.seed,
    )  # fmt: skip
    experiment = Experiment.create(
        folder, "run", {"gradient_checkpointing": task.checkpointing, "flags": settings.run_flags()}, exact_name=True
    )
    sequences = [tuple(row) for step in steps for row in step]
    trainer = make_trainer(
        settings, experiment, model, loaded.tokenizer, Namespace(sequences=sequences), None, loaded,
        Console(stderr=True, quiet=True),
    )  # fmt: skip
    trainer.add_callback(meter)
    trainer.get_train_dataloader = lambda: _steps_in_order(trainer, [len(step) for step in steps])
    trainer.train()
    if name == "ours" and task.profile:
        _profile(trainer, [make_row(*row) for row in steps[-1]], Path(task.profile))
    plans = [trainer.runner.plan([make_row(*row) for row in step]) for step in steps[-task.steps :]]
    return {
        "path": trainer.runner.reason,
        "tokens_per_pass": trainer.runner.tokens_per_pass,
        "computed_tokens_per_step": sum(one.input_ids.size for plan in plans for one in plan) / len(plans),
        "passes_per_step": sum(map(len, plans)) / len(plans),
    }


def _profile(trainer, rows, path: Path) -> None:
    """Write the operations of one forward and backward of these rows, those that take longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        trainer.runner.run(rows, 1.0, torch.Tensor.backward)
    trainer.model.zero_grad()
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
    path.write_text(table, encoding="utf-8")


def _steps_in_order(trainer, sizes: list[int]):
    from finetune.training.trainer import StepLoader

    class InOrder:
        def __iter__(self):
            start = 0
            for size in sizes:
                yield list(range(start, start + size))
                start += size

        def __len__(self):
            return len(sizes)

        def set_epoch(self, epoch: int) -> None:
            pass

    return StepLoader(trainer.train_dataset, batch_sampler=InOrder(), collate_fn=trainer.data_collator)


def child(task_file: str) -> None:
    """Entry point of a trainer's process: reads its task, writes `<task>.result`."""
    task = Namespace(**json.loads(Path(task_file).read_text(encoding="utf-8")))
    import torch

    torch.set_num_threads(task.threads)
    try:
        result = measure(task.way, task)
    except Exception as error:  # a trainer that cannot run is a result too: its reason is shown in the table
        import traceback

        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    Path(task_file).with_suffix(".result").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    child(sys.argv[1])
