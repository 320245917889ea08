"""Runs the rows of one step through the model: forward, loss, backward, in passes that fit into memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finetune.attention import Layout, UnsupportedModel, tree_attention_in
from finetune.steps import PaddedPass, Pass, Row, plan_padded, plan_passes
from finetune.training.loss import CHUNK, head_loss, logit_transform

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
        self.mode, self.why = choose_mode(self.causal_lm, share_prefix)
        self.context = contextlib.nullcontext  # the trainer's autocast, where it uses one

    @property
    def device(self) -> torch.device:
        return self.inner.get_input_embeddings().weight.device

    def plan(self, rows: Sequence[Row]) -> list[Pass] | list[PaddedPass]:
        if self.mode == "padded":
            return plan_padded(rows, self.tokens_per_pass, self.pad_token_id)
        return plan_passes(rows, self.tokens_per_pass, share_prefix=self.mode == "tree")

    def hidden_states(self, one: Pass | PaddedPass) -> torch.Tensor:
        """Hidden states behind the last norm at the pass's trained positions, [N, E]."""
        tensors = {"input_ids": torch.from_numpy(one.input_ids).to(self.device)}
        if isinstance(one, PaddedPass):
            tensors["attention_mask"] = torch.from_numpy(one.attention_mask).to(self.device)
            extra = {}
        else:
            tensors["input_ids"] = tensors["input_ids"][None]
            tensors["position_ids"] = torch.from_numpy(one.position_ids).to(self.device)[None]
            extra = {"layout": Layout.of(one.segments)}
        states = self.inner(**tensors, use_cache=False, **extra)[0]
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
                return self._run(rows, scale, backward)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.tokens_per_pass <= MIN_TOKENS_PER_PASS:
                    raise
            largest = max(one.input_ids.size for one in self.plan(rows))
            self.tokens_per_pass = max(min(self.tokens_per_pass, largest) // 2, MIN_TOKENS_PER_PASS)
            self.model.zero_grad()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, rows, scale, backward) -> StepResult:
        loss_sum, computed = 0.0, 0
        plan = self.plan(rows)
        for one in plan:
            if self.mode == "padded":
                loss = self._pass(one, scale, backward)
            else:
                with tree_attention_in(self.causal_lm):
                    loss = self._pass(one, scale, backward)
            loss_sum += loss
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


def choose_mode(causal_lm: torch.nn.Module, share_prefix: bool) -> tuple[str, str]:
    """("tree" | "packed" | "padded", why) for this model on its device; tried on four tokens, not guessed."""
    device = causal_lm.get_input_embeddings().weight.device
    if device.type != "cpu":
        return "padded", f"shared prefixes run on the CPU only so far; on {device.type} rows are padded, not shared"
    from finetune.steps import make_row

    probe = plan_passes([make_row([1, 2, 3, 4], [-100, -100, 3, 4])], 1 << 20)[0]
    inner = getattr(causal_lm, causal_lm.base_model_prefix)
    training = causal_lm.training
    causal_lm.eval()
    try:
        with torch.no_grad(), tree_attention_in(causal_lm):
            inner(
                input_ids=torch.from_numpy(probe.input_ids)[None],
                position_ids=torch.from_numpy(probe.position_ids)[None],
                use_cache=False,
                layout=Layout.of(probe.segments),
            )
    except (UnsupportedModel, TypeError) as error:
        return "padded", f"this model cannot share prefixes ({error}); rows are padded"
    finally:
        causal_lm.train(training)
    if share_prefix:
        return "tree", "packed without padding, equal prefixes of a step computed once"
    return "packed", "packed without padding, every row computed alone (--no-share_prefix)"


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error has a class of its own; PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
