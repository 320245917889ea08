"""Answers for many prompts: those that start alike share the computation of that start, finished rows leave the batch.

A plan sorts the prompts and groups them by common prefix of ids; every group's prefix is computed once. A batch takes
rows from one or several groups. Greedy answers equal `model.generate` prompt by prompt, up to ties within rounding.
Models whose attention cannot be reached through Transformers' attention interface (Unsloth on CUDA, state-space and
linear-attention layers, attention sinks) go through their own batched `generate`; the report says which way was taken.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from finetune.generation.prefix_cache import Prefix, PrefixCache, Unsupported, attention_on, using

MIN_PREFIX = 16  # a shorter common start is not worth a forward pass of its own
GROUP_COST = 64  # tokens' worth of time that one more group costs
PREFILL_TOKENS = 2048  # own tokens in one prefill pass: bounds the memory of activations
CACHE_TOKENS = 32768  # own tokens kept for one batch: bounds the memory of keys and values


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. An answer ends at any of `stop_ids` or after `max_new_tokens`.

    `temperature` 0 is greedy; above it, row i draws from its own random numbers (`seed`, i), so that the batch it
    lands in does not matter.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int = 256
    batch_size: int = 64
    temperature: float = 0.0
    seed: int = 0

    def generation_config(self):
        """The same for the model's own `generate` (a `transformers.GenerationConfig`)."""
        from transformers import GenerationConfig

        sampling = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
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

    `latency_s` runs from the start of the row's batch, prefix included, to the row's last token: what a caller in
    that batch waited.
    """

    input_ids: list[int]
    finish_reason: str
    latency_s: float


@dataclass
class GenerationReport:
    """What the work cost. `method` is "shared_prefix" or "generate"; `reason` says why it is the second."""

    method: str
    reason: str = ""
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    results: list[Generation] = field(default_factory=list, repr=False)


def generate(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    *,
    decoding: Decoding,
    share_prefix: bool = True,
    on_result: Callable[[int, Generation], None] | None = None,
) -> GenerationReport:
    """Answer every prompt (lists of token ids); `report.results` is in the order of `prompts`.

    `on_result(index, generation)` is called as each row finishes.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt without tokens cannot be continued")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.eval()
    report = GenerationReport("shared_prefix" if share_prefix else "generate", "" if share_prefix else "asked for")
    report.results = [None] * len(prompts)

    def finish(index: int, generation: Generation) -> None:
        report.results[index] = generation
        report.new_tokens += len(generation.input_ids)
        if on_result is not None:
            on_result(index, generation)

    started = time.perf_counter()
    if share_prefix:
        try:
            _generate_shared(inner, prompts, decoding, finish, report)
        except Unsupported as error:
            report.method, report.reason = "generate", str(error)
    if report.method == "generate":
        open_rows = [i for i, done in enumerate(report.results) if done is None]
        _generate_plain(inner, prompts, open_rows, decoding, finish, report)
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class Group:
    """Rows (indices of prompts) whose first `prefix_length` ids are equal; 0 means nothing is shared."""

    rows: list[int]
    prefix_length: int


def plan_groups(prompts: Sequence[list[int]]) -> list[Group]:
    """Group prompts by common prefix so that few tokens are computed; every row keeps at least one token of its own.

    Sorted by ids, prompts with a common prefix are neighbours. A range of them is one group unless cutting it where
    the common prefix is shortest saves more than the extra groups cost.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    common = [_common_prefix(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]

    def prefix_of(start: int, end: int) -> int:
        shortest = min(len(prompts[order[i]]) for i in range(start, end))
        shared = min([*common[start : end - 1], shortest - 1]) if end - start > 1 else 0
        return shared if shared >= MIN_PREFIX else 0

    def cost(start: int, end: int) -> int:
        shared = prefix_of(start, end)
        return shared + sum(len(prompts[order[i]]) - shared for i in range(start, end)) + GROUP_COST

    groups, ranges = [], [(0, len(order))] if order else []
    while ranges:
        start, end = ranges.pop()
        if end - start > 1:
            shortest = min(common[start : end - 1])
            cuts = [i + 1 for i in range(start, end - 1) if common[i] == shortest]
            parts = list(itertools.pairwise([start, *cuts, end]))
            if sum(cost(*part) for part in parts) < cost(start, end):
                ranges.extend(reversed(parts))
                continue
        groups.append(Group([order[i] for i in range(start, end)], prefix_of(start, end)))
    return groups


def _common_prefix(left: list[int], right: list[int]) -> int:
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))


def _plan_batches(prompts, decoding: Decoding) -> list[list[tuple[Group, list[int]]]]:
    """Batches of (group, some of its rows), at most `decoding.batch_size` rows and CACHE_TOKENS own tokens each."""
    batches, current, count, longest = [], [], 0, 0
    for group in plan_groups(prompts):
        # Neighbours of like length waste least padding.
        for row in sorted(group.rows, key=lambda i: len(prompts[i])):
            own = len(prompts[row]) - group.prefix_length + decoding.max_new_tokens
            if count and (count == decoding.batch_size or max(longest, own) * (count + 1) > CACHE_TOKENS):
                batches.append(current)
                current, count, longest = [], 0, 0
            if not current or current[-1][0] is not group:
                current.append((group, []))
            current[-1][1].append(row)
            count, longest = count + 1, max(longest, own)
    return [*batches, current] if current else batches


def _generate_shared(model, prompts, decoding: Decoding, finish, report: GenerationReport) -> None:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    kinds -= {"full_attention", "sliding_attention"}
    if kinds:
        raise Unsupported(f"layers of kind {', '.join(sorted(kinds))}")
    prefixes: dict[int, Prefix] = {}
    with attention_on(model):
        for batch in _plan_batches(prompts, decoding):
            started = time.perf_counter()
            # A group that fills several batches computes its prefix in the first.
            prefixes = {key: prefixes[key] for key in (id(group) for group, _ in batch) if key in prefixes}
            segments, rows = [], []
            for group, members in batch:
                if group.prefix_length and id(group) not in prefixes:
                    prefixes[id(group)] = _compute_prefix(model, prompts[members[0]][: group.prefix_length])
                    report.computed_prompt_tokens += group.prefix_length
                segments.append((len(rows), len(rows) + len(members), prefixes.get(id(group))))
                rows.extend(members)
            own = [prompts[row][group.prefix_length :] for group, members in batch for row in members]
            cache = PrefixCache(segments, max(map(len, own)) + decoding.max_new_tokens)
            _prefill(model, cache, own)
            report.prompt_tokens += sum(len(prompts[row]) for row in rows)
            report.computed_prompt_tokens += sum(map(len, own))

            def done(at: int, ids: list[int], reason: str, rows=rows, started=started) -> None:
                finish(rows[at], Generation(ids, reason, time.perf_counter() - started))

            _decode(model, cache, own, _Sampler(decoding, rows), decoding, done)


@torch.inference_mode()
def _compute_prefix(model, input_ids: list[int]) -> Prefix:
    prefix = Prefix(input_ids)
    cache = PrefixCache([(0, 1, None)], 0)
    cache.building = prefix
    ids = torch.tensor([input_ids], device=model.device)
    with using(cache):
        model(input_ids=ids, position_ids=torch.arange(len(input_ids), device=model.device)[None], use_cache=False,
              logits_to_keep=1)  # fmt: skip
    if len(prefix.keys) != model.config.get_text_config().num_hidden_layers:
        raise Unsupported("not every layer uses Transformers' attention interface")
    return prefix


@torch.inference_mode()
def _prefill(model, cache: PrefixCache, own: list[list[int]]) -> None:
    """Keys and values of all own tokens but each row's last, which is the first decoding step's input."""
    offsets = cache.offsets(model.device)
    start = 0
    while start < len(own):
        end, longest = start, 0
        while end < len(own) and max(longest, len(own[end]) - 1) * (end + 1 - start) <= max(
            PREFILL_TOKENS, len(own[start]) - 1
        ):
            longest = max(longest, len(own[end]) - 1)
            end += 1
        if longest:
            ids = torch.zeros(end - start, longest, dtype=torch.long)
            for at, tokens in enumerate(own[start:end]):
                ids[at, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            positions = offsets[start:end, None] + torch.arange(longest, device=model.device)
            cache.part = (start, end)
            with using(cache):
                model(input_ids=ids.to(model.device), position_ids=positions, use_cache=False, logits_to_keep=1)
            if len(cache.keys) != model.config.get_text_config().num_hidden_layers:
                raise Unsupported("not every layer uses Transformers' attention interface")
        start = end
    cache.part = (0, cache.rows)


@torch.inference_mode()
def _decode(model, cache: PrefixCache, own, sample: _Sampler, decoding: Decoding, done) -> None:
    """One token a step for all rows still open; `done(row, ids, reason)` for each that ends."""
    device = model.device
    offsets = cache.offsets(device)
    rows = list(range(len(own)))  # which prompt each line of the cache belongs to
    answers: list[list[int]] = [[] for _ in own]
    tokens = torch.tensor([ids[-1] for ids in own], device=device)
    slots = torch.tensor([len(ids) - 1 for ids in own], device=device)
    closed: set[int] = set()
    for step in range(decoding.max_new_tokens):
        cache.slots, cache.longest = slots, max(len(own[row]) for row in rows) + step
        with using(cache):
            logits = model(
                input_ids=tokens[:, None], position_ids=(offsets + slots)[:, None], use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        if len(cache.keys) != model.config.get_text_config().num_hidden_layers:
            raise Unsupported("not every layer uses Transformers' attention interface")
        tokens = sample(logits, rows)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in closed:
                continue
            if token not in decoding.stop_ids:
                answers[row].append(token)
            if token in decoding.stop_ids or step + 1 == decoding.max_new_tokens:
                closed.add(row)
                done(row, answers[row], "stop" if token in decoding.stop_ids else "length")
        if len(closed) == len(own):
            return
        slots = slots + 1
        lines = [line for line, row in enumerate(rows) if row not in closed]
        # Copying the cache costs about as much as a step, so do it when a fifth of the lines is dead weight.
        if len(lines) <= 0.8 * len(rows):
            index = torch.tensor(lines, device=device)
            cache.keep(index)
            tokens, slots, offsets = tokens[index], slots[index], offsets[index]
            rows = [rows[line] for line in lines]


class _Sampler:
    """The next token of each row: the likeliest, or drawn at a temperature from the row's own random numbers."""

    def __init__(self, decoding: Decoding, rows: Sequence[int]):
        self.temperature = decoding.temperature
        # Any fixed way to mix seed and row will do; the prime keeps neighbouring seeds from sharing rows' numbers.
        self.generators = [torch.Generator().manual_seed(decoding.seed * 1_000_003 + row) for row in rows]

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """logits (n, vocabulary) of the batch's rows `rows` -> token ids (n,)."""
        if not self.temperature:
            return logits.argmax(-1)
        cumulative = (logits.float() / self.temperature).softmax(-1).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=self.generators[row]) for row in rows]).to(logits.device)
        # The cumulative sum ends at 1 only up to rounding.
        return torch.searchsorted(cumulative, draws * cumulative[:, -1:]).clamp_(max=logits.shape[-1] - 1)[:, 0]


@torch.inference_mode()
def _generate_plain(model, prompts, rows, decoding: Decoding, finish, report: GenerationReport) -> None:
    """The model's own `generate` on left-padded batches."""
    stop_ids, batch_size = decoding.stop_ids, decoding.batch_size
    config = decoding.generation_config()
    torch.manual_seed(decoding.seed)
    rows = sorted(rows, key=lambda i: len(prompts[i]))
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        started = time.perf_counter()
        longest = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), longest), stop_ids[0])
        mask = torch.zeros_like(ids)
        for line, i in enumerate(part):
            ids[line, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, longest - len(prompts[i]) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
        seconds = time.perf_counter() - started
        report.prompt_tokens += sum(len(prompts[i]) for i in part)
        report.computed_prompt_tokens += ids.numel()
        for line, i in enumerate(part):
            answer = output[line, longest:].tolist()
            stop = next((n for n, token in enumerate(answer) if token in stop_ids), None)
            finish(i, Generation(answer[:stop], "length" if stop is None else "stop", seconds))
