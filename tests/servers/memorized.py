"""A small model that has learned a few answers by heart in one format, as a finished run with its exports.

    python -m tests.servers.memorized WORKSPACE --only chatml --exports vllm:lora vllm:merged gguf

Writes for each format a folder with experiments/run, the exports, and answers.json: each case with our own generation's
calls and text.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from finetune.runs.experiment import FINAL
from tests import parts
from tests.formats import public_templates
from tests.formats.cases import calls, result, row, says, tool, user
from tests.formats.pairs import PAIRS, Pair

PLACES = tool(
    "weather",
    "Weather of a city.",
    city={"type": "string", "enum": ["Turin", "Oslo", "Kyiv", "Rome"]},
    unit={"type": "string", "enum": ["C", "F"]},
)
NOTES = tool(
    "note",
    "Saves a note.",
    text={"type": "string"},
    priority={"type": "integer"},
    tags={"type": "array", "items": {"type": "string"}},
    options={"type": "object", "properties": {"pin": {"type": "boolean"}}},
)
TOOLS = (PLACES, NOTES)
TURIN = ("weather", {"city": "Turin", "unit": "C"})
NOTE = {"text": 'Buy "milk" & <eggs>, 한국', "priority": 2, "tags": ["a", "b c"], "options": {"pin": True}}
# The last message of each is generated. Formats may refuse some, such as parallel calls.
CASES = {
    "call": row(user("Weather in Turin?"), calls(TURIN), tools=TOOLS),
    "typed arguments": row(user("Note that I need milk."), calls(("note", NOTE)), tools=TOOLS),
    "parallel calls": row(
        user("Weather in Oslo and in Kyiv?"),
        calls(("weather", {"city": "Oslo", "unit": "C"}), ("weather", {"city": "Kyiv", "unit": "F"})),
        tools=TOOLS,
    ),
    "text and call": row(
        user("Explain, then look up Rome."),
        calls(("weather", {"city": "Rome", "unit": "C"}), text="I look it up."),
        tools=TOOLS,
    ),
    "text": row(user("Name a river."), says("The Rhine is a river."), tools=TOOLS),
    "after a result": row(
        user("Weather in Turin?"), calls(TURIN), result('{"degrees": 7}'), says("It is 7 degrees in Turin."),
        tools=TOOLS,
    ),
}  # fmt: skip
# Published templates beside those of PAIRS: one for each kind of derived grammar, and one that has no place for tools.
PUBLISHED = ("gemma4_v5", "glm4moe", "gptoss", "lfm2_v2", "phi3_5")
EXPORTS = ("vllm:lora", "vllm:merged", "gguf")
MAX_NEW_TOKENS = 160
RANK = 16
LEARNING_RATE = 3e-3  # the largest, after 30 steps; 0 at the last one
SEEDS = 4  # weights to start from; some cannot tell two answers apart
MAX_LOSS = 0.2  # nats, of each trained token: its probability is above 0.8


def small_model(tokenizer: Any, answered: list[int], seed: int) -> Any:
    """A random Llama that can say only the tokens `answered`: all others have zeros in the output embeddings.

    The rows of `answered` are large enough that an adapter of the layers can make one token certain.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=1.0)
        head = torch.zeros_like(model.lm_head.weight)
        head[answered] = torch.randn(len(answered), config.hidden_size) * 0.2
        model.lm_head.weight.copy_(head)
    return model


def memorize(model: Any, sequences: list[Any], answered: list[int], max_steps: int = 600) -> float:
    """Train adapter and layers until every trained token is certain; returns the largest loss of a token, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    inputs, labels = shared_prefix([one.input_ids for one in sequences], [one.labels for one in sequences])
    trained = labels != -100
    targets = torch.searchsorted(torch.tensor(answered), labels[trained])
    llama = model.get_base_model()
    head = llama.lm_head.weight[answered].detach()
    others = torch.full((len(targets), 1), math.log(llama.config.vocab_size))  # their logits are 0
    loss = math.inf
    for step in range(max_steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / 30, 1 - step / max_steps)
        hidden = llama.model(**inputs, use_cache=False).last_hidden_state[trained]
        losses = cross_entropy(torch.cat([hidden @ head.T, others], dim=1), targets, reduction="none")
        loss = losses.max().item()
        if loss < MAX_LOSS:  # of these weights, not of those before a last step
            break
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def shared_prefix(ids: list[list[int]], labels: list[list[int]]) -> tuple[dict[str, Any], Any]:
    """All sequences as one row with their common beginning (the tools) once, and the id that each position predicts."""
    import torch

    prefix = len(os.path.commonprefix([one[:-1] for one in ids]))  # noqa: RUF071  ids, not paths
    prefix = min([prefix, *(next(n for n, label in enumerate(one) if label != -100) - 1 for one in labels)])
    parts = [range(prefix), *(range(prefix, len(one)) for one in ids)]
    owners = [0, *range(len(ids))]
    part = torch.tensor([number for number, places in enumerate(parts) for _ in places])
    row = torch.arange(len(part))
    sees = (row[:, None] >= row) & ((part[:, None] == part) | (part == 0))
    predicted = [
        labels[owner][place + 1] if place + 1 < len(ids[owner]) else -100
        for owner, places in zip(owners, parts, strict=True)
        for place in places
    ]
    inputs = {
        "input_ids": [ids[owner][place] for owner, places in zip(owners, parts, strict=True) for place in places],
        "position_ids": [place for places in parts for place in places],
    }  # fmt: skip
    return {name: torch.tensor([values]) for name, values in inputs.items()} | {
        "attention_mask": sees[None, None]
    }, torch.tensor([predicted])


def make_run(folder: Path, pair: Pair) -> None:
    """Write base, data and the finished run; its rows are the cases that the format can express."""
    from peft import LoraConfig, get_peft_model

    from finetune.runs.experiment import Experiment
    from finetune.runs.saving import save_final_model
    from formats import check_tokenizer, encode

    tokenizer, fmt = pair.load()
    encoded = {name: encode(case, tokenizer, fmt) for name, case in CASES.items()}
    usable = {name: one.sequences[-1] for name, one in encoded.items() if one.status != "refused"}
    for name, one in encoded.items():
        if name not in usable:
            print(f"{pair.format}: {name}: refused: {one.reason}", flush=True)
    answered = sorted({label for one in usable.values() for label in one.labels if label != -100})
    base = folder / "base"
    tokenizer.save_pretrained(base)
    if sentencepiece := parts.sentencepiece_file(pair.vocabulary):
        shutil.copy(sentencepiece, base / "tokenizer.model")  # as published: llama.cpp reads the order of merges in it
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(CASES[name], ensure_ascii=False) + "\n" for name in usable), encoding="utf-8")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    for seed in range(SEEDS):
        llama = small_model(tokenizer, answered, seed)
        llama.name_or_path = llama.config._name_or_path = str(base)
        llama.config.save_pretrained(base)
        adapted = get_peft_model(llama, lora)
        llama.model.layers.requires_grad_(True)  # an adapter of random layers alone may not learn all answers
        loss = memorize(adapted, list(usable.values()), answered)
        if loss <= MAX_LOSS:
            break
    else:
        print(f"{pair.format}: the answers are not certain: a token has a loss of {loss:.2f} nats", flush=True)
    flags = {
        "dataset": [str(rows)], "format": pair.format, "max_seq_length": 9000, "trust_remote_code": False,
        "rank": RANK, "alpha": 2 * RANK, "dropout": 0.0, "target_modules": targets, "lr": LEARNING_RATE, "epochs": 1,
        "batch_size": 1, "grad_accum": 1, "seed": 0,
    }  # fmt: skip
    config = {
        "flags": flags, "base_model": str(base), "base_model_revision": None, "dtype": "float32",
        "load_in_4bit": False, "format": {"name": fmt.name}, "steps": 1, "result": {"final_loss": loss},
        "data": {"sequences": len(usable), "trained_tokens": 1},
    }  # fmt: skip
    experiment = Experiment.create(folder / "experiments", "run", config, exact_name=True)
    save_final_model(experiment, adapted, tokenizer, fmt, check_tokenizer(tokenizer, fmt))
    adapted.unload().save_pretrained(base)


def own_answers(run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{case: request and our own generation's answer}."""
    from finetune.generation.generate import Decoding, generate
    from finetune.runs.find import load_for_inference
    from formats import check_tokenizer, encode_prompt

    model, tokenizer, fmt = load_for_inference(run)
    cases = {name: case for name, case in CASES.items() if case in rows}
    prompts = [encode_prompt(case["messages"][:-1], case["tools"], tokenizer, fmt) for case in cases.values()]
    decoding = Decoding(stop_ids=tuple(check_tokenizer(tokenizer, fmt)), max_new_tokens=MAX_NEW_TOKENS)
    answers = {}
    for (name, case), made in zip(cases.items(), generate(model, prompts, decoding=decoding).results, strict=True):
        text = tokenizer.decode(made.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parsed = fmt.parse(text, case["tools"])
        answers[name] = {
            "messages": case["messages"][:-1], "tools": case["tools"], "text": text, "content": parsed.content,
            "calls": parsed.tool_calls, "trained_calls": [
                {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
                for call in case["messages"][-1].get("tool_calls", [])
            ],
        }  # fmt: skip
    return answers


def default_pairs(only: list[str] | None = None) -> list[Pair]:
    """The first vocabulary of every format that has a place for tools; of `native` one for each published template.

    only   names of formats or templates, or files of templates (*.jinja)
    """
    first: dict[tuple[str, str], Pair] = {}
    for pair in (*PAIRS, *published_pairs(only)):
        no_tools = pair.format == "plain" or pair[:2] == ("mistral", "mistral-v1")
        if no_tools or (only and not {pair.format, pair.template} & {*only}):
            continue
        first.setdefault((pair.format, pair.template if pair.format.startswith("native") else ""), pair)
    return list(first.values())


def published_pairs(only: list[str] | None = None) -> list[Pair]:
    """Published templates as `--format auto` reads them, on Qwen3's vocabulary with their control tokens."""
    from formats import choose_format

    pairs = []
    for name in (*PUBLISHED, *(name for name in only or () if name.endswith(".jinja"))):
        tokenizer = public_templates.load(name, "bytes")
        tokens = sum(public_templates.control_tokens(tokenizer.chat_template), ())
        pairs.append(Pair(choose_format(tokenizer)[0].name, "qwen3", name, tokens))
    return pairs


def folder_of(pair: Pair, workspace: Path) -> Path:
    return workspace / "-".join(filter(None, (pair.format, pair.vocabulary, Path(pair.template).stem)))


def log_of(export: Path) -> Path:
    """What the export printed."""
    return export.with_name(f"{export.name}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--only", nargs="*", metavar="FORMAT")
    parser.add_argument("--exports", nargs="*", default=[], choices=EXPORTS)
    parser.add_argument("--runs_only", action="store_true", help="make the runs, no answers and exports")
    args = parser.parse_args()
    folders = {pair: folder_of(pair, args.workspace) for pair in default_pairs(args.only)}
    for pair, folder in folders.items():  # before Unsloth is imported, which patches Transformers
        ends = (folder / "experiments" / "run" / FINAL, folder / "base" / "model.safetensors")
        if not all(path.exists() for path in ends):
            shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left
            make_run(folder, pair)

    if args.runs_only:
        return 0
    import export_lora

    for pair, folder in folders.items():
        run = folder / "experiments" / "run"
        if not (folder / "answers.json").is_file():
            rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
            answers = own_answers(run, rows)
            for name, answer in answers.items():
                if answer["calls"] != answer["trained_calls"]:
                    print(f"{pair.format}: {name}: our own generation reads {answer['calls']}", flush=True)
            (folder / "answers.json").write_text(json.dumps(answers, ensure_ascii=False, indent=1), encoding="utf-8")
        for kind in args.exports:
            to, _, mode = kind.partition(":")
            more = ["--mode", mode] if mode else ["--quantization", "f16"]
            output = folder / kind.replace(":", "-")
            if not output.is_dir():
                said = io.StringIO()
                with contextlib.redirect_stderr(said):
                    export_lora.main([str(run), "--to", to, *more, "--output", str(output), "--name", "served"])
                print(said.getvalue(), end="", file=sys.stderr)
                log_of(output).write_text(said.getvalue(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
