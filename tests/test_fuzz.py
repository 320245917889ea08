"""The short form of `make fuzz`, and the fuzzer itself: it finds a planted fault, shrinks it and repeats a case."""

from __future__ import annotations

import random
import time

import pytest

from tests import fuzz
from tests.fuzz_inputs import PLANTED, edited, mutated, planted, shrunk
from tests.fuzz_readers import KINDS, Kind

CASES = {
    "rows": 2000,
    "files": 40,
    "texts": 200,
    "schemas": 80,
    "configs": 12,
    "logs": 15,
    "results": 40,
    "formats": 60,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_mutated_inputs(kind, tmp_path):
    """No traceback, no hang, kept + rejected = read, no control token of a content, no text lost without a word."""
    counts, failures = fuzz.run(kind, 0, range(CASES[kind.name]), tmp_path)
    assert not failures, "\n".join(failure.report(0) for failure in failures)
    assert counts["cases"] == CASES[kind.name]


def planted_fault(make, check):
    return Kind("planted", "a fault", 1, make, check)


def test_fault_is_found_once_and_shrunk(tmp_path):
    def check(case, folder):
        if "b" in str(case):
            raise KeyError("b")

    kind = planted_fault(lambda chance: {"x": ["a" * 50, ["b" * 9]], "y": chance.random()}, check)
    counts, (failure,) = fuzz.run(kind, 0, range(5), tmp_path)
    assert (counts["failed"], failure.times, failure.case) == (5, 5, 0)
    assert failure.smallest == {"x": "b"} or failure.smallest == {"x": ["b"]}
    assert "--kind planted --seed 7 --first 0 --cases 1" in failure.report(7) and "KeyError" in failure.report(7)


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGPROF"), reason="no timer of CPU time on Windows")
def test_hang_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.1)

    def check(case, folder):
        began = time.process_time()
        while case and time.process_time() - began < 20:
            pass

    failure = fuzz.failure_of(planted_fault(lambda chance: 1, check), [1], tmp_path)
    assert isinstance(failure, fuzz.Hang)
    assert fuzz.failure_of(planted_fault(lambda chance: 1, check), [], tmp_path) is None


def test_exit_of_a_reader_is_a_failure(tmp_path):
    def check(case, folder):
        raise SystemExit(0)

    assert isinstance(fuzz.failure_of(planted_fault(lambda chance: 1, check), 1, tmp_path), SystemExit)


def test_case_is_the_same_again():
    for kind in KINDS:
        first, again = (kind.make(random.Random("seed")) for _ in range(2))
        assert first == again
    value = {"messages": [{"role": "user", "content": "Dim"}]}
    before = str(value)
    others = {str(mutated(value, random.Random(n), [value])) for n in range(50)}
    assert len(others) > 20 and str(value) == before
    assert len({edited(b"step,loss\n1,2\n", random.Random(n)) for n in range(50)}) > 20


def test_texts_are_numbered():
    row = planted({"question": "Hi", "answer": 'He said "Hello", Done'})
    assert PLANTED.findall(str(row)) == ["zq0z", "zq1z", "zq2z"]


def test_shrinking_bytes():
    assert shrunk(b"a" * 300 + b"!" + b"c" * 200, lambda data: b"!" in data) == b"!"
