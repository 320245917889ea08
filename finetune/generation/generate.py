"""Batched generation: prompts with a common prefix share its computation, finished rows leave the batch.

Prompts are sorted and grouped by common prefix; the prefix of a group is computed once. A batch holds rows of one or
several groups. Greedy answers are those of `model.generate` prompt by prompt, except for ties within rounding.
Models that do not use Transformers' attention interface (Unsloth on CUDA, state-space and linear-attention layers,
attention sinks) answer by their own batched `generate`; the report names the method.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError, is_out_of_memory
from finetune.generation.plan import plan_batches
from finetune.generation.prefix_cache import Prefix, PrefixCache, Unsupported, active_cache, prefix_attention

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

MAX_PREFILL_TOKENS = 2048  # suffix tokens in one prefill pass: bounds the memory of activations

log = logging.getLogger("sandwich")


@dataclass(frozen=True)
class Decoding:
    """Decoding settings. An answer ends at any of `stop_ids` or after `max_new_tokens`.

    `temperature` 0 is greedy; above 0, row i has its own random generator (`seed`, i), so that its answer does not
    depend on its batch, and the token is one of the most likely that together have the probability `top_p`.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int = 256
    batch_size: int = 64
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0

    def generation_config(self) -> GenerationConfig:
        """The same settings for the model's own `generate`."""
        from transformers import GenerationConfig

        sampling = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.stop_ids[0],
            repetition_penalty=1.0,
            **sampling,
        )


@dataclass
class Generation:
    """One answer. `input_ids` excludes the stop token; `finish_reason` is "stop" or "length".

    `latency_s` runs from the start of the row's batch, prefix included, to the row's last token.
    """

    input_ids: list[int]
    finish_reason: str
    latency_s: float


@dataclass
class GenerationReport:
    """Cost of a generation. `method` is "shared_prefix" or "generate"; `reason` explains the second."""

    method: str
    reason: str = ""
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    results: list[Generation | None] = field(default_factory=list, repr=False)


def generate(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    *,
    decoding: Decoding,
    share_prefix: bool = True,
    on_result: Callable[[int, Generation], None] | None = None,
) -> GenerationReport:
    """Answer every prompt (lists of token ids); `report.results` is in the order of `prompts`.

    `on_result(index, generation)` is called as each row finishes. When memory runs out the batch size is halved;
    UserError when one row does not fit.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.eval()
    report = GenerationReport("shared_prefix" if share_prefix else "generate", "" if share_prefix else "requested")
    report.results = [None] * len(prompts)

    def finish(index: int, generation: Generation) -> None:
        report.results[index] = generation
        report.prompt_tokens += len(prompts[index])
        report.new_tokens += len(generation.input_ids)
        if on_result is not None:
            on_result(index, generation)

    started = time.perf_counter()
    while unanswered := [index for index, result in enumerate(report.results) if result is None]:
        generator = _Generator(inner, prompts, decoding, finish, report)
        try:
            (generator.shared_prefix if report.method == "shared_prefix" else generator.padded)(unanswered)
        except Unsupported as error:
            report.method, report.reason = "generate", str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if decoding.batch_size == 1:
                raise UserError("out of memory for a single row; lower --max_new_tokens") from error
            decoding = replace(decoding, batch_size=decoding.batch_size // 2)
            log.warning("out of memory; continuing with --batch_size %d", decoding.batch_size)
        torch.cuda.empty_cache()  # of no effect without a GPU
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class _Generator:
    """Answers rows (indices of prompts); calls `finish` for each and adds the computed tokens to the report."""

    model: PreTrainedModel
    prompts: Sequence[list[int]]
    decoding: Decoding
    finish: Callable[[int, Generation], None]
    report: GenerationReport

    @torch.inference_mode()
    def shared_prefix(self, rows: list[int]) -> None:
        """With our attention: a common prefix is computed once, finished rows leave the batch."""
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or [])
        kinds -= {"full_attention", "sliding_attention"}
        if kinds:
            raise Unsupported(f"layers of kind {', '.join(sorted(kinds))}")
        prefixes: dict[int, Prefix] = {}
        with prefix_attention(self.model):
            for batch in plan_batches(self.prompts, rows, self.decoding.batch_size, self.decoding.max_new_tokens):
                started = time.perf_counter()
                # A group that fills several batches computes its prefix in the first.
                prefixes = {id(group): prefixes[id(group)] for group, _ in batch if id(group) in prefixes}
                segments, batch_rows, suffixes = [], [], []
                for group, members in batch:
                    length = group.prefix_length
                    if length and id(group) not in prefixes:
                        prefixes[id(group)] = self._compute_prefix(self.prompts[members[0]][:length])
                    segments.append((len(batch_rows), len(batch_rows) + len(members), prefixes.get(id(group))))
                    batch_rows += members
                    suffixes += [self.prompts[row][length:] for row in members]
                cache = PrefixCache(segments, max(map(len, suffixes)) + self.decoding.max_new_tokens)
                self._prefill(cache, suffixes)
                for at, ids, reason in self._decode(cache, suffixes, _Sampler(self.decoding, batch_rows)):
                    self.finish(batch_rows[at], Generation(ids, reason, time.perf_counter() - started))

    def _forward(self, model: PreTrainedModel, cache: PrefixCache, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        """Write keys and values of `ids` (n, S) to the cache; returns the output of the model, or of its body alone.

        The body alone for prompts: with `logits_to_keep` PyTorch multiplies the last positions of n rows with n copies
        of the output embeddings (`torch.matmul` of a slice).
        """
        with active_cache(cache):
            output = model(input_ids=ids, position_ids=positions, use_cache=False)
        if len(cache.keys) != self.model.config.get_text_config().num_hidden_layers:
            raise Unsupported("not every layer uses Transformers' attention interface")
        return output

    def _compute_prefix(self, input_ids: list[int]) -> Prefix:
        cache = PrefixCache([(0, 1, None)], len(input_ids))
        ids = torch.tensor([input_ids], device=self.model.device)
        self._forward(self.model.base_model, cache, ids, torch.arange(len(input_ids), device=self.model.device)[None])
        self.report.computed_prompt_tokens += len(input_ids)
        return Prefix([keys[0] for keys in cache.keys], [values[0] for values in cache.values])

    def _prefill(self, cache: PrefixCache, suffixes: list[list[int]]) -> None:
        """Write keys and values of all suffix tokens except each row's last, the input of the first decoding step."""
        device = self.model.device
        offsets = cache.offsets(device)
        start = 0
        while start < len(suffixes):
            end, longest = start, 0
            limit = max(MAX_PREFILL_TOKENS, len(suffixes[start]) - 1)
            while end < len(suffixes) and max(longest, len(suffixes[end]) - 1) * (end + 1 - start) <= limit:
                longest = max(longest, len(suffixes[end]) - 1)
                end += 1
            if longest:
                ids = torch.zeros(end - start, longest, dtype=torch.long)
                for at, tokens in enumerate(suffixes[start:end]):
                    ids[at, : len(tokens) - 1] = torch.tensor(tokens[:-1])
                cache.part = (start, end)
                positions = offsets[start:end, None] + torch.arange(longest, device=device)
                self._forward(self.model.base_model, cache, ids.to(device), positions)
            start = end
        cache.part = (0, cache.rows)
        self.report.computed_prompt_tokens += sum(map(len, suffixes))

    def _decode(
        self, cache: PrefixCache, suffixes: list[list[int]], sample: _Sampler
    ) -> Iterator[tuple[int, list[int], str]]:
        """One token a step for all unfinished rows; yields (row, ids, finish_reason) of each that ends."""
        device, max_new_tokens = self.model.device, self.decoding.max_new_tokens
        offsets = cache.offsets(device)
        rows = list(range(len(suffixes)))  # the row of each line of the cache
        answers: list[list[int]] = [[] for _ in suffixes]
        tokens = torch.tensor([ids[-1] for ids in suffixes], device=device)
        slots = torch.tensor([len(ids) - 1 for ids in suffixes], device=device)
        finished: set[int] = set()
        for step in range(max_new_tokens):
            cache.slots, cache.longest = slots, max(len(suffixes[row]) for row in rows) + step
            output = self._forward(self.model, cache, tokens[:, None], (offsets + slots)[:, None])
            tokens = sample(output.logits[:, -1], rows)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row in finished:
                    continue
                stopped = token in self.decoding.stop_ids
                if not stopped:
                    answers[row].append(token)
                if stopped or step + 1 == max_new_tokens:
                    finished.add(row)
                    yield row, answers[row], "stop" if stopped else "length"
            if len(finished) == len(suffixes):
                return
            slots = slots + 1
            lines = [line for line, row in enumerate(rows) if row not in finished]
            # Copying the cache takes about as long as a step, so finished rows are removed when they are a fifth.
            if len(lines) <= 0.8 * len(rows):
                index = torch.tensor(lines, device=device)
                cache.keep(index)
                tokens, slots, offsets = tokens[index], slots[index], offsets[index]
                rows = [rows[line] for line in lines]

    @torch.inference_mode()
    def padded(self, rows: list[int]) -> None:
        """The model's own `generate` on left-padded batches."""
        pad, config = self.decoding.stop_ids[0], self.decoding.generation_config()
        torch.manual_seed(self.decoding.seed)
        rows = sorted(rows, key=lambda row: len(self.prompts[row]))
        for at in range(0, len(rows), self.decoding.batch_size):
            batch = rows[at : at + self.decoding.batch_size]
            started = time.perf_counter()
            longest = len(self.prompts[batch[-1]])
            padding = [longest - len(self.prompts[row]) for row in batch]
            ids = [[pad] * length + self.prompts[row] for length, row in zip(padding, batch, strict=True)]
            mask = [[0] * length + [1] * (longest - length) for length in padding]
            output = self.model.generate(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                generation_config=config,
            )
            seconds = time.perf_counter() - started
            self.report.computed_prompt_tokens += longest * len(batch)
            for row, answer in zip(batch, output[:, longest:].tolist(), strict=True):
                stop = next((n for n, token in enumerate(answer) if token in self.decoding.stop_ids), None)
                self.finish(row, Generation(answer[:stop], "length" if stop is None else "stop", seconds))


class _Sampler:
    """The next token of each row: the most likely, or sampled with the row's own random generator."""

    def __init__(self, decoding: Decoding, rows: Sequence[int]):
        self.temperature, self.top_p = decoding.temperature, decoding.top_p
        # The prime keeps (seed, row) and (seed + 1, another row) from having the same generator.
        self.generators = [torch.Generator().manual_seed(decoding.seed * 1_000_003 + row) for row in rows]

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """logits (n, vocabulary) -> token ids (n,); `rows` are indices into the batch."""
        if not self.temperature:
            return logits.argmax(-1)
        scaled = logits.float() / self.temperature
        if self.top_p < 1:
            from transformers import TopPLogitsWarper

            scaled = TopPLogitsWarper(self.top_p)(None, scaled)  # the filter of `model.generate`
        cumulative = scaled.softmax(-1).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=self.generators[row]) for row in rows]).to(logits.device)
        # The cumulative sum ends at 1 only up to rounding.
        return torch.searchsorted(cumulative, draws * cumulative[:, -1:]).clamp_(max=logits.shape[-1] - 1)[:, 0]
