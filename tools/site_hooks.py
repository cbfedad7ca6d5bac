"""Hooks of mkdocs: bring pages and files from outside of docs/ into the site.

The README opens the site. What pages link to elsewhere in the repository (examples, licences, the
READMEs beside the code) comes along, so that links that work in the repository work here too.
"""

import posixpath
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

BESIDE_THE_FENCE = {
    path.relative_to(ROOT).as_posix(): f"code/{'-'.join(path.relative_to(ROOT).parts[2:-1])}.md"
    for path in sorted(ROOT.glob("src/samestep/*/**/README.md"))
}

PAGES = {"CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md", **BESIDE_THE_FENCE}
"""Files of the repository outside of docs/ that are pages of the site, and which."""

_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `PAGES` and the files that pages link to, and complete the navigation."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    config.nav = _expanded(config.nav, sorted(files.src_uris))
    for target in sorted(_linked_files(files) - set(files.src_uris)):
        added = File.generated(
            config,
            target,
            abs_src_path=str(ROOT / target),
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Open the site by the README, and lead links out of docs/ to where their targets are here."""
    site = page.file.src_uri
    text = _with_site_links(markdown, source=_source(site), site=site)
    if site != "index.md":
        return text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = _with_site_links(readme, source="README.md", site=site)
    return f"{readme}\n\n#{text.lstrip()}"


def _expanded(nav: Any, pages: list[str]) -> list[Any]:
    """The navigation with the pages in the place of each line that has a star."""
    lines: list[Any] = []
    for line in nav:
        if isinstance(line, str) and "*" in line:
            lines += [page for page in pages if page.endswith(".md") and fnmatchcase(page, line)]
        elif isinstance(line, dict):
            title, below = next(iter(line.items()))
            lines.append({title: _expanded(below, pages) if isinstance(below, list) else below})
        else:
            lines.append(line)
    return lines


def _source(site: str) -> str:
    """Where a page of the site stands in the repository."""
    return _SOURCES.get(site, f"docs/{site}")


def _site(source: str) -> str:
    """Where a file of the repository stands in the site."""
    return PAGES.get(source, "index.md" if source == "README.md" else source.removeprefix("docs/"))


def _linked_files(files: Files) -> set[str]:
    """The files outside of docs/ that the pages link to."""
    texts = {_source(file.src_uri): file.content_string for file in files.documentation_pages()}
    texts["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {
        _target(match[3], source=source)
        for source, text in texts.items()
        for match in _LINK.finditer(_FENCE.sub("", text))
    }
    return {target for target in targets if (ROOT / target).is_file() and _site(target) == target}


def _target(link: str, *, source: str) -> str:
    """The file of the repository that a relative link of a page leads to, without its anchor."""
    path = link.partition("#")[0]
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _with_site_links(text: str, *, source: str, site: str) -> str:
    """The text with every link to a file of the repository led to where that file is here."""

    def lead(match: re.Match[str]) -> str:
        image, label, link = match.groups()
        path, hash_sign, anchor = link.partition("#")
        target = _target(link, source=source)
        if not path or "://" in link or not (ROOT / target).exists():
            return match[0]
        if (ROOT / target).is_dir():
            return label  # nothing here shows a folder
        here = posixpath.relpath(_site(target), posixpath.dirname(site) or ".")
        return f"{image}[{label}]({here}{hash_sign}{anchor})"

    parts = _FENCE.split(text)
    parts[::2] = [_LINK.sub(lead, part) for part in parts[::2]]
    return "".join(parts)
