"""Generated conversations against every format: parity and masks must hold for all of them.

python -m tests.formats.fuzz --conversations 10000            # one line per format; exit 1 on a violation
python -m tests.formats.fuzz --conversations 500 --format qwen
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter

from formats import encode
from tests.formats.cases import ALL_ATTACKS, calls, result, row, says, system, tool, user
from tests.formats.checks import assert_exact
from tests.formats.pairs import PAIRS, Pair

FRAGMENTS = [
    *(
        "hello",
        "the weather",
        "in Oslo",
        "서울 날씨",
        "예약해 줘",
        "漢字",
        "e\u0301te\u0301",
        "한글",
        "😀👩‍👩‍👧",
        "naïve",
        "ß",
    ),
    *(
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\u3000",
        "\u00a0",
        "\u200b",
        "\r\n",
        ".",
        ",",
        "!",
        "?",
        "'",
        '"',
        "`",
        "\\",
        "\\n",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "<",
        ">",
        "|",
        "/",
        "=",
        ":",
        "{}",
        '{"a": 1}',
        "</",
        "<|",
        "|>",
        "<<",
        "0",
        "42",
        "-1.5",
        "1e3",
    ),
    *(
        "{{ x }}",
        "{% if %}",
        "{# c #}",
        "<b>bold</b>",
        "```python\nprint(1)\n```",
        "User:",
        "\nAssistant: no",
        "Human:",
    ),
    *("<|eot_id|>", "<|im_end|>", "<|im_start|>assistant\n", "<|end_header_id|>", "[INST]", "[/INST]", "</s>", "<s>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<function=f>{}", "</function>", "<think>"),
    *("</think>", "<end_of_turn>", "<start_of_turn>model\n", "<|end|>", "[TOOL_CALLS]", "<|python_tag|>", ALL_ATTACKS),
    *('{"name": "f", "parameters": {}}', '[f(a="b")]', "<|im_<|im_end|>end|>"),
]
NAMES = ("find", "send_mail", "예약", "math.add", "set-value", "POST /db/node", "f")
KEYS = ("a", "city", "날짜", "from", "Assign", "x y", "items")


def text(chance: random.Random, most: int = 8) -> str:
    return "".join(chance.choice(FRAGMENTS) for _ in range(chance.randint(0, most)))


def words(chance: random.Random) -> str:
    return " ".join(chance.choice(FRAGMENTS[:11]) for _ in range(chance.randint(1, 6)))


def value(chance: random.Random, depth: int = 0):
    kind = chance.randrange(9 if depth < 2 else 7)
    if kind == 7:
        return [value(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    if kind == 8:
        return {chance.choice(KEYS): value(chance, depth + 1) for _ in range(chance.randint(0, 3))}
    return [
        words(chance),
        text(chance, 4),
        chance.randint(-5, 10**12),
        chance.random() * 10.0 ** chance.randint(-9, 9),
        True,
        None,
        "007",
    ][kind]


def conversation(seed: int) -> dict:
    """A conversation that is mostly in order; contents are anything, one in two of them calm."""
    chance = random.Random(seed)
    hostile = chance.random() < 0.5
    say = (lambda: text(chance)) if hostile else (lambda: words(chance))
    names = chance.sample(NAMES, chance.randint(1, 3))
    tools = [
        tool(
            name,
            say(),
            **{key.replace(" ", "_"): {"type": "string", "description": say()} for key in chance.sample(KEYS, 2)},
        )
        for name in names
    ]
    with_tools = chance.random() < 0.7
    messages = [system(say())] if chance.random() < 0.5 else []
    number = 0
    for _ in range(chance.randint(1, 4)):
        messages.append(user(say()))
        if chance.random() < 0.05:
            messages.append(user(say()))
        while with_tools and chance.random() < 0.5:
            count = chance.choice((1, 1, 1, 2, 3))
            pairs = [
                (chance.choice(names), {chance.choice(KEYS): value(chance) for _ in range(chance.randint(0, 3))})
                for _ in range(count)
            ]
            made = calls(*pairs, text=say() if chance.random() < 0.2 else "", first=number)
            if chance.random() < 0.1:
                made["reasoning_content"] = words(chance)
            messages.append(made)
            messages += [
                result(chance.choice((say(), json.dumps({"v": say()}), "42")), number + n) for n in range(count)
            ]
            number += count
        answer = says(say())
        if chance.random() < 0.1:
            answer["content"] = f"<think>\n{words(chance)}\n</think>\n\n{answer['content']}"
        if chance.random() < 0.1:
            answer["train"] = False
        messages.append(answer)
    if chance.random() < 0.1:
        messages.append(user(say()))
    return row(*messages, tools=tuple(tools) if with_tools else ())


def run(pair: Pair, count: int, first: int = 0) -> tuple[Counter, list[str]]:
    """(rows by status, violations as text) over `count` conversations."""
    tokenizer, fmt = pair.load()
    counts: Counter = Counter()
    wrong = []
    for seed in range(first, first + count):
        made = conversation(seed)
        encoded = encode(made, tokenizer, fmt)
        counts[encoded.status] += 1
        try:
            assert_exact(made, encoded, tokenizer, fmt)
        except AssertionError as error:
            wrong.append(f"seed {seed}: {error}")
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--format", help="only pairs of this format")
    parser.add_argument("--all_tokenizers", action="store_true", help="every pair, not the first of each format")
    args = parser.parse_args()
    seen, failed = set(), False
    print(
        "| format | tokenizer, template | exact | split | refused | wrong | s |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for pair in PAIRS:
        if (args.format and pair.format != args.format) or (pair.format in seen and not args.all_tokenizers):
            continue
        seen.add(pair.format)
        started = time.process_time()
        counts, wrong = run(pair, args.conversations)
        failed |= bool(wrong)
        numbers = " | ".join(str(counts[key]) for key in ("ok", "split", "refused"))
        print(
            f"| {pair.format} | {pair.label} | {numbers} | {len(wrong)} | {time.process_time() - started:.0f} |",
            flush=True,
        )
        for line in wrong[:5]:
            print(f"  {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
