"""The site of the documentation is built without a warning, and its pages can be read."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import util
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

_ROOT = Path(__file__).parents[2]
_PAGES = sorted((_ROOT / "docs").rglob("*.md"))
_LONG = {  # pages of more than 250 lines, and why
    "docs/kernels.md": "its second half is tables of what was measured",
    "docs/rollouts.md": "engines, modes and faults hang together",
    "docs/tools.md": "the threat model stands beside what each tool does",
    "docs/settings.md": "generated, a reference",
}
_GENERATED = {"docs/settings.md"}


class _Links(HTMLParser):
    """What a page points at, and what can be pointed at in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.to: list[str] = []
        self.names: set[str] = set()
        self.alone: list[str] = []  # images without a text in their place
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names.update(value for key in ("id", "name") if (value := found.get(key)))
        self.to += [value for key in ("href", "src") if (value := found.get(key))]
        if tag == "img" and not found.get("alt") and "sidebar" not in (found.get("class") or ""):
            self.alone.append(str(found.get("src")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if util.find_spec("sphinx") is None:
        pytest.skip("no sphinx; in the project's folder: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", out / "trees"]
    built = subprocess.run([*command, _ROOT / "docs", out / "html"], capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    return out / "html"


def test_every_page_is_in_the_site_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for page in _PAGES:
        assert site / page.relative_to(_ROOT / "docs").with_suffix(".html") in pages
    broken = []
    for path, page in pages.items():
        assert page.alone == [], path
        for link in page.to:
            address, name = urldefrag(link)
            address = address.partition("?")[0]  # Sphinx puts a checksum behind it
            if re.match(r"[a-z]+:", address):
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            if not target.exists() or (name and target in pages and unquote(name) not in pages[target].names):
                broken.append(f"{path.relative_to(site)} -> {link}")
    assert broken == []
    everything = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "hdpo" in everything and "sandbox" in everything


def test_pages_are_for_those_who_use_no_mouse_or_no_eyes(site: Path) -> None:
    """What axe finds serious in Furo's pages, and docs/conf.py mends."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'role="heading"(?! aria-level)', text), path
        assert not re.findall(r'<pre>|<div class="table-wrapper', text), path
    assert 'tabindex="0"' in (site / "settings.html").read_text(encoding="utf-8")


def test_the_pictures_are_what_their_source_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = util.spec_from_file_location("pictures", _ROOT / "docs" / "pictures.py")
    assert spec is not None and spec.loader is not None
    pictures = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pictures", pictures)
    spec.loader.exec_module(pictures)
    assert len(pictures.PICTURES) >= 6
    for draw in pictures.PICTURES:
        file = _ROOT / "docs" / "concepts" / f"{draw.__name__.replace('_', '-')}.svg"
        assert file.read_text(encoding="utf-8") == draw().svg(), "run python docs/pictures.py"


@pytest.mark.parametrize(
    "page", [*_PAGES, *(_ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))], ids=lambda page: page.name
)
def test_pages_are_short_and_so_are_their_lines(page: Path) -> None:
    name, lines = str(page.relative_to(_ROOT)), page.read_text(encoding="utf-8").splitlines()
    assert page.parent == _ROOT or (len(lines) > 250) == (name in _LONG)
    code, long = False, list[str]()
    for line in lines:
        code ^= line.lstrip().startswith("```")
        if len(line) > 120 and not code and not line.startswith(("|", "  |", "    ", "![")):
            long.append(line)
    assert name in _GENERATED or long == []
    assert not re.search(r"!\[[^\]]*\n", page.read_text(encoding="utf-8")), "the site leaves out the line breaks of an alt text"
