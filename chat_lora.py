"""Talk to a tuned model: in the terminal, on a page in the browser, or from an OpenAI client."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.flag_types import not_negative, port, positive

EXAMPLES = """examples:
  python chat_lora.py experiments/RUN --tools my_tools.json
  python chat_lora.py experiments/RUN --tools my_tools.json --tool-command "python my_tool.py"
  python chat_lora.py experiments/RUN --tools my_tools.json --prompt "Dim the hall to 3" --compare
  python chat_lora.py experiments/RUN --questions questions.txt --output answers.jsonl
  python chat_lora.py experiments/RUN --web                    base and tuned side by side, on 127.0.0.1
  python chat_lora.py experiments/RUN --serve                  an OpenAI client at http://127.0.0.1:8000/v1
  python chat_lora.py Qwen/Qwen2.5-1.5B-Instruct               a model without an adapter
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="experiment folder, adapter folder, model (folder or Hub id); --serve: a GGUF")
    who = parser.add_argument_group("who answers")
    who.add_argument("--mode", choices=("lora", "merged"), default="lora",
                     help="adapter beside the base, or folded into its weights (default: lora)")  # fmt: skip
    who.add_argument("--base", action="store_true", help="the base model alone")
    who.add_argument("--compare", action="store_true", help="the base model's answer too (--prompt, --questions)")
    who.add_argument("--format", help="chat format; default: the one the run was trained with")

    talk = parser.add_argument_group("the conversation")
    talk.add_argument("--tools", type=Path, metavar="FILE", help="JSON file with the tools, in any usual spelling")
    talk.add_argument("--system", default="", metavar="TEXT", help="system message")
    talk.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    talk.add_argument(
        "--questions", type=Path, metavar="FILE", help="answer every line of a text or .jsonl file and end"
    )
    talk.add_argument(
        "--output", type=Path, metavar="FILE", help="answers go here instead of stdout (.jsonl: with calls)"
    )
    talk.add_argument("--tool-command", metavar="PROGRAM",
                      help="run this for every call: name and arguments as JSON on stdin, result from stdout; no shell "
                      "(default: you type the results)")  # fmt: skip
    talk.add_argument(
        "--tool-timeout", type=positive(float), default=60.0, metavar="SECONDS", help="for one call (default: 60)"
    )
    talk.add_argument("--max-rounds", type=positive(int), default=5, metavar="N",
                      help="rounds of calls carried out for one message (default: 5)")  # fmt: skip

    drawn = parser.add_argument_group("how answers are drawn")
    drawn.add_argument(
        "--max_new_tokens", type=positive(int), default=512, metavar="N", help="longest answer (default: 512)"
    )
    drawn.add_argument("--temperature", type=not_negative(float), default=0.0, help="0 is greedy (default: 0)")
    drawn.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    drawn.add_argument(
        "--batch_size", type=positive(int), default=16, help="questions answered side by side (default: 16)"
    )

    pages = parser.add_argument_group("pages and servers")
    pages.add_argument("--web", action="store_true", help="a page in the browser (needs gradio); SANDWICH_WEB_PASSWORD "
                       "in the environment asks visitors for it")  # fmt: skip
    pages.add_argument(
        "--serve", action="store_true", help="an OpenAI-compatible /v1/chat/completions, for trying a client"
    )
    pages.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    pages.add_argument("--port", type=port, help="default: 7860 for --web, 8000 for --serve")
    pages.add_argument(
        "--share", action="store_true", help="--web: also through Gradio's public tunnel; needs the password"
    )
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    # 1. What can be wrong without a model is found before one is loaded.
    check(args)
    from finetune.chat.questions import read_questions
    from finetune.chat.session import read_tools
    from finetune.chat.tool_command import parse_tool_command

    command = parse_tool_command(args.tool_command, args.tool_timeout)
    tools = read_tools(args.tools) if args.tools else []
    questions = [args.prompt] if args.prompt is not None else []
    if args.questions:
        questions = read_questions(args.questions, tools)
    from finetune.logs import start_logging

    start_logging(_console(stderr=True))
    if args.model.endswith(".gguf"):
        from finetune.chat.serve_gguf import serve_gguf

        return serve_gguf(Path(args.model), args.host, args.port or 8000)

    # 2. Who answers: one model, with its adapter on (tuned) or off (base).
    from finetune.chat.model import BASE, TUNED, load_chat_model

    model = load_chat_model(args.model, base=args.base, merged=args.mode == "merged", format_name=args.format)
    if args.compare and BASE not in model.sides:
        raise UserError(f"{args.model} has no adapter that could be switched off; leave --compare away")
    from finetune.chat.session import ChatAgent, ChatSession
    from finetune.generation.generate import Decoding

    decoding = Decoding(model.stop_ids, args.max_new_tokens, args.batch_size, args.temperature, args.seed)
    agent = ChatAgent(model, decoding, command, args.max_rounds)

    # 3. To whom.
    if args.serve:
        from finetune.chat.serve import serve

        serve(model, decoding, args.host, args.port or 8000)
    elif args.web:
        from finetune.chat.web import launch

        launch(agent, args.system, tools, args.host, args.port or 7860, args.share)
    elif questions:
        from finetune.chat.questions import answer_all

        sides = [BASE, TUNED] if args.compare else [TUNED]
        answer_all(agent, questions, args.system, tools, sides, args.output)
    else:
        from finetune.chat.terminal import Terminal

        Terminal(agent, ChatSession(args.system, tools), _console()).run()
    return 0


def check(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""
    ways = [f"--{name}" for name in ("prompt", "questions", "web", "serve") if getattr(args, name) not in (None, False)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} cannot go together; choose one")
    if args.output is not None and not (args.prompt is not None or args.questions):
        raise UserError("--output is for --prompt and --questions; in a conversation use /save")
    if args.output is not None and args.output.exists():
        raise UserError(f"{args.output} exists already; name another file with --output")
    if args.compare and (args.base or args.mode == "merged"):
        raise UserError("--compare needs base and adapter apart: leave --base and --mode merged away")
    if args.compare and not (args.prompt is not None or args.questions):
        raise UserError("--compare is for --prompt and --questions; at the keyboard type /base, --web shows both")
    if args.model.endswith(".gguf") and not args.serve:
        raise UserError("a GGUF file is only served here: give --serve, or chat with the run it was made from")
    if args.serve and args.tool_command:
        raise UserError("with --serve the client carries out the calls; leave --tool-command away")
    for flag, text in (("--prompt", args.prompt), ("--system", args.system)):
        if any("\ud800" <= character <= "\udfff" for character in text or ""):  # how Python passes on such bytes
            raise UserError(f"{flag} is not UTF-8 text; give it in a file: --questions FILE")
    if args.share and not args.web:
        raise UserError("--share is for --web")
    if args.web and (args.share or not _this_machine(args.host)) and not os.environ.get("SANDWICH_WEB_PASSWORD"):
        raise UserError(
            "a page that other machines can open needs a password: set SANDWICH_WEB_PASSWORD in the environment"
        )


def _this_machine(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


if __name__ == "__main__":
    sys.exit(main())
