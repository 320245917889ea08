"""Korean tool-calling rows in the shape of the instructkr data sets; the same seed gives the same bytes.

    python -m data.samples.make_korean --rows 20 --output data/samples

`messages` with calls as text, <function=name>{...}</function>, and `tools` as a list of JSON strings. toolflow has
helpdesk conversations with results, when2call also requests that need no tool or lack a value, apigen parallel calls
and text before a call.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.files import json_lines, write_together
from finetune.flags.types import FlagParser, positive_int

MAX_TRIES = 50
CITIES = ("서울", "부산", "대구", "인천", "광주", "대전", "제주", "강릉")
DAYS = ("오늘", "내일", "모레", "이번 주 토요일")
TOPICS = ("프린터 오류", "비밀번호 만료", "VPN 접속 실패", "모니터 깜박임", "메일 수신 지연", "와이파이 끊김")
DEPARTMENTS = ("영업팀", "개발팀", "인사팀", "재무팀")


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": description, "parameters": schema}


TOOLS = {
    tool["name"]: tool
    for tool in (
        _tool("get_weather", "도시의 날씨를 조회한다", location="도시 이름", date="날짜"),
        _tool("get_order_status", "주문의 배송 상태를 조회한다", order_id="주문 번호"),
        _tool("cancel_order", "주문을 취소한다", order_id="주문 번호"),
        _tool("create_ticket", "헬프데스크 접수를 만든다", title="문제", department="부서"),
        _tool("reset_password", "직원의 비밀번호를 초기화한다", employee_id="사번"),
        _tool("book_room", "회의실을 예약한다", date="날짜", time="시각"),
    )
}


def _call(name: str, **arguments: str) -> str:
    return f"<function={name}>{json.dumps(arguments, ensure_ascii=False)}</function>"


def _turns(*contents: str | tuple[str, str]) -> list[dict[str, str]]:
    """Messages: user and assistant in turns; ("tool", text) is a tool's result."""
    messages: list[dict[str, str]] = []
    for content in contents:
        if isinstance(content, tuple):
            messages.append({"role": content[0], "content": content[1]})
        else:
            role = "user" if not messages or messages[-1]["role"] == "assistant" else "assistant"
            messages.append({"role": role, "content": content})
    return messages


class Requests:
    """Random conversations of each kind."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def _order(self) -> str:
        return f"A{self.rng.randint(1000, 9999)}"

    def ticket(self) -> list[dict[str, str]]:
        title, department = self.rng.choice(TOPICS), self.rng.choice(DEPARTMENTS)
        number = self.rng.randint(100, 999)
        return _turns(
            f"{department}인데 {title} 문제로 접수 부탁드려요.",
            _call("create_ticket", title=title, department=department),
            ("tool", json.dumps({"ticket": number})), f"{title} 문제를 {number}번으로 접수했습니다.",
        )  # fmt: skip

    def password(self) -> list[dict[str, str]]:
        employee = f"E{self.rng.randint(100, 999)}"
        return _turns(
            f"사번 {employee} 비밀번호 좀 초기화해 주세요.", _call("reset_password", employee_id=employee),
            ("tool", '{"ok": true}'), "초기화했습니다. 메일로 온 임시 비밀번호로 로그인해 주세요.",
            "고마워요!", "천만에요. 더 필요한 것이 있으면 말씀해 주세요.",
        )  # fmt: skip

    def weather(self) -> list[dict[str, str]]:
        city, day = self.rng.choice(CITIES), self.rng.choice(DAYS)
        return _turns(f"{day} {city} 날씨 알려줘", _call("get_weather", location=city, date=day))

    def missing(self) -> list[dict[str, str]]:
        what = self.rng.choice(("주문 어디쯤 왔는지", "배송 상태", "주문한 물건 위치", "택배 도착 여부"))
        when = self.rng.choice(("", "지금 ", "빨리 ", "혹시 "))
        return _turns(f"{when}{what} 확인해 주세요.", "주문 번호를 알려 주시겠어요?")

    def small_talk(self) -> list[dict[str, str]]:
        greeting = self.rng.choice(("안녕하세요", "좋은 아침이에요", "수고 많으세요", "반가워요"))
        more = self.rng.choice(("", ", 오늘도 잘 부탁해요", ", 잘 지내셨어요?", ", 처음 왔어요"))
        return _turns(f"{greeting}{more}!", "안녕하세요! 무엇을 도와드릴까요?")

    def parallel(self) -> list[dict[str, str]]:
        first, second = self.rng.sample(CITIES, 2)
        day = self.rng.choice(DAYS)
        calls = _call("get_weather", location=first, date=day) + _call("get_weather", location=second, date=day)
        low, high = self.rng.randint(0, 9), self.rng.randint(10, 25)
        return _turns(
            f"{day} {first}, {second} 두 곳의 날씨를 비교해 줘.", calls, ("tool", json.dumps({"temp": low})),
            ("tool", json.dumps({"temp": high})), f"{first} {low}도, {second} {high}도입니다.",
        )  # fmt: skip

    def text_and_call(self) -> list[dict[str, str]]:
        order = self._order()
        return _turns(
            f"주문 {order} 취소하고 싶어요.", "네, 주문을 취소하겠습니다.\n" + _call("cancel_order", order_id=order),
            ("tool", '{"cancelled": true}'), f"주문 {order} 취소를 마쳤습니다.",
        )  # fmt: skip

    def two_steps(self) -> list[dict[str, str]]:
        order = self._order()
        return _turns(
            f"주문 {order} 아직 출발 전이면 취소해 줘.", _call("get_order_status", order_id=order),
            ("tool", '{"status": "준비 중"}'), _call("cancel_order", order_id=order), ("tool", '{"cancelled": true}'),
            "아직 출발 전이라 취소했습니다.",
        )  # fmt: skip


Kind = Callable[[Requests], list[dict[str, str]]]
SETS: dict[str, tuple[Kind, ...]] = {
    "toolflow": (Requests.ticket, Requests.password, Requests.two_steps),
    "when2call": (Requests.weather, Requests.missing, Requests.small_talk),
    "apigen": (Requests.parallel, Requests.text_and_call, Requests.two_steps),
}


def make_rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different rows of one set. UserError when there are not so many."""
    rng = random.Random(f"{seed}:{name}")
    requests, rows, seen = Requests(rng), [], set()
    for _ in range(MAX_TRIES * count):
        messages = SETS[name][len(rows) % len(SETS[name])](requests)
        if messages[0]["content"] in seen:
            continue
        seen.add(messages[0]["content"])
        tools = rng.sample(sorted(TOOLS), 3)
        used = [tool for tool in TOOLS if any(f"<function={tool}>" in message["content"] for message in messages)]
        if "주문 번호를" in messages[1]["content"]:
            used = ["get_order_status"]
        names = sorted({*used, *tools})
        rows.append({"messages": messages, "tools": [json.dumps(TOOLS[n], ensure_ascii=False) for n in names]})
        if len(rows) == count:
            return rows
    raise UserError(f"{name}: only {len(rows)} of {count} different rows were found; ask for fewer")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Write one file for each set."""
    parser = FlagParser(prog="python -m data.samples.make_korean", description=__doc__)
    parser.add_argument("--rows", type=positive_int, default=20, metavar="N", help="rows of each set")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same bytes")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the three files")
    args = parser.parse_args(argv)
    files = {args.output / f"korean_{name}.jsonl": make_rows(name, args.rows, args.seed) for name in SETS}
    write_together({path: json_lines(rows).encode() for path, rows in files.items()})
    for path, rows in files.items():
        print(f"{path}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
