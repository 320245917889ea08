"""Chat with a tuned model: in the terminal, in the browser, or through an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from finetune.chat.address import is_loopback
from finetune.errors import UserError, one_line_errors, require
from finetune.flags.types import FlagParser, nonnegative_float, port, positive_float, positive_int, probability
from formats import check_format_name

EXAMPLES = """examples:
  python chat_lora.py experiments/RUN --tools my_tools.json
  python chat_lora.py experiments/RUN --tools my_tools.json --tool_command "python my_tool.py"
  python chat_lora.py experiments/RUN --tools my_tools.json --prompt "Dim the hall to 3" --compare
  python chat_lora.py experiments/RUN --questions questions.txt --output answers.jsonl
  python chat_lora.py --config configs/fitness_qa.json         model, sampling and questions of its section inference
  python chat_lora.py experiments/RUN --web                    base and tuned side by side, on 127.0.0.1
  python chat_lora.py experiments/RUN --serve                  for OpenAI clients, on http://127.0.0.1:8000/v1
  python chat_lora.py Qwen/Qwen2.5-1.5B-Instruct               a model without an adapter
"""


def build_parser() -> FlagParser:
    """The parser of chat_lora.py."""
    parser = FlagParser(description=__doc__, epilog=EXAMPLES)
    # fmt: off
    parser.add_argument("model", nargs="?", help="experiment folder, adapter folder, or model (folder or Hub id); with "
        "--serve also a GGUF file")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON or YAML whose section inference has the "
        "model, the sampling and the questions; flags on the command line win")
    add = parser.add_argument_group("model").add_argument
    add("--mode", choices=("lora", "merged"), default="lora", help="separate adapter, or merged into the base weights")
    add("--base", action="store_true", help="use the base model without the adapter")
    add("--compare", action="store_true", help="also print the base model's answer (with --prompt or --questions)")
    add("--format", help="chat format (default: the format of the run)")
    add("--trust_remote_code", action="store_true",
        help="run code from the base model's repository; only for models that you trust")

    add = parser.add_argument_group("conversation").add_argument
    add("--tools", type=Path, metavar="FILE", help="JSON file with tool schemas")
    add("--system", default="", metavar="TEXT", help="system message")
    add("--prompt", metavar="TEXT", help="answer this message and exit")
    add("--questions", type=Path, metavar="FILE", help="answer every line of a text or .jsonl file, or "
        "the list in a .json file, and exit")
    add("--output", type=Path, metavar="FILE", help="write answers here instead of to stdout (.jsonl: with calls)")
    add("--tool_command", metavar="PROGRAM", help="program to run for every call, without a shell: name and arguments "
        "as JSON on stdin, result on stdout (default: you type the results)")
    add("--tool_timeout", type=positive_float, default=60.0, metavar="SECONDS", help="time limit of one call")
    add("--max_rounds", type=positive_int, default=5, metavar="N", help="maximum rounds of calls for one message")

    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=positive_int, default=512, metavar="N", help="maximum length of an answer")
    add("--temperature", type=nonnegative_float, default=0.0, help="sampling temperature; 0 is greedy")
    add("--top_p", type=probability, default=1.0, help="sample from the most likely tokens that together have this "
        "probability")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--batch_size", type=positive_int, default=16, help="questions to answer in one batch")

    add = parser.add_argument_group("web page and server").add_argument
    add("--web", action="store_true", help="open a page in the browser (needs gradio); visitors are asked for the "
        "password in SANDWICH_WEB_PASSWORD if it is set")
    add("--serve", action="store_true", help="serve an OpenAI-compatible /v1/chat/completions, for development; "
        "SANDWICH_API_TOKEN sets the key that clients need; for an address that others can reach one is generated")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=port, help="port to listen on (default: 7860 for --web, 8000 for --serve)")
    add("--share", action="store_true", help="with --web: also through Gradio's public tunnel; needs the password")
    # fmt: on
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args, questions = parse(argv)
    check(args, answers_and_exits=bool(questions) or args.prompt is not None or args.questions is not None)
    from rich.console import Console

    from finetune.chat.questions import read_questions
    from finetune.chat.tool_command import parse_tool_command
    from finetune.logs import start_logging
    from finetune.reading.tool_schemas import load_tools_file

    # 1. Read the input files, and look for the model, before anything slow is imported.
    if args.format:
        check_format_name(args.format)
    command = parse_tool_command(args.tool_command, args.tool_timeout)
    tools = load_tools_file(args.tools) if args.tools else []
    if args.prompt is not None:
        questions = [args.prompt]
    elif args.questions:
        questions = read_questions(args.questions, tools)
    start_logging()
    if args.web:
        require("--web", "gradio")
    if args.serve:
        require("--serve", "fastapi", "uvicorn", *["xllamacpp"] * args.model.endswith(".gguf"))
    if args.model.endswith(".gguf"):
        from finetune.chat.serve_gguf import serve_gguf

        return serve_gguf(Path(args.model), args.host, args.port or 8000)

    # 2. Load one model, whose adapter can be switched on (tuned) and off (base).
    from finetune.chat.model import BASE, TUNED, load_chat_model

    model = load_chat_model(
        args.model, base=args.base, merged=args.mode == "merged", format_name=args.format,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if args.compare and BASE not in model.sides:
        raise UserError(f"{args.model} has no adapter that could be switched off; omit --compare")
    from finetune.chat.session import ChatAgent, ChatSession
    from finetune.generation.generate import Decoding

    decoding = Decoding(model.stop_ids, args.max_new_tokens, args.batch_size, args.temperature, args.seed, args.top_p)
    agent = ChatAgent(model, decoding, command, args.max_rounds)

    # 3. Answer.
    if args.serve:
        from finetune.chat.serve import serve

        serve(model, decoding, args.host, args.port or 8000)
    elif args.web:
        from finetune.chat.examples import examples_of
        from finetune.chat.web import launch

        launch(agent, args.system, tools, args.host, args.port or 7860, args.share, examples_of(args.model))
    elif questions:
        from finetune.chat.questions import answer_all

        sides = [BASE, TUNED] if args.compare else [TUNED]
        is_list = args.prompt is None and (args.questions is None or args.questions.suffix == ".json")
        answer_all(agent, questions, args.system, tools, sides, args.output, with_questions=is_list)
    else:
        from finetune.chat.terminal import Terminal

        Terminal(agent, ChatSession(args.system, tools), Console()).run()
    return 0


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list]:
    """(the command line with the values of --config as defaults, the config's questions where no mode is chosen)."""
    parser = build_parser()
    args, questions = parser.parse_args(argv), []
    if args.config:
        from finetune.chat.config import read_chat_config

        values = read_chat_config(args.config, parser)
        questions = values.pop("questions", [])
        parser.set_defaults(**values)
        args = parser.parse_args(argv)
    if args.model is None:
        missing = "its section inference has no adapter_path; add it, or name" if args.config else "name"
        raise UserError(f"no model: {missing} an experiment folder or a model, as in chat_lora.py experiments/RUN")
    chosen = args.prompt is not None or args.questions or args.web or args.serve
    return args, [] if chosen else questions


def check(args: argparse.Namespace, *, answers_and_exits: bool) -> None:
    """UserError for flags that contradict each other."""
    names = ("prompt", "questions", "web", "serve")
    modes = [f"--{name}" for name in names if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} exclude each other; keep one of them")
    if args.output is not None and not answers_and_exits:
        raise UserError("--output is for --prompt and --questions; in a conversation use /save")
    if args.output is not None and args.output.exists():
        raise UserError(f"{args.output} exists already; name another file with --output")
    if args.compare and (args.base or args.mode == "merged"):
        raise UserError("--compare needs base and adapter apart; omit --base and --mode merged")
    if args.compare and not answers_and_exits:
        raise UserError("--compare is for --prompt and --questions; in the terminal type /base, --web shows both")
    if args.model.endswith(".gguf") and not args.serve:
        raise UserError("a GGUF file can only be served; add --serve, or chat with the run that it was exported from")
    if args.serve and args.tool_command:
        raise UserError("with --serve the client runs the calls; omit --tool_command")
    for flag, text in (("--prompt", args.prompt), ("--system", args.system)):
        # Python represents bytes that are not UTF-8 by surrogates.
        if any("\ud800" <= character <= "\udfff" for character in text or ""):
            raise UserError(f"{flag} is not UTF-8 text; save it as UTF-8 and use --questions FILE")
    if args.top_p < 1 and not args.temperature and not (args.serve or args.web):
        raise UserError("--top_p is for sampling; add --temperature, or omit it for greedy answers")
    if args.share and not args.web:
        raise UserError("--share is for --web")
    if args.web and (args.share or not is_loopback(args.host)) and not os.environ.get("SANDWICH_WEB_PASSWORD"):
        raise UserError("a page that other machines can open needs a password; set SANDWICH_WEB_PASSWORD")


if __name__ == "__main__":
    sys.exit(main())
