"""Kill train_lora.py with SIGKILL at random moments, resume it, and compare with a run that was never killed.

    python -m tests.faults --kills 8 --seed 1 [--case 4bit,shared,2,dropout] [--list]

A case is a base type, whether prefixes are shared, a number of processes and a set of flags. Without --case all of them
run. Prints one line per kill and a table; exit status 1 when the adapter or the log of a case differs.

The processes are forked from ones that have imported the libraries (tests/scripts.py), so that kills meet the run and
not its imports. Two processes get the variables that torchrun sets.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.scripts import QUIET, ROOT, ParentProcess, first_parent
from tests.tiny import tiny_llama
from tests.training_runs import command, config_of, conversation, log_rows, write_rows

# Columns that depend on the machine.
TIMING_COLUMNS = {"tokens_per_second", "computed_tokens_per_second", "seconds", "peak_memory_gb"}
FLAGS = ("--format", "chatml", "--batch_size", 2, "--grad_accum", 2, "--save_steps", 2, "--logging_steps", 3,
         "--eval_fraction", 0.17, "--lr", "5e-3", "--name", "run", "--resume", "auto")  # fmt: skip
BASES = {
    "float32": ("--dtype", "float32"), "bfloat16": ("--dtype", "bfloat16"), "4bit": ("--load_in_4bit",),
    "dequantized": ("--load_in_4bit", "--dequantize_once"),
}  # fmt: skip
SHARING = {"shared": (), "alone": ("--no-share_prefix",)}
# "early_stop" has no dropout: when one of two processes is killed, its random state is lost with it.
FEATURES = {
    "dropout": ("--epochs", 5, "--dropout", 0.1, "--eval_steps", 5),
    "early_stop": ("--epochs", 10, "--eval_steps", 2, "--early_stopping_patience", 3, "--load_best", "--lr", "2",
                   "--scheduler", "constant"),
}  # fmt: skip
# Every base type with and without sharing and with one and two processes; the flags alternate.
CASES = [
    (base, sharing, str(processes), list(FEATURES)[(i + j + processes) % 2])
    for (i, base), (j, sharing), processes in itertools.product(enumerate(BASES), enumerate(SHARING), (1, 2))
]
KILLED = -signal.SIGKILL if hasattr(signal, "SIGKILL") else -9
WAIT_SECONDS = 300
PATIENCE_SECONDS = 30
_parents: list[ParentProcess] = []  # the process with rank 0 is forked from the first one, and so on


def write_byte_model(folder: Path, **changes: Any) -> Path:
    """A random Llama of two small layers with a token for each byte: a run of it takes seconds, its files are small."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 8192} | changes
    tiny_llama(tokenizer, **sizes).save_pretrained(folder)
    return folder


def flags_of(case: tuple[str, ...]) -> tuple[Any, ...]:
    base, sharing, _, features = case
    return (*FLAGS, *BASES[base], *SHARING[sharing], *FEATURES[features])


@dataclass
class Processes:
    """The processes of one run at a time, a new fork for each start."""

    number: int
    output: Path
    first: int = 0  # of _parents: another group at the same time needs others
    ids: list[int] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    starts: int = 0

    def start(self, *arguments: Any) -> None:
        while len(_parents) < self.first + self.number:
            _parents.append(ParentProcess() if _parents else first_parent())
        self.parents = _parents[self.first : self.first + self.number]
        self.starts += 1
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.ids, self.codes = [], [None] * self.number
        for rank, parent in enumerate(self.parents):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.number, "MASTER_PORT": port}
            launcher = {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
            environment = {**os.environ, **QUIET, **(launcher if self.number > 1 else {})}
            files = {name: self.output / f"{self.starts}_{rank}_{name}" for name in ("stdin", "stdout", "stderr")}
            files["stdin"].touch()
            self.ids.append(parent.start(command(*arguments)[1:], files, ROOT, environment))

    def poll(self, timeout: float = 0) -> bool:
        """Whether all have ended, after at most `timeout` seconds for each."""
        for rank, code in enumerate(self.codes):
            if code is None:
                self.codes[rank] = self.parents[rank].wait(timeout)
        return None not in self.codes

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if self.codes[rank] is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.ids[rank], signal.SIGKILL)

    def text(self) -> str:
        """What the processes of the last start have said."""
        paths = sorted(self.output.glob(f"{self.starts}_*_std*"))
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)[-4000:]


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """What must not depend on kills: the adapter's bytes, and the log without timings."""
    rows = [{name: cell for name, cell in row.items() if name not in TIMING_COLUMNS} for row in log_rows(folder)]
    return (folder / "final_model" / "adapter_model.safetensors").read_bytes(), rows


def moment(run: Path) -> str:
    """What the run was doing when it was killed, as its folder shows it."""
    if not run.exists():
        return "before the run folder"
    if (run / ".saving").exists():
        return "writing a checkpoint"
    if list(run.glob(".final_model*")):
        return "writing the adapter"
    if list(run.glob(".*.part")):
        return "writing the config or log"
    return "training" if (run / "training_log.csv").exists() else "loading the model"


def waits(generator: random.Random, run: Path, duration: float) -> Iterator[tuple[Any, float]]:
    """(condition to wait for, seconds after it) of each kill: any moment, after a row, and while saving."""
    log = run / "training_log.csv"

    def saves() -> bool:
        return (run / ".saving").exists()

    while True:
        yield (lambda: True), generator.uniform(0, duration)
        size = log.stat().st_size if log.exists() else 0
        yield (lambda size=size: log.exists() and log.stat().st_size > size), generator.uniform(0, duration / 4)
        yield saves, generator.uniform(0, 0.03)


def compare_killed_run(
    arguments: tuple[Any, ...], workspace: Path, kills: int, seed: int, processes: int = 1, kill_one: bool = False
) -> list[tuple[str, str]]:
    """Run once undisturbed and once with `kills` SIGKILLs. AssertionError if adapter or log differ.

    kill_one  every second kill of a run of several processes is of one of them; the others end themselves.

    A run that ends before it is killed is not counted; the next start trains again. Returns (moment, description) of
    each kill.
    """
    generator = random.Random(seed)
    undisturbed, killed = workspace / "undisturbed", workspace / "killed"
    (workspace / "output").mkdir()
    group = Processes(processes, workspace / "output")
    try:
        group.start(*arguments, "--experiments_dir", undisturbed)
        began = time.monotonic()
        assert group.poll(WAIT_SECONDS) and not any(group.codes), group.text()
        moments = waits(generator, killed / "run", time.monotonic() - began)
        found = []
        while len(found) < kills:
            group.start(*arguments, "--experiments_dir", killed)
            began = time.monotonic()
            is_due, delay = next(moments)
            while not (ended := group.poll()) and not is_due():
                time.sleep(0.001)
                assert time.monotonic() - began < WAIT_SECONDS, group.text()
            due = time.monotonic() + delay
            while not ended and time.monotonic() < due:
                time.sleep(min(0.01, max(0.0, due - time.monotonic())))
                ended = group.poll()
            one = kill_one and not ended and len(found) % 2
            group.kill([generator.randrange(processes)] if one else list(range(processes)))
            if one and not group.poll(PATIENCE_SECONDS):  # waits for the others to connect: torchrun ends it
                group.kill(list(range(processes)))
            assert group.poll(WAIT_SECONDS), group.text()
            assert one or set(group.codes) <= {0, KILLED}, group.text()
            if ended:
                (killed / "run").rename(killed / f"finished_{group.starts}")
                continue
            name = moment(killed / "run") + (", one process" if one else "")
            found.append((name, f"after {time.monotonic() - began:.1f} s, {newest_checkpoint(killed / 'run')}"))
        group.start(*arguments, "--experiments_dir", killed)
        assert group.poll(WAIT_SECONDS) and not any(group.codes), group.text()
    finally:
        group.kill(list(range(len(group.codes))))
    expected, actual = outcome(undisturbed / "run"), outcome(killed / "run")
    assert actual[1] == expected[1], f"the rows of training_log.csv differ: {actual[1]}, not {expected[1]}"
    assert actual[0] == expected[0], "the adapter's bytes differ"
    assert config_of(killed / "run")["status"] == "finished"
    assert not list((killed / "run").glob(".*")), "temporary files are left"
    return found


def newest_checkpoint(folder: Path) -> str:
    steps = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
    return f"checkpoint-{max(steps)}" if steps else "no checkpoint"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=[",".join(case) for case in CASES], metavar="CASE")
    parser.add_argument("--list", action="store_true", help="print the cases")
    options = parser.parse_args()
    cases = [tuple(case.split(",")) for case in options.case] if options.case else CASES
    if options.list:
        print(*(",".join(case) for case in cases), sep="\n")
        return 0
    total: collections.Counter[str] = collections.Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", [conversation(number) for number in range(12)])
        model = write_byte_model(Path(folder) / "model")
        for case in cases:
            workspace = Path(folder) / "_".join(case)
            workspace.mkdir()
            arguments = ("--model", model, "--dataset", rows, *flags_of(case))
            kill_one = case[2] == "2" and case[3] == "early_stop"
            try:
                found = compare_killed_run(arguments, workspace, options.kills, options.seed, int(case[2]), kill_one)
            except AssertionError as error:
                failed += 1
                print(f"{','.join(case)}: FAILED: {error}", flush=True)
                continue
            total.update(name for name, _ in found)
            print(f"{','.join(case)}: {len(found)} kills, equal", flush=True)
            print(*(f"    {name} ({where})" for name, where in found), sep="\n", flush=True)
    print(f"{sum(total.values())} kills in {len(cases) - failed} cases, {failed} cases failed")
    print(*(f"    {count} {name}" for name, count in total.most_common()), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
