"""Answers parsed by vLLM's own code, for tests/servers/parsers.py. Runs with the Python of vLLM's environment."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder / "plugin"))
    import sandwich_tool_parser as plugin

    for path in sorted(folder.glob("*/given.json")):
        given = json.loads(path.read_text(encoding="utf-8"))
        plugin.FORMAT = given["format"]
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
        calls, streamed, texts, differences = 0, 0, 0, []
        for answer in given["answers"]:
            for stream, parse in enumerate((complete, streaming)):
                try:
                    found, text = parse(given, tokenizer, answer)
                except Exception as error:  # a parser's bug is a difference
                    found, text = repr(error), ""
                same = json.dumps(found, sort_keys=True) == json.dumps(answer["calls"], sort_keys=True)
                calls, streamed = calls + (same and not stream), streamed + (same and stream)
                texts += text.strip() == answer["text"].strip()
                if not same:
                    differences.append(f"  CALLS {answer['case']}{', streamed' * stream}: {found}")
        of = len(given["answers"])
        cells = (given["label"], given["format"], given["parser"], of, calls, streamed, f"{texts} of {2 * of}")
        print("| " + " | ".join(map(str, cells)) + " |", *differences, sep="\n", flush=True)


def started(given, tokenizer, answer):
    """(parser, request) as the server makes them."""
    choice = {"tools": answer["tools"], "tool_choice": "auto"} if answer["tools"] else {}
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], **choice)
    parser = ParserManager.get_parser(given["parser"], None, True, "m", tokenizer=tokenizer)(tokenizer, request.tools)
    return parser, parser.adjust_request(request)


def decoded(given, tokenizer, request, ids):
    """The text of generated ids without the token that stops them."""
    ids = ids[:-1] if ids and ids[-1] in given["ends"] else ids
    return tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens, clean_up_tokenization_spaces=False)


def complete(given, tokenizer, answer):
    parser, request = started(given, tokenizer, answer)
    text = decoded(given, tokenizer, request, answer["ids"])
    _, content, calls = parser.parse(text, request, True, model_output_token_ids=answer["ids"])
    return [call_of(call.name, call.arguments) for call in calls or []], content or ""


def streaming(given, tokenizer, answer):
    parser, request = started(given, tokenizer, answer)
    ids, sent, text, calls = answer["ids"], "", "", {}
    for number, token in enumerate(ids, 1):
        now = decoded(given, tokenizer, request, ids[:number])
        now = sent if now.endswith("\ufffd") else now  # a part of a character
        options = {"prompt_token_ids": [] if number == 1 else None, "finished": number == len(ids)}
        delta = parser.parse_delta(now[len(sent) :], [token], request, **options)
        sent = now
        if delta is None:
            continue
        text += delta.content or ""
        for call in delta.tool_calls or []:
            name, arguments = calls.get(call.index, ("", ""))
            function = call.function
            if function is not None:
                name, arguments = name + (function.name or ""), arguments + (function.arguments or "")
            calls[call.index] = name, arguments
    return [call_of(*calls[index]) for index in sorted(calls)], text


def call_of(name, arguments):
    try:
        return {"name": name, "arguments": json.loads(arguments or "{}")}
    except json.JSONDecodeError:
        return {"name": name, "arguments": arguments}


if __name__ == "__main__":
    main()
