"""Small chat templates, one for each way to write calls; `END` ends a turn unless the template says otherwise."""

from __future__ import annotations

END, CALL_END, OPEN = "<|done|>", "<|run|>", "<|role|>"
TOKENS = (END, CALL_END, OPEN, '<|"|>')


def template(
    call: str, *, text: str = "{{ m.content }}", before: str = "", between: str = "", after: str = "", **ends: str
):
    """A template whose calls are written as `call` (variables: f.name, f.arguments, number)."""
    end, call_end = ends.get("end", END), ends.get("call_end", END)
    return (
        "{% if tools %}" + OPEN + "system\n{{ tools | tojson }}" + END + "\n{% endif %}"
        "{% for m in messages %}" + OPEN + "{{ m.role }}\n"
        "{% if m.tool_calls %}{% if m.content %}" + text + "\n{% endif %}" + before +
        "{% for c in m.tool_calls %}{% set f = c.function %}{% set number = loop.index0 %}"
        "{% if not loop.first %}" + between + "{% endif %}" + call + "{% endfor %}" + after + call_end +
        "{% elif m.role == 'assistant' %}" + text + end + "{% else %}{{ m.content }}" + END + "{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}" + OPEN + "assistant\n{% endif %}"
    )  # fmt: skip


_PAIRS = "{% for k, v in f.arguments.items() %}"
_PLAIN = "{{ v if v is string else v | tojson }}"
STYLES: dict[str, str] = {
    "tagged XML": template(
        f"<tool name={{{{ f.name }}}}>\n{_PAIRS}<arg={{{{ k }}}}>{_PLAIN}</arg>\n{{% endfor %}}</tool>", between="\n"
    ),
    "typed attributes": template(
        f'<run fn="{{{{ f.name }}}}">{_PAIRS}<in name="{{{{ k }}}}" string="{{{{ (v is string) | tojson }}}}">'
        f"{_PLAIN}</in>{{% endfor %}}</run>",
    ),
    "python list": template(
        "{{ f.name }}(" + _PAIRS + "{{ k }}={{ v | pprint }}{{ ', ' if not loop.last }}{% endfor %})",
        before="[",
        between=", ",
        after="]",
    ),
    "JSON list": template(
        '{"tool": {{ f.name | tojson }}, "input": {{ f.arguments | tojson }}}', before="CALLS[", between=", ", after="]"
    ),
    "a list for each call": template(
        '{"calls": [{"name": "{{ f.name }}", "with": {{ f.arguments | tojson }}}]}', between="\n"
    ),
    "JSON behind keys": template("({{ f.name }}" + _PAIRS + " :{{ k }} {{ v | tojson }}{% endfor %})", between="\n"),
    "name before JSON": template(
        "<|call|>functions.{{ f.name }}:{{ number }}<|args|>{{ f.arguments | tojson }}<|/call|>", before="", between=""
    ),
    "arguments as text": template("<c>{{ f.name }} {{ f.arguments }}</c>"),  # of an object: Python's repr
    "arguments as added text": template("<c>{{ f.name + ' ' + f.arguments }}</c>"),  # of an object: an error
    "different ends": template(
        "to={{ f.name }} {{ f.arguments | tojson }}", before="<|tools|>", between="<|tools|>", call_end=CALL_END
    ),
}
STYLES["several templates"] = STYLES["JSON list"]
# Its prompt opens reasoning that it writes in no answer.
ALWAYS_THINKS = template(
    "<c>{{ f.name }} {{ f.arguments | tojson }}</c>", text="{{ m.content.split('</think>')[-1] }}"
).replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# A closing token inside every turn that is not its end.
INNER = template("<c>{{ f.name }} {{ f.arguments | tojson }}</c>", text="<|text|>{{ m.content }}<|/text|>")
RELAXED = (
    '{% macro value(v) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is mapping %}'
    "{{ '{' }}"
    "{% for k, w in v.items() %}{{ k }}:{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}}"
    "{% elif v is iterable %}[{% for w in v %}{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}]"
    "{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
)
STYLES["relaxed JSON"] = RELAXED + template("<|call|>do:{{ f.name }}{{ value(f.arguments) }}<|/call|>")
# Writes calls that no parser reads: the values stand before their names.
UNREADABLE = template("{% for k, v in f.arguments.items() %}{{ v }} as {{ k }};{% endfor %} for {{ f.name }}")
# Templates that end only past turns: with the next role's own token, or with an end between turns.
_CALLS = "{% for c in m.tool_calls or [] %}<c>{{ c.function.name }} {{ c.function.arguments | tojson }}</c>{% endfor %}"
_ROLES = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}" + _CALLS + "{% if not loop.last %}BETWEEN{% endif %}"
    "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# <|user|><|done|> #}"
)
ROLE_ENDS, BETWEEN_ENDS = _ROLES.replace("BETWEEN", ""), _ROLES.replace("BETWEEN", "{{ '\n<|done|>' }}")
# Granite 4's layout: roles between two tokens, calls as Hermes writes them.
ROLE_TOKENS = (
    "{% set s = '<|start_of_role|>' %}{% set e = '<|end_of_role|>' %}{% set t = '<|end_of_text|>\n' %}"
    "{% if tools %}{{ s + 'system' + e }}Tools: <tools>"
    "{% for o in tools %}\n{{ o | tojson }}{% endfor %}\n</tools>{{ t }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ s + 'user' + e }}<tool_response>\n{{ m.content }}\n</tool_response>{{ t }}"
    "{% else %}{{ s + m.role + e + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{{ t }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ s + 'assistant' + e }}{% endif %}"
)
# Reasoning between tags of its own, of which the prompt never opens any.
REASONED = template(
    "<c>{{ f.name }} {{ f.arguments | tojson }}</c>", between="\n",
    text="{% if m.reasoning_content %}<|why|>\n{{ m.reasoning_content }}\n<|/why|>{% endif %}{{ m.content }}",
    before="{% if m.reasoning_content and not m.content %}<|why|>\n{{ m.reasoning_content }}\n<|/why|>{% endif %}",
)  # fmt: skip
