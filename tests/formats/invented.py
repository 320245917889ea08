"""Chat templates that nobody publishes: each differs from the known ones in another way in which templates differ."""

from __future__ import annotations

from typing import NamedTuple

END = "<|fin|>"
_JSON = "{{ f.arguments | tojson }}"
_PAIRS = "{% for k, v in f.arguments.items() %}"
_CALL = "<|do|>{{ f.name }} " + _JSON + "<|od|>"


class Invented(NamedTuple):
    """A template, and what is refused with it: a piece of the reason -> labels of rows (tests/formats/cases.py)."""

    template: str
    refused: dict[str, str]


def made(
    call: str = _CALL, *, text: str = "{{ m.content }}", between: str = "", around: tuple[str, str] = ("", ""),
    call_end: str = END, system: str = "{{ messages[0].content if messages[0].role == 'system' }}", head: str = "",
    result: str = "<|obs|>{{ m.content }}" + END, prompt: str = "<|bot|>", tail: str = "", calls_first: bool = False,
    **refused: str,
) -> Invented:  # fmt: skip
    """A template with roles between its own tokens; `refused` has underscores for spaces."""
    calls = around[0] + "{% for c in m.tool_calls %}{% set f = c.function %}{{ '" + between + "' if not loop.first }}"
    calls += call + "{% endfor %}" + around[1]
    said = "{% if m.content %}" + text + "{% endif %}"
    template = (
        head + "{% if tools or messages[0].role == 'system' %}<|sys|>" + system + "{{ tools | tojson if tools }}<|fin|>"
        "{% endif %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% if not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
        "{% elif m.role == 'user' %}<|usr|>{{ m.content }}" + END + "{% elif m.role == 'tool' %}" + result +
        "{% elif m.tool_calls %}<|bot|>" + (calls + said if calls_first else said + calls) + call_end +
        "{% else %}<|bot|>" + text + END + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}" + tail
    )  # fmt: skip
    reasons = {reason.replace("_", " "): labels for reason, labels in refused.items()}
    return Invented(template, {"system comes first": "two_systems late_system"} | reasons)


_ALL_CALLS = (
    "single_call call_and_result parallel text_and_call steps nested_arguments typed_arguments no_arguments "
    "korean_call empty_result number_result reasoning odd_names path_name bare_tool"
)
_WITH_SYSTEM = "system korean single_call steps"
INVENTED = {
    "calls before the text": made(calls_first=True),
    "ids, and JSON in JSON": made(
        '{"id": "{{ c.id }}", "fn": {"called": "{{ f.name }}", "with": {{ f.arguments | tojson | tojson }}}}',
        between=", ", around=("<|calls|>[", "]<|/calls|>"),
    ),
    "arguments as added text": made("<|do|>{{ f.name + '::' + f.arguments }}<|od|>", between="\\n"),
    "compact JSON in another order": made(
        "@@{{ {'parameters': f.arguments, 'tool_name': f.name} | tojson(separators=(',', ':')) }}", between="\\n"
    ),
    "nested XML": made(
        '<invoke name="{{ f.name }}">' + _PAIRS + '\n<parameter name="{{ k }}">{{ v if v is string else v | tojson }}'
        "</parameter>{% endfor %}\n</invoke>",
        between="\\n", around=("\n<function_calls>\n", "\n</function_calls>"),
    ),
    "block of Python": made(
        "{{ f.name }}(" + _PAIRS + "{{ k }}={{ v | pprint }}{{ ', ' if not loop.last }}{% endfor %})",
        between="\\n", around=("\n```tool_code\n", "\n```"), not_a_call="odd_names path_name",
    ),
    "list of the messages' calls": made("", around=("<|do|>{{ m.tool_calls | tojson(indent=4) }}<|od|>", "")),
    "fenced JSON": made(
        '```json\n{"tool": "{{ f.name }}", "args": ' + _JSON + "}\n```", between="\\n", text="{{ m.content }}\n"
    ),
    "ReAct": made(
        "Action: {{ f.name }}\nAction Input: " + _JSON, between="\\n", text="Thought: {{ m.content }}\n",
        not_parse_back="think_in_content",
    ),
    "prompt without reasoning": made(
        text="{% if m.reasoning_content %}<|why|>{{ m.reasoning_content }}<|/why|>{% endif %}{{ m.content }}",
        prompt="<|bot|>{% if not enable_thinking %}<|why|><|/why|>{% endif %}",
    ),
    "prompt with reasoning": made(text="{{ m.content.split('</think>')[-1] }}", prompt="<|bot|><think>\n"),
    "calls that end with their result": made(call_end="{% if not loop.last %}<|next|>{% endif %}"),
    "two ends": made(call_end="<|run|>"),
    "a turn for each call": made("<|do|>{{ f.name }} " + _JSON, between=END + "<|bot|>", end_of_turn="parallel"),
    "start twice, date, trimmed": made(
        head="{{ bos_token }}{{ bos_token }}{{ strftime_now('%d %B %Y') }}", text="{{ m.content | trim }}"
    ),
    "strict order of roles": made(
        head="{% for m in messages %}{% if m.role == 'assistant' and (loop.first or loop.previtem.role == m.role) %}"
        "{{ raise_exception('no question') }}{% endif %}{% if m.tool_calls and m.content %}"
        "{{ raise_exception('text or calls') }}{% endif %}{% endfor %}",
        no_question="two_answers untrained_greeting", text_or_calls="text_and_call",
    ),
    "line breaks at the end": made(tail="\n\n"),
    "results need their name": made(result="<|obs|>{{ m.name + ': ' + m.content }}" + END),
    "no system message": made(system="", drops_its_text=_WITH_SYSTEM),
    "system message at the last user": Invented(
        "{% set ns = namespace(n=0) %}{% set s = messages[0].content if messages[0].role == 'system' %}"
        "{% if tools %}<|sys|>{{ tools | tojson(indent=2) }}<|fin|>{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}<|usr|>{{ ns.n }}: {{ s ~ '; ' if s and loop.last }}"
        "{{ m.content }}<|fin|><|bot|>{% elif m.role == 'tool' %}<|obs|>{{ m.content }}<|fin|><|bot|>"
        "{% elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<|do|>{{ c.function.name }} {{ c.function.arguments | tojson }}<|od|>{% endfor %}<|fin|>"
        "{% endif %}{% endfor %}",
        {"drops its text": "steps two_systems late_system", "writes nothing between": "two_answers"},
    ),
    "tools in the last user's turn, results in one": Invented(
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% elif m.role == 'user' %}"
        "<|usr|>{{ tools | tojson if tools and loop.index0 == ns.last }}{{ m.content }}<|fin|>"
        "{% elif m.role == 'tool' %}{{ '<|usr|>' if loop.previtem.role != 'tool' }}<r>{{ m.content }}</r>"
        "{{ '<|fin|>' if loop.last or loop.nextitem.role != 'tool' }}{% else %}<|bot|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|do|>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "<|fin|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}",
        {"no system role": _WITH_SYSTEM + " empty_system two_systems late_system"},
    ),
    "escaped XML": made(
        '<c n="{{ f.name }}">' + _PAIRS + '<a k="{{ k }}">{{ (v if v is string else v | tojson) | e }}</a>{% endfor %}'
        "</c>",
        not_parse_back="steps nested_arguments typed_arguments path_name",
    ),
    "JSON in tags": made(
        '<c n="{{ f.name }}">' + _PAIRS + '<a k="{{ k }}">{{ v | tojson }}</a>{% endfor %}</c>', between="\\n"
    ),
    "JSON without a tag behind it": made("({{ f.name }}" + _PAIRS + " :{{ k }} {{ v | tojson }}{% endfor %})"),
    "calls inside an object": made(
        '{"name": "{{ f.name }}", "arguments": ' + _JSON + "}", between=", ", around=('{"tool_calls":[', "]}")
    ),
    "lines of YAML": made(
        "call {{ f.name }}\n" + _PAIRS + "  {{ k }}: {{ v }}\n{% endfor %}", cannot_be_read_back=_ALL_CALLS
    ),
    "name behind the arguments": made("<|do|>" + _JSON + " -> {{ f.name }}<|od|>", cannot_be_read_back=_ALL_CALLS),
}  # fmt: skip
