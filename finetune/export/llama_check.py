"""Does llama.cpp answer as Transformers does? First-token log-probabilities of a GGUF through xllamacpp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError

TOP = 5  # likeliest tokens compared
LONGEST = 2048  # tokens of a prompt
# Nats by which the likeliest tokens' log-probabilities may differ; quantised files are measured, not judged.
TOLERANCE = {"f32": 0.02, "f16": 0.05, "bf16": 0.2}


@dataclass(frozen=True)
class FirstToken:
    """A prompt's ids and the log-probabilities {token id: nats} of the TOP likeliest next tokens."""

    prompt: list[int]
    logprobs: dict[int, float]


def first_tokens(made: Any, run: Any, count: int = 3) -> list[FirstToken]:
    """What the merged model expects at the start of an answer, for the first user turns of a few conversations."""
    from finetune.export.merged import conversations_of, log_probabilities
    from formats import FormatError, encode_prompt

    prompts = []
    for conversation in conversations_of(run, count):
        messages = conversation["messages"]
        turn = next((i for i, m in enumerate(messages) if m["role"] == "assistant" and i), len(messages))
        with contextlib.suppress(FormatError):
            ids = encode_prompt(messages[:turn], conversation.get("tools"), made.tokenizer, made.format)
            if len(ids) <= LONGEST:
                prompts.append(ids)
    found = []
    with computed_in_float32(made.model):
        answers = log_probabilities(made.model, prompts[:count])
    for prompt, rows in zip(prompts[:count], answers, strict=True):
        values, ids = rows[-1].topk(TOP)
        found.append(FirstToken(prompt, dict(zip(ids.tolist(), values.tolist(), strict=True))))
    return found


@contextlib.contextmanager
def computed_in_float32(model: Any) -> Iterator[None]:
    """Let a model of 16 bits compute in float32, as llama.cpp does, with the numbers that it holds.

    A module's weights are widened while it runs and narrowed behind it, which loses nothing and takes the memory of
    one module. In bfloat16 throughout, log-probabilities are off by a tenth of a nat.
    """

    def widen(module: Any, inputs: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            types[parameter] = parameter.dtype
            parameter.data = parameter.data.float()

    def narrow(module: Any, inputs: tuple, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(types[parameter])

    types: dict[Any, Any] = {}
    hooks = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def llama_server(
    path: Path,
    *,
    context: int = 2048,
    chat_template: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    exact: bool = False,
) -> Iterator[Any]:
    """A llama.cpp server in this process for one GGUF file; `listening_address` is its URL.

    context  tokens it has room for, 0: as many as the model
    port     0: a free one
    exact    plain attention and a float32 cache, so that rounding is the file's own
    UserError when llama.cpp does not take the file.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
    params.use_jinja = True
    params.hostnames, params.port = [host], port
    if chat_template is not None:
        params.chat_template = chat_template
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(f"llama.cpp cannot serve {path}: is it there, whole, and a model that it knows?") from error
    try:
        yield server
    finally:
        del server


def compare_first_tokens(path: Path, expected: list[FirstToken]) -> str:
    """One sentence about how far llama.cpp is from `expected`; UserError when a 16- or 32-bit file is too far."""
    if not expected:
        return "not compared with Transformers: no prompt of the data is short enough"
    differences, same = [], 0
    with llama_server(path, context=max(len(one.prompt) for one in expected) + 64, exact=True) as server:
        for one in expected:
            answer = server.handle_completions(
                {"prompt": one.prompt, "n_predict": 1, "max_tokens": 1, "n_probs": 50, "logprobs": 50, "temperature": 0}
            )
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            theirs = {entry["id"]: entry["logprob"] for entry in top}
            differences += [
                abs(theirs[i] - value) if i in theirs else float("inf") for i, value in one.logprobs.items()
            ]
            same += max(theirs, key=theirs.get) == max(one.logprobs, key=one.logprobs.get)
    worst = max(differences)
    kind = path.stem.rpartition("-")[2]
    if worst > TOLERANCE.get(kind, float("inf")):
        raise UserError(
            f"{path.name}: llama.cpp's first-token log-probabilities are {worst:.3g} nats from Transformers' "
            f"(at most {TOLERANCE[kind]:g} are rounding); this release of llama.cpp converts the model wrongly"
        )
    return (
        f"first-token log-probabilities of llama.cpp and Transformers differ by {worst:.3g} nats at most, "
        f"likeliest token the same for {same} of {len(expected)} prompts"
    )
