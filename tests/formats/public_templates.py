"""Published chat templates (those that TRL ships) on a vocabulary that has their control tokens."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

from tests import parts

# Texts in a template that are tokens of its model's vocabulary. Special ones also open or end something for sure.
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>{}]{1,40}｜>|\[/?[A-Z_]{3,24}\]|</?s>|<(?:start|end)_(?:of_turn|function_[a-z]+)>|<eos>|<bos>|<sep>"
    r"|<(?:turn|channel|tool)[a-z_]*\|>|<\|(?:turn|channel|think|tool)[a-z_]*>|<end_of_utterance>"
    r"|\[\|[a-z]+\|\]|<SPECIAL_\d+>|<seed:[be]os>|<(?:beginning|end)_of_sentence>|\[e~\[|\]~b\]|\]<\]minimax\[>\["
)
_MARKS = re.compile(
    r"</?(?:tool|think|arg|assistant|user|system|TOOLCALL)[a-z_]*>|</?(?:seed|minimax|mm):[a-z_]+>|</?escape>"
)
_LLAMA3 = "<|start_header_id|>"  # templates of Llama 3's vocabulary that leave its start token to `bos_token`


def control_tokens(template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(special tokens, other added tokens) that a template's text names."""
    special = _SPECIAL.findall(template)
    if _LLAMA3 in template:
        special.append("<|begin_of_text|>")
    if re.search(r"'<\|' ?\+|<\|\{\{", template):  # puts them together from the messages' roles
        special += [f"<|{role}|>" for role in ("system", "user", "assistant", "observation", "tool")]
    if "<｜hy_" in template:  # Hunyuan 3 formats the names of its tokens
        special += [f"<｜hy_{name}:opensource｜>" for name in ("eos", "begin_of_sentence", "User", "Assistant")]
    if "List of tools: " in template:  # LFM2's vocabulary has tokens for calls that its first template does not write
        special += ["<|tool_call_start|>", "<|tool_call_end|>"]
    special = tuple(dict.fromkeys(special))
    return special, tuple(mark for mark in dict.fromkeys(_MARKS.findall(template)) if mark not in special)


def _byte_vocabulary():
    """A tokenizer of single bytes, which loads at once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def _qwen3_vocabulary():
    from tokenizers import Tokenizer

    state = json.loads((parts.qwen3_dir() / "tokenizer.json").read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<|endoftext|>"]
    return Tokenizer.from_str(json.dumps(state))


@cache
def tokenizer_with(template: str, vocabulary: str = "bytes"):
    """A tokenizer with `template` whose only added tokens are those that the template names."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    made = _byte_vocabulary() if vocabulary == "bytes" else _qwen3_vocabulary()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    special, marks = control_tokens(template)
    tokens = [AddedToken(text, normalized=False, special=True) for text in special]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in marks])
    starts = ("<s>", "<bos>", "<|begin_of_text|>")
    tokenizer.bos_token = next((text for text in starts if text in special), "<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def names() -> list[str]:
    """The templates that TRL ships, without its variants for training masks; empty when TRL is not installed."""
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0], "chat_templates").glob("*.jinja")) if folders else []
    return [path.stem for path in found if not path.stem.endswith("_training")]


def load(name: str, vocabulary: str = "qwen3"):
    """A tokenizer with the published template `name`."""
    return tokenizer_with(parts.reference_template(name), vocabulary)
