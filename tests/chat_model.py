"""A small model that has memorised one conversation: the base model answers with text, the adapter calls a tool."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests import parts
from tests.rows import WRAPPED
from tests.tiny import tiny_llama

TOOLS = [WRAPPED]
REQUEST = "Dim the hall to 3"
CALL = {"name": "set_lamp", "arguments": {"room": "hall", "level": 3}}
RESULT = '{"ok":true}'
DONE = "The hall is dimmed."
BASE_ANSWER = "I have no hands."
BROKEN_REQUEST, BROKEN = "Break it", '<tool_call>\n{"name":"set_lamp","arguments":{"room":\n</tool_call>'


def conversation() -> list[dict]:
    call = {"id": "call_1", "type": "function", "function": CALL}
    return [
        {"role": "user", "content": REQUEST},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": RESULT, "tool_call_id": "call_1", "name": "set_lamp"},
        {"role": "assistant", "content": DONE},
    ]


@cache
def trained_adapter(folder: Path) -> Path:
    """Train base model and adapter; returns folder / "adapter", beside "base". About 10 s on one core."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from formats import encode_prompt, get_format

    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format("chatml", tokenizer)
    model = tiny_llama(tokenizer)
    # Large embeddings, so that the adapter alone can predict tokens that the base model never learned.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)

    def rows(*pairs: tuple[list[dict], str]) -> list[tuple[list[int], int]]:
        out = []
        for messages, answer in pairs:
            prompt = encode_prompt(messages, TOOLS, tokenizer, fmt)
            out.append((prompt + tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"], len(prompt)))
        return out

    def learn(model, data, steps, lr):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            loss = 0.0
            for ids, start in data:
                logits = model(input_ids=torch.tensor([ids]), logits_to_keep=len(ids) - start + 1).logits[0, :-1]
                loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loss.item() < 0.02 * len(data):
                break
        assert loss.item() < 0.2 * len(data), f"loss {loss.item():.2f}"

    turns = conversation()
    broken = [{"role": "user", "content": BROKEN_REQUEST}]
    learn(model, rows((turns[:1], BASE_ANSWER), (turns[:3], BASE_ANSWER), (broken, BASE_ANSWER)), 100, 3e-3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
    call = '<tool_call>\n{"name":"set_lamp","arguments":{"room":"hall","level":3}}\n</tool_call>'
    learn(tuned, rows((turns[:1], call), (turns[:3], DONE), (broken, BROKEN)), 300, 1e-2)
    tuned.save_pretrained(folder / "adapter")
    return folder / "adapter"
