"""Runs the rows of one step through the model: forward, loss, backward, in passes that fit into memory."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.errors import UserError, is_out_of_memory
from finetune.passes.attention import CpuTree, PackedAttention, UnsupportedModelError
from finetune.passes.loss import CHUNK_POSITIONS, head_logits, head_loss, logit_transform
from finetune.passes.plan import (
    CPU_TARGET_TOKENS,
    MIN_SHARED_TOKENS,
    PaddedPass,
    Pass,
    Predictions,
    Row,
    make_row,
    plan_padded,
    plan_passes,
)

log = logging.getLogger("sandwich")
MIN_TOKENS_PER_PASS = 256
# Allowed relative distance of hidden states; the 16-bit types round by a few thousandths in each layer.
HIDDEN_STATE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 4e-2}

# Allowed difference in nats per trained token. In float32 sums in another order differ by about 1e-6.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
CHECKED_ROWS = 2


@dataclass
class StepResult:
    """loss_sum: summed cross entropy of the trained tokens (nats); computed_tokens: tokens that the model computed."""

    loss_sum: float
    computed_tokens: int
    passes: int


class PassRunner:
    """Forward and backward of a set of rows, sharing prefixes where the model's attention allows it.

    mode: "tree" (packed, prefixes shared), "packed" (packed, nothing shared) or "padded"; reason: why, for the user.
    """

    def __init__(self, model: Any, tokens_per_pass: int, share_prefix: bool, pad_token_id: int):
        self.model = model
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inner = getattr(self.causal_lm, self.causal_lm.base_model_prefix)
        self.head = self.causal_lm.get_output_embeddings()
        self.logit_transform = logit_transform(self.causal_lm.config.get_text_config())
        self.tokens_per_pass = tokens_per_pass
        self.pad_token_id = pad_token_id
        self.autocast: Callable = nullcontext  # the trainer replaces it
        self.mode, self.reason, self.attention = choose_mode(self.causal_lm, share_prefix)

    @property
    def device(self) -> torch.device:
        return self.inner.get_input_embeddings().weight.device

    def plan(self, rows: Sequence[Row]) -> list[Pass] | list[PaddedPass]:
        if self.mode == "padded":
            return plan_padded(rows, self.tokens_per_pass, self.pad_token_id)
        target = CPU_TARGET_TOKENS if self.device.type == "cpu" else None
        return plan_passes(rows, self.tokens_per_pass, share_prefix=self.mode == "tree", target_tokens=target)

    def hidden_states(self, pass_: Pass | PaddedPass) -> torch.Tensor:
        """Hidden states after the last norm at the pass's trained positions, [N, E]."""
        if isinstance(pass_, Pass):
            inputs = self.attention.inputs(pass_, self.device)
        else:
            inputs = {"input_ids": self._tensor(pass_.input_ids), "attention_mask": self._tensor(pass_.attention_mask)}
        states = self.inner(**inputs, use_cache=False)[0]
        return states.flatten(0, 1)[self._tensor(pass_.positions)]

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def run(
        self, rows: Sequence[Row], scale: float, backward: Callable[[torch.Tensor], None] | None = None
    ) -> StepResult:
        """Loss of the rows and, with `backward`, the gradient of `scale` times the summed loss.

        After an out-of-memory error the step's gradients are discarded, the passes halved and the step is run again
        with the same rows. Raises the error when the passes cannot be made smaller.
        """
        return self._with_smaller_passes(rows, lambda: self.run_once(rows, scale, backward))

    def _with_smaller_passes(self, rows: Sequence[Row], compute: Callable[[], Any]) -> Any:
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.tokens_per_pass <= MIN_TOKENS_PER_PASS:
                    raise
            largest = max(pass_.input_ids.size for pass_ in self.plan(rows))
            self.tokens_per_pass = max(min(self.tokens_per_pass, largest) // 2, MIN_TOKENS_PER_PASS)
            log.warning("out of memory; continuing with %s tokens per pass", f"{self.tokens_per_pass:,}")
            self.model.zero_grad()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def run_once(
        self, rows: Sequence[Row], scale: float, backward: Callable[[torch.Tensor], None] | None = None
    ) -> StepResult:
        """As `run`, but an out-of-memory error is raised."""
        losses, computed = [], 0
        plan = self.plan(rows)
        for pass_ in plan:
            with self.attention.patched(self.causal_lm):
                with torch.set_grad_enabled(backward is not None), self.autocast():
                    states, weights = self.hidden_states(pass_), self._tensor(pass_.weights)
                    loss = head_loss(self.head, states, self._tensor(pass_.targets), weights, **self.logit_transform)
                if backward is not None:
                    backward(loss * scale)
            losses.append(loss.detach())  # read after the last pass: each read would wait for the GPU
            computed += pass_.input_ids.size
        return StepResult(sum(loss.item() for loss in losses), computed, len(plan))

    def predict(self, rows: Sequence[Row]) -> list[Predictions]:
        """What the model predicts at the trained tokens of each row; passes are halved as in `run`."""
        return self._with_smaller_passes(rows, lambda: self._predict(rows))

    @torch.no_grad()
    def _predict(self, rows: Sequence[Row]) -> list[Predictions]:
        found: dict[int, Predictions] = {}
        for pass_ in self.plan(rows):
            with self.attention.patched(self.causal_lm), self.autocast():
                states, targets = self.hidden_states(pass_), self._tensor(pass_.targets)
                chunks = zip(states.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
                parts = [self._predictions(*chunk) for chunk in chunks]
            columns = [np.concatenate(column)[pass_.trained] for column in zip(*parts, strict=True)]
            ends = np.cumsum([len(rows[number].positions) for number in pass_.rows])
            for number, *own in zip(pass_.rows, *(np.split(column, ends[:-1]) for column in columns), strict=True):
                found[number] = Predictions(*own)
        return [found[number] for number in range(len(rows))]

    def _predictions(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, ...]:
        log_p = torch.log_softmax(head_logits(self.head, states, **self.logit_transform).float(), dim=-1)
        best, best_ids = log_p.max(dim=-1)
        columns = (log_p.gather(1, targets[:, None])[:, 0], best, best_ids)
        return tuple(column.cpu().numpy() for column in columns)

    @torch.no_grad()
    def reference_loss(self, rows: Sequence[Row]) -> float:
        """Summed loss of the rows, each computed alone by the model's own forward and full logits."""
        total = 0.0
        for row in rows:
            with self.autocast():
                logits = self.causal_lm(input_ids=self._tensor(row.input_ids).long()[None], use_cache=False).logits[0]
            # In chunks: all logits of a long row in float32 could take more memory than the training itself.
            chunks = (self._tensor(x).long().split(CHUNK_POSITIONS) for x in (row.positions, row.targets))
            for positions, targets in zip(*chunks, strict=True):
                total += torch.nn.functional.cross_entropy(logits[positions].float(), targets, reduction="sum").item()
        return total

    def check_against_model(self, rows: Sequence[Row], may_diverge: bool = False) -> None:
        """UserError when the loss of the shortest rows, computed together, differs from the model's own.

        may_diverge  not when that is not finite: a run that is resumed with such weights, as its best ones are kept
        """
        few = sorted(rows, key=lambda row: len(row.input_ids))[:CHECKED_ROWS]
        self.model.eval()
        alone = self.reference_loss(few)
        together = self.run(few, 1.0).loss_sum
        self.model.train()
        if not math.isfinite(alone):
            if may_diverge:
                return
            raise UserError(
                f"the model's own loss is {alone} before training; its weights are broken, or too large for this "
                "--dtype (try --dtype float32)"
            )
        difference = abs(together - alone) / sum(len(row.positions) for row in few)
        tolerance = LOSS_TOLERANCE.get(self.head.weight.dtype, 5e-2)
        if not difference <= tolerance:
            raise UserError(
                f"first step: the loss of rows computed together differs from that of rows computed alone by "
                f"{difference:.2g} nats per token (allowed: {tolerance:.0e}); train with --no-share_prefix, and please "
                "report the model's name"
            )


def attention_candidates(device_type: str) -> list[PackedAttention]:
    """The attentions to try on this kind of device, best first."""
    if device_type == "cpu":
        return [CpuTree()]
    from finetune.passes.attention_cuda import FlexTree, UnslothPacked, UnslothTree

    return [UnslothTree(), FlexTree(), UnslothPacked()]


def choose_mode(causal_lm: Any, share_prefix: bool) -> tuple[str, str, PackedAttention]:
    """(mode, reason, attention) for this model on its device, as in PassRunner."""
    problems = []
    for attention in attention_candidates(causal_lm.get_input_embeddings().weight.device.type):
        label = f" ({attention.label})" if attention.label else ""
        if problem := incompatibility(causal_lm, attention):
            problems.append(f"{attention.label}: {problem}" if label else problem)
        elif not share_prefix:
            return "packed", f"packed without padding, every row computed alone (--no-share_prefix){label}", attention
        elif attention.shares_prefixes:
            return "tree", f"packed without padding, equal prefixes of a step computed once{label}", attention
        else:
            reason = f"this model cannot share prefixes ({'; '.join(problems)}); packed without padding{label}"
            return "packed", reason, attention
    return "padded", f"this model cannot share prefixes ({'; '.join(problems)}); rows are padded", PackedAttention()


def incompatibility(causal_lm: Any, attention: PackedAttention) -> str:
    """Why the model cannot use this attention, or "": two packed rows must have the hidden states that each has alone.

    The rows share a prefix. Their own tokens are many, so that attending to the other row's would change the result.
    """
    device = causal_lm.get_input_embeddings().weight.device
    inner = getattr(causal_lm, causal_lm.base_model_prefix)
    ids = min(causal_lm.get_input_embeddings().weight.shape[0], 89)
    own_tokens = ([step * i % ids for i in range(4 * MIN_SHARED_TOKENS)] for step in (5, 3))
    rows = [make_row(row, row) for row in ([*range(2, 2 + MIN_SHARED_TOKENS), *own] for own in own_tokens)]
    (probe,) = plan_passes(rows, 1 << 20, share_prefix=attention.shares_prefixes)
    training = causal_lm.training
    causal_lm.eval()

    def states(**inputs: Any) -> torch.Tensor:
        return inner(**inputs, use_cache=False)[0][0].float()

    autocast = torch.autocast(device.type, dtype=causal_lm.dtype) if device.type != "cpu" else nullcontext()
    try:
        with torch.no_grad(), autocast:
            alone = torch.stack(
                [states(input_ids=torch.from_numpy(row.input_ids).long().to(device)[None])[-1] for row in rows]
            )
            with attention.patched(causal_lm):
                packed = states(**attention.inputs(probe, device))
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # a third-party forward may raise anything for arguments that it does not know
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    finally:
        causal_lm.train(training)
    ends = [segment.end - 1 for segment in probe.segments if segment.subtree_end == segment.end]
    distance = ((packed[ends] - alone[probe.rows]).norm() / alone.norm()).item()
    if distance < HIDDEN_STATE_TOLERANCE.get(causal_lm.dtype, 4e-2):
        return ""
    return f"its hidden states differ by {distance:.1%} from those of the rows alone"
