"""Runs the rows of one step through the model: forward, loss, backward, in passes that fit into memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.passes.attention import CpuTree, UnsupportedModel
from finetune.passes.loss import CHUNK, head_loss, logit_transform
from finetune.passes.plan import ENOUGH_ON_CPU, MIN_SHARED, PaddedPass, Pass, Row, make_row, plan_padded, plan_passes

MIN_TOKENS_PER_PASS = 256


@dataclass
class StepResult:
    """loss_sum: sum of the cross entropies over trained tokens (nats); computed_tokens: tokens the model really ran."""

    loss_sum: float
    computed_tokens: int
    passes: int


class PassRunner:
    """Forward and backward of a set of rows, sharing prefixes where the model's attention allows it.

    mode: "tree" (packed, prefixes shared), "packed" (packed, nothing shared) or "padded".
    """

    def __init__(self, model: torch.nn.Module, tokens_per_pass: int, share_prefix: bool, pad_token_id: int):
        self.model = model
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inner = getattr(self.causal_lm, self.causal_lm.base_model_prefix)
        self.head = self.causal_lm.get_output_embeddings()
        self.logit_transform = logit_transform(self.causal_lm.config.get_text_config())
        self.tokens_per_pass = tokens_per_pass
        self.pad_token_id = pad_token_id
        self.context = contextlib.nullcontext  # the trainer's autocast, where it uses one
        self.mode, self.why, self.attention = choose_mode(self.causal_lm, share_prefix)

    @property
    def device(self) -> torch.device:
        return self.inner.get_input_embeddings().weight.device

    def plan(self, rows: Sequence[Row]) -> list[Pass] | list[PaddedPass]:
        if self.mode == "padded":
            return plan_padded(rows, self.tokens_per_pass, self.pad_token_id)
        enough = ENOUGH_ON_CPU if self.device.type == "cpu" else None
        return plan_passes(rows, self.tokens_per_pass, share_prefix=self.mode == "tree", enough=enough)

    def hidden_states(self, one: Pass | PaddedPass) -> torch.Tensor:
        """Hidden states behind the last norm at the pass's trained positions, [N, E]."""
        if isinstance(one, PaddedPass):
            tensors = {
                "input_ids": torch.from_numpy(one.input_ids).to(self.device),
                "attention_mask": torch.from_numpy(one.attention_mask).to(self.device),
            }
        else:
            tensors = self.attention.inputs(one, self.device)
        states = self.inner(**tensors, use_cache=False)[0]
        return states.flatten(0, 1)[torch.from_numpy(one.positions).to(self.device)]

    def run(
        self, rows: Sequence[Row], scale: float, backward: Callable[[torch.Tensor], None] | None = None
    ) -> StepResult:
        """Loss of the rows and, with `backward`, the gradient of `scale` times the summed loss.

        After an out-of-memory error the gradients of this step are thrown away, the passes are halved and the step is
        run again, so the effective batch stays what it was. Raises the error when one row alone is too much.
        """
        while True:
            try:
                return self.run_once(rows, scale, backward)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.tokens_per_pass <= MIN_TOKENS_PER_PASS:
                    raise
            largest = max(one.input_ids.size for one in self.plan(rows))
            self.tokens_per_pass = max(min(self.tokens_per_pass, largest) // 2, MIN_TOKENS_PER_PASS)
            self.model.zero_grad()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def run_once(
        self, rows: Sequence[Row], scale: float, backward: Callable[[torch.Tensor], None] | None = None
    ) -> StepResult:
        """As `run`, but an out-of-memory error is the caller's."""
        loss_sum, computed = 0.0, 0
        plan = self.plan(rows)
        for one in plan:
            packed = self.attention is not None and isinstance(one, Pass)
            with self.attention.inside(self.causal_lm) if packed else contextlib.nullcontext():
                loss_sum += self._pass(one, scale, backward)
            computed += one.input_ids.size
        return StepResult(loss_sum, computed, len(plan))

    def _pass(self, one, scale, backward) -> float:
        with torch.set_grad_enabled(backward is not None), self.context():
            loss = head_loss(
                self.head,
                self.hidden_states(one),
                torch.from_numpy(one.targets).to(self.device),
                torch.from_numpy(one.weights).to(self.device),
                **self.logit_transform,
            )
        if backward is not None:
            backward(loss * scale)
        return loss.item()

    @torch.no_grad()
    def reference_loss(self, rows: Sequence[Row]) -> float:
        """Summed loss of the rows, each computed alone by the model's own forward and full logits."""
        total = 0.0
        for row in rows:
            ids = torch.from_numpy(row.input_ids).long().to(self.device)[None]
            with self.context():
                logits = self.causal_lm(input_ids=ids, use_cache=False).logits[0]
            positions = torch.from_numpy(row.positions).long().to(self.device).split(CHUNK)
            targets = torch.from_numpy(row.targets).long().to(self.device).split(CHUNK)
            # In chunks: in float32 all of a long row's logits would take more memory than the training itself.
            for some, wanted in zip(positions, targets, strict=True):
                total += torch.nn.functional.cross_entropy(logits[some].float(), wanted, reduction="sum").item()
        return total


def attentions(device_type: str) -> list[Any]:
    """The ways of packing that are worth a trial on this kind of device, the best first."""
    if device_type == "cpu":
        return [CpuTree()]
    from finetune.passes.attention_cuda import FlexTree, UnslothPacked, UnslothTree

    return [UnslothTree(), FlexTree(), UnslothPacked()]


def choose_mode(causal_lm: torch.nn.Module, share_prefix: bool) -> tuple[str, str, Any]:
    """("tree" | "packed" | "padded", why, attention or None) for this model on its device.

    Tried on two short rows, not guessed: an attention counts when the hidden states of the packed rows are those of the
    same rows alone.
    """
    reasons = []
    for attention in attentions(causal_lm.get_input_embeddings().weight.device.type):
        if problem := why_not(causal_lm, attention):
            reasons.append(f"{attention.says}: {problem}" if attention.says else problem)
            continue
        with_whom = f" ({attention.says})" if attention.says else ""
        if not attention.shares:
            why = f"this model cannot share prefixes ({'; '.join(reasons)}); packed without padding{with_whom}"
            return (
                "packed",
                why if share_prefix else f"packed without padding{with_whom} (--no-share_prefix)",
                attention,
            )
        if share_prefix:
            return "tree", f"packed without padding, equal prefixes of a step computed once{with_whom}", attention
        return "packed", f"packed without padding, every row computed alone (--no-share_prefix){with_whom}", attention
    return "padded", f"this model cannot share prefixes ({'; '.join(reasons)}); rows are padded", None


def why_not(causal_lm: torch.nn.Module, attention: Any) -> str:
    """What goes wrong when two short rows with a common beginning are packed this way; empty when nothing does."""
    device = causal_lm.get_input_embeddings().weight.device
    inner = getattr(causal_lm, causal_lm.base_model_prefix)
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    few = min(vocabulary, 89)
    # The rows' own parts are long, so that seeing the other row's would show.
    pair = ([step * i % few for i in range(4 * MIN_SHARED)] for step in (5, 3))
    rows = [make_row(ids, ids) for ids in ([*range(2, 2 + MIN_SHARED), *own] for own in pair)]
    (probe,) = plan_passes(rows, 1 << 20, share_prefix=attention.shares)
    training = causal_lm.training
    causal_lm.eval()

    def states(**inputs) -> torch.Tensor:
        return inner(**inputs, use_cache=False)[0][0].float()

    autocast = torch.autocast(device.type, dtype=causal_lm.dtype) if device.type != "cpu" else contextlib.nullcontext()
    try:
        with torch.no_grad(), autocast:
            ids = [torch.from_numpy(row.input_ids).long().to(device)[None] for row in rows]
            alone = torch.stack([states(input_ids=each)[-1] for each in ids])
            with attention.inside(causal_lm):
                packed = states(**attention.inputs(probe, device))
    except UnsupportedModel as error:
        return str(error)
    except Exception as error:  # whatever a stranger's forward says to arguments it does not know
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    finally:
        causal_lm.train(training)
    ends = [segment.end - 1 for segment in probe.segments if segment.subtree_end == segment.end]
    distance = ((packed[ends] - alone[probe.rows]).norm() / alone.norm()).item()
    # The 16-bit types round by some thousandths in each layer.
    allowed = 1e-3 if causal_lm.dtype == torch.float32 else 4e-2
    return "" if distance < allowed else f"it computes something else (hidden states differ by {distance:.1%})"


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error has a class of its own; PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
