"""Rendering exactly as `apply_chat_template` does, but faster.

A conversation is rendered twice for every answer. Templates are compiled once with the settings of Transformers, and
`CachedTools` keep the JSON that templates write of them. The first renderings of every template are compared with
`apply_chat_template`; a template or tokenizer for which one differs is rendered by that method from then on.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template

COMPARED_RENDERINGS = 16  # per template


class CachedDict(dict):
    """A dict that is never changed; `written` holds the JSON that templates wrote of it, by `tojson`'s options."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.written: dict[tuple, str] = {}


_DICT_ATTRIBUTES = frozenset((*dir(CachedDict), "written"))


class CachedTools(list):
    """Tools shared by all conversations that carry the same ones, and their JSON as `text`; never changed."""

    def __init__(self, tools: list[dict], text: str) -> None:
        super().__init__(CachedDict({key: _cached(value) for key, value in tool.items()}) for tool in tools)
        self.text = text
        self.written: dict[tuple, str] = {}


def _cached(value: Any) -> Any:
    return CachedDict(value) if isinstance(value, dict) else value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Transformers' filter of this name (`transformers.utils.chat_template_utils`)."""
    options = (ensure_ascii, indent, separators and tuple(separators), sort_keys)
    written = getattr(value, "written", None)
    if written is not None and options in written:
        return written[options]
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if written is not None:
        written[options] = text
    return text


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


@cache
def sandboxed_environment() -> Environment:
    from jinja2.ext import loopcontrols
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class FastEnvironment(ImmutableSandboxedEnvironment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            # `message.role`: the sandbox looks for a key as well when the object has no attribute of this name.
            if isinstance(obj, dict) and attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            if type(obj) in (LoopContext, Namespace) and not attribute.startswith("_"):
                with contextlib.suppress(AttributeError):
                    return getattr(obj, attribute)
            return super().getattr(obj, attribute)

    environment = FastEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _compile(template: str) -> Template | None:
    from jinja2.exceptions import TemplateError

    try:
        return sandboxed_environment().from_string(template)
    except TemplateError:  # {% generation %} and whatever else only Transformers' own environment has
        return None


class _Renderer:
    """One template of one tokenizer; `template` is None when only `apply_chat_template` renders it correctly."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.comparisons_left = COMPARED_RENDERINGS
        method = getattr(type(tokenizer), "apply_chat_template", None)
        overridden = getattr(method, "__module__", "") != "transformers.tokenization_utils_base"
        self.template = None if overridden else _compile(template)


_RENDERERS: weakref.WeakKeyDictionary[Any, dict[str, _Renderer]] = weakref.WeakKeyDictionary()


def render_template(
    tokenizer: Any,
    template: str,
    messages: list[dict],
    tools: list[dict] | None,
    add_generation_prompt: bool,
    **kwargs: Any,
) -> str:
    """The text of `tokenizer.apply_chat_template(…, tokenize=False)`. Raises whatever the template raises."""
    arguments = {"tools": tools, "add_generation_prompt": add_generation_prompt, **kwargs}
    renderers = _RENDERERS.setdefault(tokenizer, {})
    if template not in renderers:
        renderers[template] = _Renderer(tokenizer, template)
    renderer = renderers[template]

    compiled = renderer.template if messages else None
    variables = {"messages": messages, "documents": None, **tokenizer.special_tokens_map, **arguments}
    if compiled and not renderer.comparisons_left:
        return compiled.render(variables)
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    if compiled:
        renderer.comparisons_left -= 1
        try:
            equal = compiled.render(variables) == text
        except Exception:  # templates raise anything
            equal = False
        if not equal:
            renderer.template = None
    return text
