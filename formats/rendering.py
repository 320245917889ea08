"""Rendering through `apply_chat_template`'s own rules, without writing the same JSON over and over.

A conversation is rendered twice for every answer, and each time a template writes all tools as JSON again. Here the
template is compiled with the very settings of Transformers, while a `JsonOnce` is in force every object is written
once, and `KnownTools` keep their JSON from one conversation to the next. The first renderings of every template are
compared with `apply_chat_template`; a template or tokenizer for which one differs is rendered by that call alone from
then on.
"""

from __future__ import annotations

import json
import weakref
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any

PROOFS = 16  # renderings of every template that are compared

_WRITTEN: ContextVar[dict[tuple, tuple[str, Any]] | None] = ContextVar("written", default=None)


class KnownTools(list):
    """Tools shared by all conversations that carry the same ones; never changed.

    text      their JSON, which tells them from others
    written   what templates wrote of them, filled by the first conversation
    """

    def __init__(self, tools: list[dict], text: str) -> None:
        super().__init__(tools)
        self.text = text
        self.written: dict[tuple, tuple[str, Any]] = {}


class JsonOnce:
    """While this context is open nobody changes messages and tools, so the JSON of an object stays what it is."""

    def __init__(self, tools: list[dict]) -> None:
        self._tools = tools if isinstance(tools, KnownTools) else None

    def __enter__(self) -> None:
        self._written = dict(self._tools.written) if self._tools is not None else {}
        self._token = _WRITTEN.set(self._written)

    def __exit__(self, *_: Any) -> None:
        _WRITTEN.reset(self._token)
        if self._tools is not None and not self._tools.written:
            own = {id(self._tools)}
            for tool in self._tools:
                own |= {id(tool), *map(id, tool.values())}
            kept = {key: entry for key, entry in self._written.items() if id(entry[1]) in own}
            self._tools.written.update(kept)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Transformers' filter of this name (`transformers.utils.chat_template_utils`)."""
    written = _WRITTEN.get()
    if written is None or not isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    key = (id(value), ensure_ascii, indent, separators and tuple(separators), sort_keys)
    if key not in written:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        written[key] = (text, value)  # the object is kept, so that no other one gets its id
    return written[key][0]


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


class _Compiled:
    """One template under one tokenizer: compiled here, or None when only `apply_chat_template` will do."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.proofs = PROOFS
        own = getattr(type(tokenizer), "apply_chat_template", None)
        usual = getattr(own, "__module__", "") == "transformers.tokenization_utils_base"
        self.template = _compile(template) if usual else None


@cache
def _environment_class() -> type:
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    of_dicts = frozenset(dir(dict))
    plain = frozenset((str, int, float, bool, dict, list, tuple))

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, with a short way for what chat templates do thousands of times: `message.role`, `loop.first`.

        Everything else goes the sandbox's own way; the short way gives what that one would.
        """

        def getattr(self, obj: Any, attribute: str) -> Any:
            kind = type(obj)
            if kind is dict:
                # No attribute of a dict has this name, so the sandbox would look for a key.
                if attribute in obj and attribute not in of_dicts:
                    return obj[attribute]
            elif (kind is Namespace or kind is LoopContext) and not attribute.startswith("_"):
                value = getattr(obj, attribute, None)
                if type(value) in plain:  # no method that the sandbox would have to wrap
                    return value
            return super().getattr(obj, attribute)

    return Environment


def _compile(template: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols

    environment = _environment_class()(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError:  # {% generation %} and whatever else only Transformers' own environment knows
        return None


_KNOWN: weakref.WeakKeyDictionary[Any, dict[str, _Compiled]] = weakref.WeakKeyDictionary()


def render_template(
    tokenizer: Any, template: str, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool, **kwargs
) -> str:
    """The text of `tokenizer.apply_chat_template(…, tokenize=False)`. Raises whatever the template raises."""

    def served() -> str:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **kwargs,
        )

    compiled = _KNOWN.setdefault(tokenizer, {})
    if template not in compiled:
        compiled[template] = _Compiled(tokenizer, template)
    known = compiled[template]
    if known.template is None or not messages:
        return served()
    if not known.proofs:
        return _own(known, tokenizer, messages, tools, add_generation_prompt, kwargs)
    text = served()
    known.proofs -= 1
    try:
        alike = _own(known, tokenizer, messages, tools, add_generation_prompt, kwargs) == text
    except Exception:  # templates raise anything
        alike = False
    if not alike:
        known.template = None
    return text


def _own(known: _Compiled, tokenizer: Any, messages, tools, add_generation_prompt: bool, kwargs: dict) -> str:
    return known.template.render(
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{**tokenizer.special_tokens_map, **kwargs},
    )
