"""Every block of code in the documentation is run, or says above itself why nobody runs it."""

from __future__ import annotations

import asyncio
import doctest
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pages import BLOCKS, PAGES, ROOT, SHELL, Block, blocks
from PIL import Image

from metis_fast import config as config_module
from metis_fast.ablate.spec import planned_runs, read_ablation, shared_config
from metis_fast.config import ImageSearchConfig
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.evaluate.files import reading
from metis_fast.evaluate.standin import write_standins
from metis_fast.recording.file import Recording
from metis_fast.rollout.protocols import Metis
from metis_fast.rollout.store import RolloutStore
from metis_fast.score.llm_prompt import read_prompt
from metis_fast.tools.results import ImageSearchResult, PythonResult
from metis_fast.tools.search.lookup import CachedImages
from metis_fast.types import ImageBlob, Prompt, Rollout, Score, ScoredGroup, Verdict

_KINDS = {"bash", "python", "py", "yaml", "json", "text"}
_WIDTH = 110
"""Characters of a line that a window of 1440 pixels shows."""
_PROGRAMS = {"metis-fast", "make", "sbatch", "source", "sqlite3"}  # test_docs.py has the first three


def _of(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds and not block.why_not]


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(BLOCKS) > 60
    bare = [f"{block}: no language behind its fence" for block in BLOCKS if block.kind not in _KINDS]
    for block in _of("bash"):
        programs = {line.split()[0] for line in block.commands()} - _PROGRAMS
        bare += [f"{block}: nobody runs {program}" for program in sorted(programs)]
    bare += [f"{block}: text that nobody compares" for block in _of("text") if not _checks(block)]
    assert bare == [], "put <!-- not run: why --> right above the block, or run it: CONTRIBUTING.md, Documentation"
    assert [block for block in BLOCKS if block.why_not and len(block.why_not) < 5] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mark_stands_right_above_a_block(page: Path) -> None:
    found = blocks(page)
    marks = page.read_text(encoding="utf-8").count("<!-- not run:") - sum(one.text.count("<!-- not run:") for one in found)
    assert marks == sum(bool(block.why_not) for block in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_block_runs_out_of_the_site(page: Path) -> None:
    lines = [f"{block}: {line}" for block in blocks(page) for line in block.text.splitlines() if len(line) > _WIDTH]
    assert lines == [], f"more than {_WIDTH} characters"


# -- shell ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_a_shell_can_read_it(block: Block) -> None:
    read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")


def test_what_a_shell_is_told_to_read_is_made_by_make_setup() -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    sourced = {line.split("#")[0].strip() for block in SHELL for line in block.commands() if line.startswith("source ")}
    assert sourced == {"source .venv/bin/activate"} and "VENV := .venv" in rules


def test_questions_to_a_recording_are_answered(tmp_path: Path) -> None:
    asked = [shlex.split(line) for block in SHELL for line in block.commands() if line.startswith("sqlite3 ")]
    assert asked
    Recording(tmp_path / "first.sqlite", writable=True).close()
    with sqlite3.connect(tmp_path / "first.sqlite") as database:
        for _, _, question in asked:
            assert database.execute(question).fetchall() == []


# -- settings and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", _of("yaml"), ids=str)
def test_settings_are_those_of_a_config_or_of_an_ablation(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "block.yaml").write_text(block.text, encoding="utf-8")
    tree = yaml.safe_load(block.text)
    if "variants" not in tree:
        config = config_module.load(tmp_path / "block.yaml")
        assert config != config_module.load(None)
        return
    (tmp_path / "my.yaml").write_text("data: {train: [a], heldout: [b]}\n", encoding="utf-8")
    (tmp_path / "runs" / "start" / "model").mkdir(parents=True)
    ablation = read_ablation(tmp_path / "block.yaml")
    runs = planned_runs(ablation, shared_config(ablation), 1)
    assert len(runs) == len(tree["variants"]) * len(tree["seeds"])


@pytest.mark.parametrize("block", _of("json"), ids=str)
def test_json_is_a_cache_of_searches_that_can_be_read(block: Block, tmp_path: Path) -> None:
    (tmp_path / "cached_images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "cached_images" / "7_0.jpg")
    (tmp_path / "cache.json").write_text(block.text, encoding="utf-8")
    source = CachedImages(ImageSearchConfig(cache=tmp_path / "cache.json"))
    (index,) = json.loads(block.text)
    found = asyncio.run(source.search((), {"index": index}))
    source.close()
    assert isinstance(found, ImageSearchResult)
    assert [(page.title, page.image is not None) for page in found.pages] == [("A title", True), ("Another", False)]


# -- text -------------------------------------------------------------------------------------------------------------------


def _is_a_prompt(block: Block, folder: Path) -> None:
    (folder / "prompt.txt").write_text(block.text, encoding="utf-8")
    system, user = read_prompt(folder / "prompt.txt").messages("Q?", "4", "four")
    assert str(system["content"]).startswith("You grade") and 'Ground truth: "4"\n' in str(user["content"])


def _is_what_the_agent_reads(block: Block, folder: Path) -> None:
    shown = (ImageBlob.of(b"a"), ImageBlob.of(b"b"))
    assert Metis().word(PythonResult(("7", 0, 1), "7", "", shown, ok=True)).text == block.text.strip()


def _is_what_a_bad_row_says(block: Block, folder: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "data_source": "my-charts",
        "reward_model": {"ground_truth": ["b"], "style": "rule"},
    }
    bad = row | {"reward_model": {"ground_truth": ["b"], "style": "vibes"}}
    pq.write_table(pa.Table.from_pylist([row] * 17 + [bad]), folder / "charts.parquet")
    with pytest.raises(BadRowError) as caught:
        PromptFiles([Path("charts.parquet")]).read(17)  # the working folder is that one
    assert str(caught.value) == " ".join(block.text.split())  # of one line


_TEXTS: Mapping[str, Callable[[Block, Path], None]] = {
    "[system]\n": _is_a_prompt,
    "Code execution result:\n": _is_what_the_agent_reads,
    "charts.parquet, row 17": _is_what_a_bad_row_says,
}


def _checks(block: Block) -> list[Callable[[Block, Path], None]]:
    return [check for begin, check in _TEXTS.items() if block.text.startswith(begin)]


@pytest.mark.parametrize("block", _of("text"), ids=str)
def test_a_text_is_what_a_program_reads_or_says(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (check,) = _checks(block)
    check(block, tmp_path)


# -- Python -----------------------------------------------------------------------------------------------------------------


def _tensors(block: Block) -> dict[str, object]:
    """What a block about an op is given, by the names that it uses."""
    num_tokens = 24576 if "24576" in block.text else 9
    query, key, value = (torch.randn(num_tokens, heads, 16) for heads in (2, 2, 2))
    hidden, head = torch.randn(5, 32, requires_grad=True), torch.randn(33, 32, requires_grad=True)
    advantages = {"adv_acc": torch.randn(5), "adv_tool": torch.randn(5), "mask": torch.ones(5, dtype=torch.bool)}
    counts = {"n_acc": 5.0, "n_tool": 5.0, "targets": torch.arange(5), "hidden": hidden, "head": head}
    image = torch.zeros(64, 96, 3, dtype=torch.uint8)
    return {"query": query, "key": key, "value": value, "image": image, **advantages, **counts}


@pytest.fixture
def readers_folder(tmp_path: Path, tiny_folder: Path, play: Callable[..., Rollout], make_prompt: Callable[..., Prompt]) -> Path:
    """Files that the pages' examples read."""
    Image.new("RGB", (64, 32)).save(tmp_path / "chart.png")
    sums = [{"question": "2 + 2?", "answer": "Two and two.\n#### 4"}]
    pq.write_table(pa.Table.from_pylist(sums), tmp_path / "gsm8k.parquet")
    write_standins(tmp_path, ["vstar"])["vstar"].tsv[0].rename(tmp_path / "VStarBench.tsv")
    shutil.copytree(tiny_folder, tmp_path / "runs" / "default" / "trained")
    call = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call><|im_end|>'
    rollout = play(make_prompt(), [call] * 3 + ["<answer>Paris</answer><|im_end|>"])
    score = Score(Verdict(True, True, "Paris"), rollout.outcome, 1.0, 0.25, qualifies=True)
    group = ScoredGroup(make_prompt(), (rollout,), (score,))
    RolloutStore(tmp_path / "runs" / "default" / "rollouts").write("step-000001", [group])
    return tmp_path


def _own(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind in ("python", "py") and not block.why_not]


@pytest.mark.parametrize("page", [page for page in PAGES if _own(page)], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path, readers_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From top to bottom, in one program."""
    monkeypatch.chdir(readers_folder)
    monkeypatch.setattr(reading, "read", partial(reading.read, any_md5=True))  # a stand-in has not the published bytes
    names: dict[str, object] = {}
    for block in _own(page):
        if block.text.startswith(">>>"):
            continue  # below
        names |= _tensors(block)
        exec(compile(block.text, str(block), "exec"), names)
    printed = capsys.readouterr().out
    assert bool(printed) == any(re.search(r"^ *print\(", block.text, re.MULTILINE) for block in _own(page))


@pytest.mark.parametrize("page", [page for page in PAGES if any(">>>" in block.text for block in _own(page))], ids=str)
def test_what_an_example_is_said_to_print_is_what_it_prints(page: Path) -> None:
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    examples = len(re.findall(r"^>>> ", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert result.attempted == examples and result.failed == 0
