"""The files of one split in a folder: our own layout, a clone of a Hub dataset, and what `save_to_disk` writes.

Read are `SPLIT.jsonl`, `SPLIT-00000-of-00002.parquet`, the same under `data/` or in a folder named after the split, the
`configs` in a README's front matter, and the Arrow files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from formats.safe_yaml import load_yaml

_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<total>\d{5})\b.*")


def files_of_split(folder: Path, split: str, is_data: Callable[[Path], bool], config: str | None = None) -> list[Path]:
    """The files of a split, in order. Raises UserError, naming what the folder holds.

    is_data  whether a file's name says that it holds rows
    config   one of the configs in the front matter of the folder's README, or of its folders
    """
    if config is not None:
        if config not in (configs := _configs(folder)):
            if not (folder / config).is_dir():
                known = ", ".join(configs) or "none in its README.md"
                raise UserError(
                    f"{folder}: there is no config {config!r} (configs: {known}) and no folder of that name"
                )
            return files_of_split(folder / config, split, is_data)
        return _complete(folder, _files_of_config(folder, config, configs[config], split))
    if saved := _saved_files(folder, split):
        return saved
    found = _named_files(folder, split, is_data)
    if not found:
        configs = _configs(folder)
        if len(configs) > 1 and "default" not in configs:
            raise UserError(f"{folder}: holds several configs ({', '.join(configs)}); name one, as {folder}:CONFIG")
        if configs:
            name = "default" if "default" in configs else next(iter(configs))
            found = _files_of_config(folder, name, configs[name], split)
    if not found:
        raise UserError(f"{folder}: holds no file for the split {split!r}{_contents(folder, is_data)}")
    return _complete(folder, found)


def _named_files(folder: Path, split: str, is_data: Callable[[Path], bool]) -> list[Path]:
    """Files whose name, or whose folder's name, is that of the split."""
    for place in (folder, folder / "data"):
        if place.is_dir():
            files = sorted(path for path in place.iterdir() if path.is_file() and is_data(path))
            found = [path for path in files if _split_of(path) == split]
            shards = [path for path in found if _SHARD.fullmatch(path.name)]
            if len(found) > 1 and len(shards) < len(found):
                names = ", ".join(path.name for path in found)
                raise UserError(
                    f"{folder}: holds several files ({names}) for the split {split!r}; name the file itself, or "
                    "folder@split"
                )
            if found:
                return found
        if (place / split).is_dir():
            return sorted(path for path in (place / split).iterdir() if path.is_file() and is_data(path))
    return []


def _split_of(path: Path) -> str:
    match = _SHARD.fullmatch(path.name)
    return match["split"] if match else path.name.split(".")[0]


def _complete(folder: Path, files: list[Path]) -> list[Path]:
    """The files, none of whose shards is missing."""
    totals: dict[tuple[Path, str, str], set[int]] = {}
    for path in files:
        if match := _SHARD.fullmatch(path.name):
            totals.setdefault((path.parent, match["split"], match["total"]), set()).add(int(match["number"]))
    for (_, split, total), numbers in totals.items():
        if missing := sorted(set(range(int(total))) - numbers):
            name = f"{split}-{missing[0]:05d}-of-{total}"
            raise UserError(f"{folder}: the file {name} of the split is missing; download the data set again")
    return files


def _saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder that the `datasets` library saved; [] for another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise UserError(
                f"{folder}: holds no split {split!r}, but {', '.join(map(str, splits))}; write folder@split"
            )
        folder = folder / split
    if not (folder / "state.json").is_file():
        return []
    named = [folder / str(one["filename"]) for one in _json(folder / "state.json").get("_data_files", [])]
    if missing := [path.name for path in named if not path.is_file()]:
        raise UserError(f"{folder}: the file {missing[0]} of the saved dataset is missing; save it again")
    return named


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save the dataset again") from error
    return value if isinstance(value, dict) else {}


def _configs(folder: Path) -> dict[str, Any]:
    """Config name -> its `data_files`, from the front matter of README.md."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        meta = load_yaml(match[1]) if match else None
    except (OSError, ValueError):
        return {}
    configs = meta.get("configs") if isinstance(meta, dict) else None
    return {
        str(one["config_name"]): one["data_files"]
        for one in (configs if isinstance(configs, list) else ())
        if isinstance(one, dict) and "config_name" in one and "data_files" in one
    }


def _files_of_config(folder: Path, name: str, data_files: Any, split: str) -> list[Path]:
    entries = data_files if isinstance(data_files, list) else [data_files]
    entries = [one if isinstance(one, dict) else {"split": "train", "path": one} for one in entries]
    patterns = [path for one in entries if one.get("split") == split for path in _as_list(one.get("path"))]
    found: list[Path] = []
    root = folder.resolve()
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(
                f"{folder}: its README.md names {pattern}, which is outside the folder; fix the front matter"
            )
        found += sorted(path for path in folder.glob(pattern) if path.is_file() and path.resolve().is_relative_to(root))
    if not found:
        splits = ", ".join(str(one.get("split")) for one in entries)
        raise UserError(f"{folder}: config {name} has no file for the split {split!r} (its splits: {splits})")
    return found


def _as_list(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _contents(folder: Path, is_data: Callable[[Path], bool]) -> str:
    """What else the folder holds, for a message."""
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    splits = {_split_of(path) for place in places for path in place.iterdir() if path.is_file() and is_data(path)}
    if splits:
        return f", but for {', '.join(sorted(splits)[:8])}; write folder@split"
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return f"; name one of its folders ({', '.join(folders[:8])})" if folders else "; name the file itself"
