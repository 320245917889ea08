"""Rows of a request and its answer in columns: pairs, preference rows, call benchmarks, SQuAD."""

from __future__ import annotations

from typing import Any

from finetune.reading.chat_exports import same_messages
from finetune.reading.columns import Fields, decoded
from finetune.reading.provider_messages import converted, is_langchain, is_responses
from finetune.reading.request_logs import response_answer, response_unread
from finetune.reading.row_files import RowError, decode_json
from finetune.reading.text_shapes import read_speaker_text, text_field

Message = dict[str, Any]
_ASKING = ("user", "human", "tool", "function", "observation", "ipython", "tool_response", "function_response")
ANSWER_FIELDS = ("completion", "ground_truth")


def _role(message: dict[str, Any]) -> Any:
    return next((message[key] for key in ("role", "from", "type") if message.get(key)), None)


def answer_field(fields: Fields) -> str | None:
    """The field that answers messages which end with the user or with a tool's result."""
    messages = decoded(fields.get("messages"))
    try:
        last = converted(messages[-1:])[-1] if isinstance(messages, list) and messages else None
    except RowError:
        last = None
    if not isinstance(last, dict):
        return None
    if is_responses(messages) and isinstance(fields.get("completion"), list):  # the items of one response
        return "completion"
    return next((n for n in ANSWER_FIELDS if fields.get(n) not in (None, "")), None) if _role(last) in _ASKING else None


def read_messages(fields: Fields) -> Any:
    """Messages, and the answer beside them where they end with a question."""
    messages, name = decode_json(fields["messages"], "messages"), answer_field(fields)
    if name is not None:
        answer = response_answer(fields[name])
        if is_responses(messages) and isinstance(answer, list):
            return [*messages, *answer]
        return joined(converted(messages), answer_messages(answer, name))
    return messages


def answer_messages(value: Any, name: str) -> list[Any]:
    """An answer as messages: text, a message, calls, a list of messages or of parts, or texts of which the first."""
    value = response_answer(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        inner = decoded(value)
        value = inner if _are_messages(inner if isinstance(inner, list) else [inner]) else value
    value = value[0] if _is_texts(value) else value
    if not isinstance(value, (list, dict)):
        return [{"role": "assistant", "content": text_field({name: value}, name)}]
    items = value if isinstance(value, list) else [value]
    if items and all(map(_is_call, items)):
        return [calling(items)]
    messages = converted(items)
    if messages is not items or any(map(_is_message, items)) or not all(isinstance(item, dict) for item in items):
        return messages
    if items is value:
        return [{"role": "assistant", "content": value}] if value else []
    if value.keys() & {"content", "tool_calls"}:
        return converted([{"role": "assistant", **value}])
    raise RowError(f"the {name} is an object without role and content; give a message or text")


def answer_unread(value: Any) -> list[str]:
    """What of an answer's column is not read: further answers, and what a response holds beside its answer."""
    return ["further answers"] if _is_texts(value) and len(value) > 1 else response_unread(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value or is_langchain([value]))


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict) or _is_message(value):
        return False
    function = value["function"] if isinstance(value.get("function"), dict) else value
    return isinstance(function.get("name"), str) and ("arguments" in function or "parameters" in function)


def joined(prompt: list[Any], answer: list[Any]) -> list[Any]:
    """The prompt and what follows it; an answer that repeats the prompt, or its end, does not repeat it here."""
    if not isinstance(prompt, list) or not answer or _role_of(answer[0]) not in ("system", "user", "human"):
        return [*prompt, *answer] if isinstance(prompt, list) else prompt
    size = len(prompt)
    for start in range(len(answer) - size + 1):
        if same_messages(answer[start : start + size], prompt):
            return answer
    for shared in range(min(size, len(answer)), 0, -1):
        if same_messages(prompt[-shared:], answer[:shared]):
            return [*prompt, *answer[shared:]]
    raise RowError("the answer is a conversation of its own that does not repeat the prompt; keep one of the two")


def _role_of(message: Any) -> Any:
    return _role(message) if isinstance(message, dict) else None


def read_pair(fields: Fields) -> list[Any]:
    """A prompt and its answer; each is text or, as in TRL's conversational rows, a list of messages."""
    name = next(name for name in ANSWER_FIELDS if name in fields)
    answer = answer_messages(fields[name], name)
    prompt = fields["prompt"]
    if isinstance(prompt, str) and prompt.lstrip().startswith("["):
        inner = decoded(prompt)
        prompt = inner if _are_messages(inner) else prompt
    if isinstance(prompt, list):
        return joined(converted(prompt), answer)
    if isinstance(prompt, str) and _asks_assistant(prompt):
        return joined(read_speaker_text({"text": prompt.strip()})[:-1], answer)
    messages = []
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowError("history is not a list of [question, answer] pairs")
    for question, reply in history:
        messages += [_asks(question), {"role": "assistant", "content": reply}]
    return joined([*messages, _asks(_with_context(fields))], answer)


def _with_context(fields: Fields, *, first: bool = False) -> str:
    """The request and its context, separated by a blank line."""
    texts = [text_field(fields, name) for name in (("context", "prompt") if first else ("prompt", "context"))]
    return "\n\n".join(text for text in texts if text.strip()) or texts[0]


def is_squad(fields: Fields) -> bool:
    """Whether the answers are texts with their places in the context."""
    answers = decoded(fields["answers"])
    if isinstance(answers, dict):
        return isinstance(answers.get("text"), list)
    return isinstance(answers, list) and bool(answers) and all(isinstance(a, dict) and "text" in a for a in answers)


def read_squad(fields: Fields) -> list[Any]:
    """The first of the accepted answers; the context comes before the question."""
    answers = decoded(fields["answers"])
    texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise RowError("answers are empty: the question has no answer in its context, so there is nothing to train")
    return [_asks(_with_context(fields, first=True)), {"role": "assistant", "content": texts[0]}]


_SPEAKERS = ("human:", "user:", "assistant:")


def is_whole_conversation(fields: Fields) -> bool:
    """Whether the answer column holds the conversation itself, as messages or as text with speakers."""
    value = response_answer(decoded(fields["completion"]))
    if isinstance(value, str):
        return value.lstrip().lower().startswith(_SPEAKERS)
    return _are_messages(value)


def _asks_assistant(prompt: str) -> bool:
    """Whether a prompt is `Human: … Assistant:`, as in Anthropic's first sets."""
    text = prompt.strip().lower()
    return text.startswith(_SPEAKERS) and text.endswith("\nassistant:")


def read_whole_conversation(fields: Fields) -> list[Any]:
    """A conversation in `chosen`, without a prompt column."""
    value = response_answer(decoded(fields["completion"]))
    return read_speaker_text({**fields, "text": value.strip()}) if isinstance(value, str) else value


def _asks(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def calling(calls: list[Any], content: str = "") -> dict[str, Any]:
    """An assistant message with calls."""
    return {"role": "assistant", "content": content, "tool_calls": calls}


def asked(fields: Fields, answer: dict[str, Any]) -> list[Any]:
    """The prompt as the user's message, and its answer."""
    return [_asks(text_field(fields, "prompt")), answer]
