"""Every command that the documentation shows can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from metis_fast import cli
from metis_fast import config as config_module

_ROOT = Path(__file__).parents[2]
_PAGES = [path for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))) if path.exists()]
# A page that is written for readers names files of their own like this; all other files have to be in the repository.
_READERS_OWN = re.compile(r"^(my[./]|runs/|path/|/)")


def _blocks(text: str) -> Iterator[str]:
    """Lines of fenced and indented code."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def _commands(program: str) -> list[tuple[str, str]]:
    found = []
    for page in _PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += [(page.name, line) for line in _blocks(text) if line.split(" ", 1)[0] == program]
    return found


@pytest.mark.parametrize(("page", "line"), _commands("metis-fast"))
def test_a_documented_command_parses_and_names_files_and_settings_that_exist(page: str, line: str) -> None:
    args = cli.parse(shlex.split(line, comments=True)[1:])
    config = getattr(args, "config", None)
    if config is not None and not _READERS_OWN.match(str(config)):
        assert (_ROOT / config).is_file(), f"{page}: {line}"
        config_module.load(_ROOT / config, args.overrides)
    else:
        config_module.load(None, getattr(args, "overrides", []))


@pytest.mark.parametrize(("page", "line"), _commands("make"))
def test_a_documented_make_target_exists(page: str, line: str) -> None:
    rules = re.findall(r"^([\w-]+):", (_ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert set(targets) <= set(rules), f"{page}: {line}"


def test_the_pages_show_commands_at_all() -> None:
    assert {page for page, _ in _commands("metis-fast")} >= {"configuration.md", "report.md"}
    assert {shlex.split(line, comments=True)[1] for _, line in _commands("metis-fast")} >= {"config", "demo", "report"}
