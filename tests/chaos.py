"""Run the independent tester ckpt-chaos (PyPI, 0.1.8) on train_lora.py; its exit status is this script's.

    pip install ckpt-chaos==0.1.8
    python -m tests.chaos [--max_points 40] [--ckpt_chaos PATH/TO/ckpt-chaos]

It kills the run at file events of its folder (before the file appears, with the file cut in half, and losing what was
not synced), resumes it, and compares the adapter and the step from which it resumed with a run that was never killed.

Its training command is this module, which asks the process that runs the tester for a fork of one that has imported
the libraries: every start of a new interpreter would take 10 s. A fork runs sitecustomize as an interpreter does, with
which the tester installs its faults.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOCKET = "SANDWICH_TESTS_SOCKET"
KILLED = 137  # the tester's exit status
# tempfile opens a folder for writing, to make a file without a name in it. The tester's mode "unsynced" would read the
# folder and end the run with an error before it could be killed, and "torn" would cut the folder instead of killing.
FIX = """import os
from ckpt_chaos import inject
note, event = inject._note_open_for_write, inject._event
inject._note_open_for_write = lambda path: None if os.path.isdir(path) else note(path)
inject._event = lambda kind, path, tornable: event(kind, path, tornable and not os.path.isdir(path))
"""
FLAGS = ("--format", "chatml", "--dtype", "float32", "--batch_size", "2", "--grad_accum", "2", "--max_steps", "4",
         "--save_steps", "2", "--dropout", "0.1", "--eval_fraction", "0.17", "--lr", "5e-3", "--name", "run",
         "--resume", "auto", "--experiments_dir", "{out}")  # fmt: skip


def forward() -> int:
    """The training command: have it run by the tester's parent, then print its output and end with its status."""
    request = {"arguments": sys.argv[2:], "env": {k: v for k, v in os.environ.items() if k != "CKPT_CHAOS_ARMED"}}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as file:
            answer = json.loads(file.readline())
    print(answer["output"])
    return answer["code"]


def make_server(path: Path) -> socketserver.UnixStreamServer:
    """A server of `forward`'s requests, one at a time."""
    from tests.scripts import first_parent

    parent = first_parent()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = json.loads(self.rfile.readline())
            command, env = [str(ROOT / "train_lora.py"), *request["arguments"]], request["env"]
            env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(path.parent)])
            result = parent.run(command, "", ROOT, env, 600)
            answer = {"code": result.returncode, "output": result.stdout + result.stderr}
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return socketserver.UnixStreamServer(str(path), Handler)


def main() -> int:
    import argparse

    from tests.faults import write_byte_model
    from tests.scripts import QUIET
    from tests.training_runs import conversation, write_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_points", type=int, default=40, help="kills, spread evenly over the file events")
    parser.add_argument("--modes", default="before,torn,unsynced")
    parser.add_argument("--ckpt_chaos", default="ckpt-chaos", metavar="PROGRAM")
    options = parser.parse_args()
    if not (program := shutil.which(options.ckpt_chaos)):
        print(f"{options.ckpt_chaos} is not installed; run: pip install ckpt-chaos==0.1.8", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(12)])
        model = write_byte_model(folder / "model")
        os.environ.update(QUIET, **{SOCKET: str(folder / "socket")})
        (folder / "sitecustomize.py").write_text(FIX)
        server = make_server(folder / "socket")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # -S: the forwarding process itself must not run sitecustomize.
        train = [sys.executable, "-S", __file__, "forward", "--model", str(model), "--dataset", str(rows), *FLAGS]
        code = subprocess.run(
            [program, "run", "--work", folder / "work", "--modes", options.modes, "--max-points",
             str(options.max_points), "--checkpoint-glob", "{out}/run/checkpoint-*", "--ckpt-ignore-size",
             "--step-regex", r"resumed from step (\d+)", "--result-file",
             "{out}/run/final_model/adapter_model.safetensors", "--fail-on",
             "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL", "--", *train],
            cwd=ROOT, check=False,
        ).returncode  # fmt: skip
        results = [json.loads(path.read_text()) for path in (folder / "work").glob("pt_*/result.json")]
        alive = [one["label"] for one in results if one["rc"] != KILLED and "control" not in one["label"]]
        print(f"{len(results) - 1 - len(alive)} kills")
        print(*(f"not killed: {label}" for label in alive), sep="\n")
        return code or bool(alive)


if __name__ == "__main__":
    sys.exit(forward() if sys.argv[1:2] == ["forward"] else main())
