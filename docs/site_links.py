"""Links of the pages to files outside docs/, for MkDocs: Markdown files become pages of the site, others plain text.

Pages are written for a reader of the repository, where `../benchmarks/results/RECORD.md` is a link that works.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = "repository/"  # where those pages are on the site
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
EXTERNAL = re.compile(r"[a-z]+:")


def in_repository(page: str) -> str:
    """Path in the repository of a page of the site."""
    return page.removeprefix(OUTSIDE) if page.startswith(OUTSIDE) else f"docs/{page}"


def site_path(path: str) -> str | None:
    """Path on the site of a file of the repository; None for a file that is not on it."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return OUTSIDE + path if path.endswith(".md") and (ROOT / path).is_file() else None


def linked(page: str, text: str) -> list[str]:
    """Paths in the repository that the Markdown text of a page links to."""
    folder = posixpath.dirname(in_repository(page))
    targets = (match[3] for match in LINK.finditer(text))
    return [posixpath.normpath(posixpath.join(folder, target)) for target in targets if not EXTERNAL.match(target)]


def on_files(files, config):
    """Adds the linked Markdown files outside docs/, and those that they link to."""
    from mkdocs.structure.files import File

    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for path in linked(page, (ROOT / in_repository(page)).read_text(encoding="utf-8")):
            target = site_path(path)
            if target and target.startswith(OUTSIDE) and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """The page with its links pointing to the site's pages."""
    here = posixpath.dirname(page.file.src_uri)
    folder = posixpath.dirname(in_repository(page.file.src_uri))

    def replace(match: re.Match) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if EXTERNAL.match(target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/") and here == posixpath.dirname(site_path(path) or ""):
            return match[0]
        new = site_path(path)
        return f"{picture}[{text}]({posixpath.relpath(new, here or '.')}{anchor})" if new else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)


def on_page_content(html: str, **_) -> str:
    """A flag in a table is not broken behind its dashes."""
    return re.sub(r"<code>(-\S+)</code>", r'<code class="flag">\1</code>', html)
