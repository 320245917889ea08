"""The progress line of `make install`: how many packages are expected, and pip's messages after a failure."""

import runpy
import subprocess
import sys

from tests.scripts import ROOT

SCRIPT = ROOT / "requirements" / "pip_progress.py"
FUNCTIONS = runpy.run_path(str(SCRIPT))
expected_packages, time_left = FUNCTIONS["expected_packages"], FUNCTIONS["time_left"]


def test_expected_packages_are_those_of_all_requirement_files(tmp_path):
    (tmp_path / "constraints.txt").write_text("# pinned\nnumpy==2.0\nsix==1.17.0\n")
    (tmp_path / "more.txt").write_text("rich==15.0\n")
    (tmp_path / "all.txt").write_text("-c constraints.txt\n-r more.txt  # others\nnumpy==2.0  # arrays\n")
    assert expected_packages(["install", "-r", str(tmp_path / "all.txt")]) == 3
    assert expected_packages(["install", "torch==2.13.0"]) == 0
    assert expected_packages(["install", "-r", str(ROOT / "requirements_lora.txt")]) > 100


def test_time_left():
    assert time_left(10, 5, 20) == ", 30 s left"
    assert time_left(10, 0, 20) == time_left(10, 3, 0) == ""


def test_failure_of_pip_is_shown(tmp_path):
    command = [sys.executable, str(SCRIPT)]
    arguments = ["install", "--no-index", "--disable-pip-version-check", "no-such-package==1.0"]
    for option, shown in (([], True), (["--try"], False)):
        done = subprocess.run([*command, *option, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("no-such-package" in done.stderr) is shown
