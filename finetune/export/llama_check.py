"""A llama.cpp server for a GGUF file, and its first-token log-probabilities against those of Transformers."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn
    from transformers import PreTrainedModel

    from finetune.export.merged import MergedModel
    from finetune.runs.find import Run

COMPARED_TOKENS = 5  # likeliest tokens of each prompt
MAX_PROMPT_TOKENS = 2048
# Largest accepted difference of log-probabilities; for quantised files the difference is only printed.
MAX_DIFFERENCE_NATS = {"f32": 0.02, "f16": 0.05, "bf16": 0.2}
# llama.cpp derives its parser of calls from the template. For `<function=NAME>{…}</function>` without an outer tag it
# misses the closing tag, and refuses every answer to a request with tools. For a template that contains this line of
# Functionary's it has the right parser, but shows these tokens as text, so they have to be stop strings too.
FUNCTION_TAG_MARK = (
    '{#- set has_code_interpreter = tools | selectattr("type", "equalto", "code_interpreter") | list | length > 0 #}'
)
FUNCTION_TAG_STOPS = ("<|eot_id|>", "<|eom_id|>")
HEADER_BYTES = 64 * 2**20  # the vocabulary comes before the template
CALL: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Weather in Turin?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Turin", "days": 2}}}
        ]},
    ],
    "tools": [{"type": "function", "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    }}],
}  # fmt: skip


@dataclass(frozen=True)
class FirstToken:
    """A prompt's ids, and {token id: log-probability in nats} of the likeliest next tokens."""

    prompt: list[int]
    logprobs: dict[int, float]


def first_tokens(merged: MergedModel, run: Run, count: int = 3) -> list[FirstToken]:
    """What the merged model predicts for the start of an answer, after the first user turns of some conversations."""
    from finetune.export.merged import conversations_of, log_probabilities
    from formats import FormatError, encode_prompt

    prompts = []
    for conversation in conversations_of(run, count):
        messages = conversation["messages"]
        turn = next((i for i, m in enumerate(messages) if m["role"] == "assistant" and i), len(messages))
        with contextlib.suppress(FormatError):
            ids = encode_prompt(messages[:turn], conversation.get("tools"), merged.tokenizer, merged.format)
            if len(ids) <= MAX_PROMPT_TOKENS:
                prompts.append(ids)
    prompts = prompts[:count]
    with float32_compute(merged.model):
        answers = log_probabilities(merged.model, prompts)
    tops = [rows[-1].topk(COMPARED_TOKENS) for rows in answers]
    return [
        FirstToken(prompt, dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        for prompt, top in zip(prompts, tops, strict=True)
    ]


@contextlib.contextmanager
def float32_compute(model: PreTrainedModel) -> Iterator[None]:
    """A 16-bit model computes in float32, as llama.cpp does, with unchanged weights.

    Each module's weights are float32 only while it runs, which takes the memory of one module. Computed in bfloat16,
    log-probabilities would be off by a tenth of a nat.
    """
    dtypes: dict[Tensor, dtype] = {}

    def widen(module: nn.Module, inputs: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            dtypes[parameter] = parameter.dtype
            parameter.data = parameter.data.float()

    def narrow(module: nn.Module, inputs: tuple, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtypes[parameter])

    hooks = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stop_strings(header: bytes) -> tuple[str, ...]:
    """What has to end an answer beside the end token, by the template in a GGUF file's header."""
    return FUNCTION_TAG_STOPS if FUNCTION_TAG_MARK.encode() in header else ()


@contextlib.contextmanager
def llama_server(
    path: Path,
    *,
    context: int = 2048,
    chat_template: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    exact: bool = False,
    api_key: str | None = None,
) -> Iterator[Any]:
    """A llama.cpp server in this process for one GGUF file; `listening_address` is its URL.

    context  tokens, 0: the model's maximum
    port     0: any free port
    api_key  required from clients
    exact    plain attention and a float32 cache, so that only the file's own rounding remains
    Raises UserError when llama.cpp cannot load the file.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
    params.use_jinja = True
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():  # as for torch; llama.cpp ignores it
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.hostnames, params.port = [host], port
    if api_key is not None:
        params.api_keys = [api_key]
    if chat_template is not None:
        params.chat_template = chat_template
        params.antiprompt = list(stop_strings(chat_template.encode()))
    elif path.is_file():
        with path.open("rb") as file:
            params.antiprompt = list(stop_strings(file.read(HEADER_BYTES)))
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(
            f"llama.cpp cannot serve {path}: the file is missing, incomplete, or not of a supported model"
        ) from error
    try:
        # A server that is closed before its loop has started waits forever.
        server.handle_completions({"prompt": "a", "max_tokens": 1})
        yield server
    finally:
        del server


def unread_answers(path: Path, merged: MergedModel) -> list[str]:
    """Which written answers to a request with tools llama.cpp's server does not read: "a call", "text with braces".

    The server continues the written answer, and parses it with what it generates: here the end token alone. An answer
    is omitted if the format refuses it or writes no end, or the server continues something else (gpt-oss: the final
    channel).
    """
    from formats import IGNORE_INDEX, check_tokenizer, encode

    user, called = CALL["messages"]
    text = {"role": "assistant", "content": 'As JSON: {"degrees": 7}.'}
    ends = check_tokenizer(merged.tokenizer, merged.format)
    unread = []
    with llama_server(path) as server:
        for name, answer in {"a call": called, "text with braces": text}.items():
            encoded = encode({**CALL, "messages": [user, answer]}, merged.tokenizer, merged.format)
            sequence = encoded.sequences[-1].labels if encoded.status != "refused" else []
            ids = [label for label in sequence if label != IGNORE_INDEX]
            end = next((place for place, token in enumerate(ids) if token in ends), None)
            if end is None:
                continue
            written = merged.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            continued = [user, {"role": "assistant", "content": written}]
            request = {
                "messages": continued, "tools": CALL["tools"], "temperature": 0, "max_tokens": 2,
                "logit_bias": [[ids[end], 1e6]],
            }  # fmt: skip
            expected = [call["function"] for call in answer.get("tool_calls", [])]
            # RuntimeError: "output that does not match the expected format"; ValueError: arguments that are not JSON
            with contextlib.suppress(RuntimeError, ValueError):
                message = server.handle_chat_completions(request)["choices"][0]["message"]
                functions = [call["function"] for call in message.get("tool_calls") or []]
                calls = [{"name": one["name"], "arguments": json.loads(one["arguments"])} for one in functions]
                if calls == expected and (calls or message["content"] == answer["content"]):
                    continue
            url = server.listening_address
            before, after = (apply_template(url, one, CALL["tools"]) for one in ([user], continued))
            if before is None or after in (None, f"{before}{written}"):  # None: not of the expected format
                unread.append(name)
    return unread


def splits_alike(path: Path, merged: MergedModel) -> bool:
    """Whether llama.cpp splits a prompt of its own into the tokens that the model's tokenizer makes of this text."""
    tokenizer = merged.tokenizer
    with llama_server(path) as server:
        prompt = apply_template(server.listening_address, CALL["messages"][:1])
        if prompt is None:
            return True  # nothing to compare
        text = {"content": prompt, "add_special": True, "parse_special": True}
        theirs = _post(server.listening_address, "/tokenize", text)["tokens"]
    ours = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id]  # which side adds it depends on the template
    return theirs[theirs[:1] == start :] == ours[ours[:1] == start :]


def apply_template(url: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
    """The prompt that a llama.cpp server makes of a request; None if it refuses it."""
    messages = json.loads(json.dumps(messages))
    for call in (call for message in messages for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])  # as in OpenAI's requests
    return _post(url, "/apply-template", {"messages": messages, **({"tools": tools} if tools else {})}).get("prompt")


def _post(url: str, route: str, request: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request("POST", route, json.dumps(request), {"Content-Type": "application/json"})
        return json.load(connection.getresponse())


def compare_first_tokens(path: Path, expected: list[FirstToken]) -> str:
    """How far llama.cpp is from `expected`, as one sentence. Raises UserError when a 16- or 32-bit file is too far."""
    if not expected:
        return "not compared with Transformers: every prompt of the data is too long"
    differences, same = [], 0
    with llama_server(path, context=max(len(one.prompt) for one in expected) + 64, exact=True) as server:
        for one in expected:
            answer = server.handle_completions(
                {"prompt": one.prompt, "n_predict": 1, "max_tokens": 1, "n_probs": 50, "logprobs": 50, "temperature": 0}
            )
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {entry["id"]: entry["logprob"] for entry in top}
            differences += [abs(found.get(token, -math.inf) - logprob) for token, logprob in one.logprobs.items()]
            same += max(found, key=found.get) == max(one.logprobs, key=one.logprobs.get)
    worst = max(differences)
    limit = MAX_DIFFERENCE_NATS.get(path.stem.rpartition("-")[2], math.inf)
    if worst > limit:
        raise UserError(
            f"{path.name}: first-token log-probabilities of llama.cpp and Transformers differ by {worst:.3g} nats, "
            f"rounding explains {limit:g}; this release of llama.cpp converts the model wrongly, try another"
        )
    return (
        f"first-token log-probabilities of llama.cpp and Transformers differ by <= {worst:.3g} nats, "
        f"same likeliest token for {same} of {len(expected)} prompts"
    )
