"""Every command that the documentation shows can be typed as it stands."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands
from transformers import Qwen3VLConfig

from metis_fast import cli
from metis_fast import config as config_module
from metis_fast.config.tree import settings
from metis_fast.plan.gpus import NODE
from metis_fast.plan.shape import read_model_config
from metis_fast.train.megatron import layout

# A page that is written for readers names files of their own like this; all other files have to be in the repository.
_READERS_OWN = re.compile(r"^(my[./]|runs/|path/|/)")


@pytest.mark.parametrize(("page", "line"), commands("metis-fast"))
def test_a_documented_command_parses_and_names_files_and_settings_that_exist(page: str, line: str) -> None:
    args = cli.parse(shlex.split(line, comments=True)[1:])
    config = getattr(args, "config", None)
    if config is not None and not _READERS_OWN.match(str(config)):
        assert (ROOT / config).is_file(), f"{page}: {line}"
        config_module.load(ROOT / config, args.overrides)
    else:
        config_module.load(None, getattr(args, "overrides", []))


@pytest.mark.parametrize(("page", "line"), commands("make"))
def test_a_documented_make_target_exists(page: str, line: str) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert set(targets) <= set(rules), f"{page}: {line}"


_LAUNCHES = [(page, line) for page, line in commands("sbatch") if "configs/launch/" in line]
_REHEARSALS = [(page, line) for page, line in commands("metis-fast") if "train.backend=megatron" in line]


def _demo_model() -> Qwen3VLConfig:
    shape = json.loads((ROOT / "configs/demo_model.json").read_text(encoding="utf-8"))
    return Qwen3VLConfig(
        text_config=shape["text_config"] | {"vocab_size": shape["vocab_size"]}, vision_config=shape["vision_config"]
    )


@pytest.mark.parametrize(("page", "line"), _LAUNCHES)
def test_a_documented_launch_has_a_layout_that_works_on_the_nodes_it_asks_for(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
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


_NOTHING_NEEDED = {"cluster.md", "configuration.md", "README.md"}


@pytest.mark.parametrize(("page", "line"), [one for one in commands("metis-fast") if one[0] in _NOTHING_NEEDED])
def test_what_the_cluster_page_does_before_it_needs_a_cluster_works(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] not in ("plan", "weights", "config"):
        return
    monkeypatch.chdir(ROOT)
    assert cli.main(words) == 0
    assert capsys.readouterr().out


_FILES = frozenset({".py", ".json", ".jsonl", ".safetensors", ".parquet", ".log", ".yaml"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_are_settings(page: Path) -> None:
    known = {key for key, _ in settings()}
    sections = {key.partition(".")[0] for key in known}
    named = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", page.read_text(encoding="utf-8")))
    asked = {name for name in named if name.partition(".")[0] in sections and Path(name).suffix not in _FILES}
    # web-search.md explains data.items, a path in somebody's JSON, which settings.md repeats
    assert asked - known - {"data.items"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:metis_fast|tests|bench|configs|kernels)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not re.search("NAME|SECTION", name) and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_have_verbs_and_options_that_exist(page: Path) -> None:
    for line in re.findall(r"`metis-fast\s+([^`]+)`", page.read_text(encoding="utf-8")):
        parser, words = cli.build_parser(), line.split()
        while words and (verbs := [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]):
            assert words[0] in verbs[0], line
            parser = verbs[0][words.pop(0)]
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= {option for one in parser._actions for option in one.option_strings}, line


def test_documented_ray_commands_parse() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    lines = [line for page in PAGES for line in re.findall(r"`ray ([^`]+)`", page.read_text(encoding="utf-8"))]
    assert len(lines) >= 3
    for line in lines:
        verb, *words = shlex.split(line)
        scripts.cli.commands[verb].make_context(verb, words)


def test_no_two_test_files_have_the_same_name() -> None:
    """pytest takes them for one: `make test-gpu` and `make test-slow`, which collect all folders at once, would stop there."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, num in names.items() if num > 1] == []


def test_the_pages_show_commands_at_all() -> None:
    assert len(_LAUNCHES) >= 5
    assert _REHEARSALS
    assert {page for page, _ in commands("metis-fast")} >= {"configuration.md", "report.md"}
    assert {shlex.split(line, comments=True)[1] for _, line in commands("metis-fast")} >= {"config", "demo", "report"}
