"""How many tool calls are right while a run trains: answers to held-out requests at each evaluation."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune import distributed
from finetune.errors import UserError
from finetune.evaluation.items import CALL, Item, items_of
from finetune.evaluation.run import Prompts, answer_token_limit, judge
from finetune.reading.load_result import LoadResult
from formats import Format, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger("sandwich")

METRICS = ("tool_name_accuracy", "parameter_accuracy")
VERDICTS = ("name_correct", "arguments_correct")
FIRST_CHUNK = 4  # items per process; each chunk of the first evaluation is twice as large as the one before


class CallScorer:
    """Generates greedy answers to the same held-out requests at each evaluation and scores their calls.

    The first evaluation measures: it answers as many of the `count` items as `budget`, a fraction of the run's time,
    allows. Later ones answer the same items, so that all values of a run can be compared.
    """

    def __init__(
        self,
        held_out: LoadResult,
        kept: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        fmt: Format,
        stop_ids: Sequence[int],
        *,
        count: int,
        budget: float,
        seed: int,
        longest: int,
    ):
        """held_out: conversations, of which those at `kept` are used; longest: tokens of a prompt.

        Raises UserError when no row holds a call, and for a format whose calls cannot be read.
        """
        if fmt.unreadable_calls:
            raise UserError(f"--eval_calls: {fmt.unreadable_calls}; choose another --format, or omit --eval_calls")
        items = [item for row in sorted(set(kept)) for item in self._call_items(held_out, row)]
        random.Random(seed).shuffle(items)
        prompts, tried = Prompts(longest), 0
        while tried < len(items) and len(prompts.items) < count:
            some = items[tried : tried + count - len(prompts.items)]
            prompts.add(some, tokenizer, fmt)
            tried += len(some)
        if not prompts.items:
            why = f" ({prompts.refused[0][1]})" if prompts.refused else ""
            raise UserError(f"--eval_calls: no row held out for evaluation has a call that can be answered{why}")
        if len(prompts.items) < count:
            refused = [f"; not {item.source} row {item.row}: {reason}" for item, reason in prompts.refused[:1]]
            log.info("--eval_calls %d: only %d requests held out for evaluation can be answered with a call%s",
                     count, len(prompts.items), "".join(refused))  # fmt: skip
        self.prompts, self.tokenizer, self.fmt = prompts, tokenizer, fmt
        self.stop_ids, self.max_new_tokens = tuple(stop_ids), answer_token_limit(prompts.items, tokenizer)
        self.budget = budget
        self.begin()

    def begin(self, chosen: int | None = None, on_chosen: Callable[[int], None] = lambda chosen: None) -> None:
        """A run starts; chosen: number of items that its first evaluation settled on, None before it; on_chosen: is
        told that number.
        """
        self.chosen, self.on_chosen = chosen, on_chosen
        self.started, self.seconds = time.monotonic(), 0.0  # seconds: spent here so far

    @staticmethod
    def _call_items(held_out: LoadResult, row: int) -> list[Item]:
        source, number = held_out.origins[row]
        return [item for item in items_of(held_out.conversations[row], source, number) if item.kind == CALL]

    def score(self, model: Any, seconds: float) -> dict[str, float]:
        """`eval_tool_name_accuracy` and `eval_parameter_accuracy` of the model; seconds: of the run so far."""
        started = time.monotonic()
        if self.chosen is None:
            totals = self._measure(model, self.budget * seconds)
        else:
            totals = self._answer(model, range(min(self.chosen, len(self.prompts.items))))
        self.seconds += time.monotonic() - started
        *right, answered = totals
        return {f"eval_{name}": value / answered for name, value in zip(METRICS, right, strict=True)}

    def share(self) -> float:
        """The fraction of the time since this run started or resumed that was spent here."""
        return self.seconds / (time.monotonic() - self.started)

    def _measure(self, model: Any, allowed: float) -> list[float]:
        """Answer growing chunks while the next one is expected to fit into `allowed` seconds; at least one."""
        started, done, totals = time.monotonic(), 0, [0.0] * (len(METRICS) + 1)
        size, every = FIRST_CHUNK * distributed.size(), len(self.prompts.items)
        while done < every:
            chunk = range(done, min(done + size, every))
            totals = [a + b for a, b in zip(totals, self._answer(model, chunk), strict=True)]
            done, size = chunk.stop, 2 * size
            # All processes must take the same decision, and each has its own clock.
            spent, limit = distributed.totals([time.monotonic() - started, allowed])
            if spent * (1 + min(size, every - done) / done) > limit:
                break
        if done < every:
            log.info("--eval_calls: %d of %d requests fit into --eval_calls_budget %g", done, every, self.budget)
        self.chosen = done
        self.on_chosen(done)
        return totals

    def _answer(self, model: Any, items: range) -> list[float]:
        """[answers with the right tools, with the right arguments too, answers], summed over all processes."""
        from finetune.generation.generate import Decoding, generate

        mine: Sequence[int] = items[distributed.rank() :: distributed.size()]
        right = [0.0] * len(VERDICTS)
        if mine:
            decoding = Decoding(self.stop_ids, self.max_new_tokens)
            report = generate(model, [self.prompts.input_ids[at] for at in mine], decoding=decoding)
            for at, generation in zip(mine, report.results, strict=True):
                assert generation is not None
                text = decode(generation.input_ids, self.tokenizer, self.fmt)
                verdicts = judge(self.prompts.items[at], text, self.tokenizer, self.fmt)["verdicts"]
                right = [total + bool(verdicts[name]) for total, name in zip(right, VERDICTS, strict=True)]
        return distributed.totals([*right, len(mine)])
