"""The site of the documentation: `make docs`. Sphinx reads the Markdown pages as they are."""

from __future__ import annotations

import re
from typing import Any

from metis_fast import __version__

project = "metis_fast"
version = release = __version__
copyright = "the metis_fast authors; Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"metis_fast {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 3  # links to headings, as on GitHub
myst_enable_extensions = ["attrs_block", "colon_fence"]
suppress_warnings = ["misc.highlighting_failure"]  # output of commands stands in blocks, too
highlight_language = "text"
pygments_style, pygments_dark_style = "default", "github-dark"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
linkcheck_anchors = True

_FIELDS = re.compile(r"[a-z]\w*(, \w+)*: ")
_COLUMNS = re.compile(r" +(\w+) {2,}(\S.*)")
_FOR_ALL = (  # what scrolls can be reached by keyboard, and a caption says of which level it is
    ('role="heading">', 'role="heading" aria-level="2">'),
    ("<pre>", '<pre tabindex="0">'),
    ('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
)
_PICTURE = re.compile(r"<p>(<img [^>]*\.svg[^>]*>)</p>")


def _as_list(app: Any, what: str, name: str, of: object, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: `name: meaning` at the start of a line is an item of a list, so is a row of two columns, and |
    is a letter."""
    found: list[str] = []
    item = False
    for line in (line.replace("|", "\\|") for line in lines):
        row = _COLUMNS.fullmatch(line)
        if row or _FIELDS.match(line):
            names, meaning = row.groups() if row else line.split(": ", 1)
            found += ["", f"* ``{names}``: {meaning}"]
            item = True
        else:
            item = item and bool(line.strip())
            found.append(f"  {line.strip()}" if item else line)
    lines[:] = found


def _reachable(app: Any, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Furo's pages, mended for those who use no mouse or no eyes."""
    for part in ("body", "furo_navigation_tree"):
        for found, better in _FOR_ALL:
            context[part] = context.get(part, "").replace(found, better)
    context["body"] = _PICTURE.sub(r'<p class="picture" tabindex="0">\1</p>', context["body"])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("html-page-context", _reachable, priority=900)  # behind the theme, which makes the tree
    app.connect("autodoc-process-docstring", _as_list, priority=100)
