"""Hooks of the site: links that leave docs/, citations of the specification, and the table of settings.

Pages link to files outside of docs/ the way a code host shows them, as in `../results/smoke.png`. The site
shows the measurements in results/, the change log and the guide for contributors, and those links lead there.
A link to any other file of the repository, a script for example, becomes plain text.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("results/**/*.md", "results/**/*.png", "CHANGELOG.md", "CONTRIBUTING.md")
_CITATION = re.compile(r"\bSPEC (\d+)([abc]?)\b")
_HEAD = ("| setting | default | range | meaning |", "|---|---|---|---|")
_PAGE = re.compile(r'href="(\w+)\.md\b')
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files of the repository that the site shows, under their path in it."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes each link that leaves docs/, or enters it from outside, a link of the site."""
    del config
    name = page.file.src_uri
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", "\n".join(_settings()))
    here = _in_repository(name)

    def site_link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups(default="")
        if ":" in target:
            return found[0]
        wanted = os.path.normpath(os.path.join(os.path.dirname(here), unquote(target)))
        shown = wanted.removeprefix("docs/")
        if files.get_file_from_path(shown) is not None:
            relative = os.path.relpath(shown, os.path.dirname(name) or ".")
            return f"{mark}[{text}]({relative}{anchor})"
        # A target that does not exist at all is left, for the strict build to find.
        return text if (ROOT / wanted).exists() else found[0]

    return _LINK.sub(site_link, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links "SPEC 3", in docstrings, to section 3 of the specification, and a notebook to other pages."""
    del config, files
    name = page.file.src_uri
    if name.startswith("api/"):
        return _CITATION.sub(r'<a href="../specification.html#spec-\1\2">\g<0></a>', html)
    if name.endswith(".ipynb"):
        return _PAGE.sub(r'href="\1.html', html)
    return html


def _in_repository(name: str) -> str:
    """The path in the repository of a page of the site."""
    return f"docs/{name}" if (ROOT / "docs" / name).exists() else name


def _settings() -> list[str]:
    """A table for each section of a config, in Markdown: every setting with default, range and meaning."""
    if str(ROOT) not in sys.path:
        # The settings of this checkout, even if another one is installed.
        sys.path.insert(0, str(ROOT))
    from mcm_jax.config.settings import Config  # Imports JAX, which the other pages do not need.

    sections, top = [], []
    for field in dataclasses.fields(Config):
        value = getattr(Config(), field.name)
        if dataclasses.is_dataclass(value):
            sections += ["", f"## {field.name}", "", *_HEAD]
            sections += [_row(f"{field.name}.{inner.name}", inner) for inner in dataclasses.fields(value)]
        else:
            top.append(_row(field.name, field))
    return [*_HEAD, *top, *sections]


def _row(name: str, field: dataclasses.Field[Any]) -> str:
    low, high = (field.metadata.get(end) for end in ("low", "high"))
    allowed = " to ".join(str(end) for end in (low, high) if end is not None)
    allowed = f"at least {allowed}" if allowed and high is None else allowed
    meaning = field.metadata.get("doc", "").replace("|", "\\|")
    return f"| `{name}` | `{field.default}` | {allowed} | {meaning} |"
