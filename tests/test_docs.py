"""Every page: links and anchors exist, the site's menu has the page, pictures are used, commands are accepted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from finetune import settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "experiments" / "README.md"])
GENERATED = ("flags.md", "formats_table.md", "shapes.md")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
VERBS = ("prepare", "encode", "parse", "show", "audit", "generate")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def broken_links(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.resolve())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_exist(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading: `x`\n[a](#a-heading-x) [b](#other) [c](none.md) [d](page.md#a-heading-x)\n")
    assert broken_links(page) == ["#other", "none.md"]


def listed(entries: list) -> list[str]:
    """The files in a menu of mkdocs.yml."""
    found = []
    for entry in entries:
        (value,) = entry.values()
        found += [value] if isinstance(value, str) else listed(value)
    return found


def test_menu_has_every_page():
    config = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    menu = listed(yaml.safe_load(config)["nav"])
    outside = {page for page in menu if page.startswith("repository/")}
    assert sorted(set(menu) - outside) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert all((ROOT / page.removeprefix("repository/")).is_file() for page in outside)
    assert len(set(menu)) == len(menu)


def test_links_out_of_docs_become_pages_or_text():
    """What the site's hook makes of links to records, READMEs and files that are no pages."""
    spec = importlib.util.spec_from_file_location("site_links", DOCS / "site_links.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)

    def on_the_site(path: str, text: str) -> str:
        return hook.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=path)))

    assert on_the_site("runs.md", "[a](../experiments/README.md#x)") == "[a](repository/experiments/README.md#x)"
    assert on_the_site("ko/index.md", "[a](../../CHANGELOG.md)") == "[a](../repository/CHANGELOG.md)"
    assert on_the_site("repository/CONTRIBUTING.md", "[a](docs/data.md)") == "[a](../data.md)"
    assert on_the_site("speed.md", "[a](../benchmarks/results/x.json)") == "a (`benchmarks/results/x.json`)"
    assert (
        on_the_site("speed.md", "[a](memory.md) [b](https://x.y/z) [c](#d)")
        == "[a](memory.md) [b](https://x.y/z) [c](#d)"
    )


def test_pictures_are_used():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [picture.name for picture in (DOCS / "images").iterdir() if f"images/{picture.name}" not in text]


def commands() -> list[str]:
    """The `python SCRIPT.py` lines in the bash and plain blocks of all pages, without comments, pipes and prompts."""
    found = set()
    for page in PAGES:
        if page.name in GENERATED:
            continue
        for block in re.findall(r"^```(?:bash|powershell)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"\s#|\s[|>;&]+\s", line)[0].strip()
                if re.match(r"python \w+\.py\b", line) and "…" not in line and "|" not in line:
                    found.add(line)
    return sorted(found)


COMMANDS = commands()


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    if script == "train_lora.py":
        settings.parse(arguments)
        return
    if script == "prepare_data.py" and arguments[0] not in (*VERBS, "--help"):
        arguments = ["prepare", *arguments]  # the default verb
    importlib.import_module(script.removesuffix(".py")).build_parser().parse_args(arguments)


def test_readmes_have_the_same_commands():
    """The Korean README shows the commands of the English one, in its order; it may show fewer."""
    blocks = [
        [
            line.split("#")[0].strip()
            for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.split("\n")
        ]
        for text in ((ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "README.ko.md"))
    ]
    english, korean = ([line for line in lines if line] for lines in blocks)
    rest = iter(english)
    assert len(korean) >= 10
    assert not [line for line in korean if line not in rest], "changed, or in another order"


def test_notebooks_are_listed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert notebook.name in text
        assert json.loads(notebook.read_text(encoding="utf-8"))["nbformat"] == 4


def test_no_page_links_to_a_file_git_ignores():
    """Such a link works on the writer's machine only."""
    links = ((page, target) for page in PAGES for target in LINK.findall(page.read_text(encoding="utf-8")))
    paths = {(page.parent / target.partition("#")[0]).resolve() for page, target in links if ":" not in target}
    existing = "\n".join(str(path) for path in paths if path.exists())
    ignored = subprocess.run(
        ["git", "check-ignore", "--stdin"], cwd=ROOT, input=existing, capture_output=True, text=True, check=False
    )
    assert not ignored.stdout
