"""Random rows and small LoRA models, and their gradients row by row: what shared passes are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.passes.plan import Row, make_row
from formats import IGNORE_INDEX
from tests.helpers import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Gradients = dict[str, "torch.Tensor"]
SMALL_LLAMA = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip


def random_rows(groups: int, rows_per_group: int, prefix: int = 150, seed: int = 0, nested: bool = False) -> list[Row]:
    """Rows with one of `groups` prefixes, then 3 to 89 own tokens; one row per group ends inside its prefix.

    nested: every other row of a group has a second common part after the prefix.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(groups):
        shared = rng.integers(0, 300, prefix)
        turn = rng.integers(0, 300, 60)
        for number in range(rows_per_group):
            middle = turn if nested and number % 2 else np.empty(0, dtype=int)
            own = rng.integers(0, 300, rng.integers(3, 90))
            ids = np.concatenate([shared, middle, own])
            labels = np.where(np.arange(len(ids)) >= len(ids) - len(own) // 2 - 1, ids, IGNORE_INDEX)
            rows.append(make_row(ids, labels))
        ids = shared[: prefix - 20]
        rows.append(make_row(ids, np.where(np.arange(len(ids)) > 100, ids, IGNORE_INDEX)))
    return rows


def small_llama(dtype: torch.dtype | None = None, seed: int = 1, **changes: Any) -> Any:
    """A Llama with random weights, the same at every call; `changes` are entries of its LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA | changes)).to(dtype or torch.float32)


def with_random_lora(model: Any, rank: int = 8) -> Any:
    """A PeftModel in training mode with LoRA on all linear layers and non-zero B."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return randomize_lora_b(get_peft_model(model, lora)).train()


def randomize_lora_b(model: Any, std: float = 0.02) -> Any:
    """PEFT initializes B with zeros, and then no gradient reaches A."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def gradients(model: Any, compute: Callable[[], object]) -> Gradients:
    """The gradients that `compute` leaves in the model's trainable parameters, in float64."""
    model.zero_grad()
    compute()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.requires_grad}


def loss_scale(rows: list[Row]) -> float:
    """The factor that makes a summed loss a mean over the trained tokens."""
    return 1 / sum(len(row.positions) for row in rows)


def shared_gradients(runner: Any, rows: list[Row]) -> Gradients:
    """Gradients of the mean loss through the runner's passes."""
    return gradients(runner.model, lambda: runner.run(rows, loss_scale(rows), backward=lambda loss: loss.backward()))


def row_by_row_gradients(runner: Any, rows: list[Row]) -> Gradients:
    """The same, each row alone through the model's own forward with all its logits."""

    def compute() -> None:
        for row in rows:
            ids, positions, targets = (
                torch.from_numpy(array).long().to(runner.device)
                for array in (row.input_ids, row.positions, row.targets)
            )
            with runner.autocast():
                logits = runner.causal_lm(input_ids=ids[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[positions].float(), targets, reduction="sum")
            (loss * loss_scale(rows)).backward()

    return gradients(runner.model, compute)


def relative_distance(a: Gradients, b: Gradients) -> float:
    """|a - b| / |b| over all parameters together."""
    assert a.keys() == b.keys()
    distance = sum(((a[n] - b[n]) ** 2).sum() for n in a).sqrt()
    return (distance / sum((b[n] ** 2).sum() for n in b).sqrt()).item()
