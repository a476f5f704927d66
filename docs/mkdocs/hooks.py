"""What mkdocs does beside turning docs/*.md into pages: generated pages, links, formulas."""

import re
from html import unescape
from pathlib import PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from options import ROOT, read_conf
from pages import anchor, api_pages, options_page

MARKER = "<!-- every option -->"  # in docs/configuration.md
# Files outside docs/ that are pages of the site as well: the same text on both.
BORROWED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "groupsae/models/tiny/README.md": "bundled-model.md",
}
LINK = re.compile(r"(\]\(|src=\")(?!\w+:|#)([^)\"\s]+)(\)|\")")
BAR = 'stretchy="false" lspace="0" rspace="0"'
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Put the pages of the reference, one for each room, at the end of the navigation."""
    names = sorted(api_pages(ROOT / "groupsae"), key=lambda path: path != "api/index.md")
    config.nav.append({"API reference": names})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made and those that are borrowed."""
    for path, text in api_pages(ROOT / "groupsae").items():
        files.append(File.generated(config, path, content=text))
    for source, path in BORROWED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a model card's head
        files.append(File.generated(config, path, content=_relink(text, source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the marker by the options, and fix links that lead out of docs/."""
    if MARKER in markdown:
        markdown = markdown.replace(MARKER, options_page(read_conf()))
    return _relink(markdown, f"docs/{page.file.src_uri}") if page.file.abs_src_path else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show by themselves: no script, no network."""
    return FORMULA.sub(lambda found: _mathml(found[2], block=found[1] == "div"), html)


def _mathml(latex: str, *, block: bool) -> str:
    made = convert(unescape(latex).strip(), display="block" if block else "inline")
    # bars of a norm as high as the letters beside them, whatever hangs on them, and no space
    return re.sub("<mo>(&#x02016;|&#x0007C;)</mo>", rf"<mo {BAR}>\1</mo>", made)


def _relink(text: str, source: str) -> str:
    """Return the text with links that work from its page.

    Links in a file are relative to where it lies in the checkout, so that they work there as
    well. On the site they lead to the page that is made of the file: a yaml file's section of
    the configuration page, or the borrowed page. What is no page is named, not linked.
    """
    here = PurePosixPath(source).parent
    page = PurePosixPath("docs") / BORROWED.get(source, source.removeprefix("docs/"))

    def fixed(link: re.Match[str]) -> str:
        path, _, part = link[2].partition("#")
        target = _normal(here / path)
        found = BORROWED.get(target, target.removeprefix("docs/"))
        if target.startswith("conf/"):
            where = PurePosixPath(target.removeprefix("conf/"))
            group = where.parent.as_posix().removeprefix(".")
            found, part = "configuration.md", anchor(group, where.stem) if where.suffix else ""
        elif not target.startswith("docs/") and target not in BORROWED:
            return f"{link[1]}{link[2]}{link[3]}"
        up = "../" * (len(page.parts) - 2)
        return f"{link[1]}{up}{found}{'#' + part if part else ''}{link[3]}"

    return LINK.sub(fixed, text)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
