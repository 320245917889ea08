"""Where an export goes: filled aside, then renamed, so that nobody ever serves half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError, no_room
from finetune.runs.experiment import CONFIG, FINAL

# A file that every export of a kind has, so that --overwrite takes nobody's photographs for one.
MARKS = {
    "merged": "generation_config.json", "gguf": "*.gguf", "ollama": "Modelfile", "vllm": "serve.sh",
    "hub": "adapter_config.json",
}  # fmt: skip


def output_folder(source: str | Path, kind: str, output: Path | None, overwrite: bool) -> Path:
    """`output`, else `<run>/exports/<kind>` (of a checkpoint `<run>/exports/<kind>-<checkpoint>`).

    A model that is no folder exports into `exports/<name>/<kind>`. Raises UserError when something lies there and may
    not be replaced, or when replacing it would delete the run.
    """
    path = Path(source)
    if output is None:
        if not path.is_dir():
            output = Path("exports") / path.name / kind
        elif (path.parent / CONFIG).is_file():
            output = path.parent / "exports" / (kind if path.name == FINAL else f"{kind}-{path.name}")
        else:
            output = path / "exports" / kind
    if output.exists():
        if not output.is_dir():
            raise UserError(f"{output} is a file; name a folder with --output")
        if not overwrite:
            raise UserError(f"{output} exists already; give --overwrite to replace it, or another folder by --output")
        taken = output.resolve()
        run = (path / CONFIG).is_file() and taken.parent == path.resolve()  # final_model, a checkpoint, the evaluation
        if run or taken in (Path.cwd(), *Path.cwd().parents, path.resolve(), *path.resolve().parents):
            raise UserError(f"--overwrite would delete {output} and the run in it; name another folder with --output")
        if any(output.iterdir()) and not any(output.glob(MARKS[kind])):
            raise UserError(
                f"--overwrite replaces an earlier export, and {output} does not look like one of {kind}: it has no "
                f"{MARKS[kind]}; name another folder with --output"
            )
    return output


@contextlib.contextmanager
def filled_aside(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it takes its place, on an error it is deleted.

    An older export is moved away first and deleted only when the new one stands.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    except OSError as error:
        raise UserError(f"cannot write into {target.parent}: {error.strerror}; name another --output") from error
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        for path in (aside, *aside.rglob("*")):  # folders of mkdtemp and files of safetensors are for one user only
            whole = 0o777 if path.is_dir() or path.stat().st_mode & 0o100 else 0o666
            path.chmod(whole & ~umask)
        old = aside.with_suffix(".old")
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except BaseException:  # Ctrl-C too
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not no_room(error):
            raise
        raise UserError(f"{target}: the disk is full; free some space or name another --output") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
