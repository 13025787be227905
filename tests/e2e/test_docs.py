"""Every command that the documentation shows can be typed as it stands."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen3VLConfig

from metis_fast import cli
from metis_fast import config as config_module
from metis_fast.plan.gpus import NODE
from metis_fast.plan.shape import read_model_config
from metis_fast.train.megatron import layout

_ROOT = Path(__file__).parents[2]
_PAGES = [
    path for path in (_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").rglob("*.md"))) if path.exists()
]
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


_LAUNCHES = [(page, line) for page, line in _commands("sbatch") if "configs/launch/" in line]
_REHEARSALS = [(page, line) for page, line in _commands("metis-fast") if "train.backend=megatron" in line]


def _demo_model() -> Qwen3VLConfig:
    shape = json.loads((_ROOT / "configs/demo_model.json").read_text(encoding="utf-8"))
    return Qwen3VLConfig(
        text_config=shape["text_config"] | {"vocab_size": shape["vocab_size"]}, vision_config=shape["vision_config"]
    )


@pytest.mark.parametrize(("page", "line"), _LAUNCHES)
def test_a_documented_launch_has_a_layout_that_works_on_the_nodes_it_asks_for(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_ROOT)
    words = shlex.split(line, comments=True)[1:]
    at = next(i for i, word in enumerate(words) if word.startswith("configs/launch/"))
    options, (script, path, *overrides) = words[:at], words[at:]
    assert Path(script).is_file(), f"{page}: {line}"
    config = config_module.load(Path(path), overrides)
    assert config.train.backend == "megatron"
    layout.check(config.train.megatron, read_model_config(config, None))
    given = dict(option.split("=", 1) for option in options)
    assert given.keys() <= {"--nodes", "--time", "--dependency"}, f"{page}: {line}"
    assert int(given["--nodes"]) * NODE == config.train.megatron.num_ranks, f"{page}: {line}"
    assert (config.workers.launcher == "ray") == script.endswith("ray.sbatch"), f"{page}: {line}"
    if config.workers.launcher == "ray":
        plan = pytest.importorskip("metis_fast.cluster.room").plan
        bundles = plan(config, ranks=True, on_gpus=True)
        assert sum(bundle.gpus for bundle in bundles) == config.train.megatron.num_ranks, f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), _REHEARSALS)
def test_a_documented_rehearsal_has_a_layout_for_the_demos_model(page: str, line: str) -> None:
    args = cli.parse(shlex.split(line, comments=True)[1:])
    assert str(args.config) == "runs/demo/config.yaml", f"{page}: {line}"
    layout.check(config_module.load(None, args.overrides).train.megatron, _demo_model())


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in _commands("metis-fast") if page == "cluster.md"])
def test_what_the_cluster_page_does_before_it_needs_a_cluster_works(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] not in ("plan", "weights", "config"):
        return
    monkeypatch.chdir(_ROOT)
    assert cli.main(words) == 0
    assert capsys.readouterr().out


def test_documented_ray_commands_parse() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    lines = [line for page in _PAGES for line in re.findall(r"`ray ([^`]+)`", page.read_text(encoding="utf-8"))]
    assert len(lines) >= 3
    for line in lines:
        verb, *words = shlex.split(line)
        scripts.cli.commands[verb].make_context(verb, words)


def test_no_two_test_files_have_the_same_name() -> None:
    """pytest takes them for one: `make test-gpu` and `make test-slow`, which collect all folders at once, would stop there."""
    names = Counter(path.name for path in (_ROOT / "tests").rglob("test_*.py"))
    assert [name for name, num in names.items() if num > 1] == []


def test_the_pages_show_commands_at_all() -> None:
    assert len(_LAUNCHES) >= 5
    assert _REHEARSALS
    assert {page for page, _ in _commands("metis-fast")} >= {"configuration.md", "report.md"}
    assert {shlex.split(line, comments=True)[1] for _, line in _commands("metis-fast")} >= {"config", "demo", "report"}
