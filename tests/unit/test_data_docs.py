"""The page on data: what it tells users to write is what the reader reads."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import ROOT, blocks
from PIL import Image

from metis_fast.data.check import check_files
from metis_fast.data.parquet import PromptFiles
from metis_fast.types import Message

PAGE = ROOT / "docs" / "data.md"
EXAMPLES = [block.text for block in blocks(PAGE) if block.kind == "python"]


def test_the_example_of_the_page_makes_a_file_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    example, _ = EXAMPLES
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 32)).save("chart.png")
    exec(compile(example, PAGE, "exec"), {})
    prompt = PromptFiles([tmp_path / "charts.parquet"]).read(0)
    assert prompt.uid == "charts:0"
    assert prompt.messages[1] == Message("user", "<image>\nWhich year had the highest sales?")
    assert prompt.images[0].data == Path("chart.png").read_bytes()
    assert (prompt.ability, prompt.answers, prompt.extra) == ("perception", ("2019",), {"split": "train"})


def test_the_lines_for_gsm8k_make_a_file_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, example = EXAMPLES
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"question": "2 + 2?", "answer": "Two and two.\n#### 4"}]), "gsm8k.parquet")
    exec(compile(example, PAGE, "exec"), {"pa": pa, "pq": pq})
    prompt = PromptFiles([tmp_path / "prompts.parquet"]).read(0)
    assert (prompt.question, prompt.answers, prompt.judge_style) == ("2 + 2?", ("4",), "math")
    assert check_files([tmp_path / "prompts.parquet"], progress=False).warnings == ()
