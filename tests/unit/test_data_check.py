"""The check: finds exactly the rows that training would refuse, and says what the others hold."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metis_fast.cli import main
from metis_fast.data.check import check_files
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.report import render_json, render_text
from metis_fast.data.row import BadRowError
from metis_fast.errors import DataError
from metis_fast.types import Prompt


def encoded(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, "PNG")
    return out.getvalue()


def write_rows(path: Path, *rows: tuple[str, list[bytes]]) -> Path:
    table = [
        {
            "data_source": "unit",
            "prompt": [{"role": "user", "content": "<image>" * len(images) + "what? Reply in <answer>."}],
            "images": images,
            "ability": ability,
            "reward_model": {"ground_truth": "4", "style": "music" if ability == "music" else "rule"},
        }
        for ability, images in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=2, compression="zstd")
    return path


SMALL, WIDE, LARGE = encoded(5, 7), encoded(40, 2), encoded(30, 20)


def test_the_report_counts_what_training_would_see(tmp_path: Path):
    write_rows(tmp_path / "a.parquet", ("math", [SMALL, LARGE]), ("search", [WIDE]), ("math", []))
    write_rows(tmp_path / "b.parquet", ("music", [encoded(900, 900)]), ("search", [b"junk"]))
    report = check_files([tmp_path], progress=False)
    assert report.rows == 5
    assert report.abilities == {"math": 2, "search": 1}
    assert (report.images, report.smallest, report.largest) == (3, (5, 7), (30, 20))
    assert report.image_bytes == len(SMALL) + len(WIDE) + len(LARGE)
    assert [(bad.row, bad.column) for bad in report.bad_rows] == [(0, "reward_model.style"), (1, "images[0]")]
    assert report.exit_code == 1
    any_style = check_files([tmp_path], progress=False, any_style=True)
    assert [(bad.row, bad.column) for bad in any_style.bad_rows] == [(1, "images[0]")]
    assert any_style.styles == {"music": 1, "rule": 3}


def test_the_check_refuses_exactly_the_rows_that_reading_refuses(tmp_path: Path):
    rows = [(ability, images) for ability in ("math", "music") for images in ([], [SMALL], [SMALL[:-30]])]
    path = write_rows(tmp_path / "set.parquet", *rows)
    refused, files = [], PromptFiles([path])
    for index in range(len(files)):
        try:
            files.read(index)
        except BadRowError as error:
            refused.append(error.bad_row)
    assert len(refused) == 4
    assert check_files([path], progress=False).bad_rows == tuple(refused)


def test_a_row_group_that_cannot_be_decoded_costs_its_own_rows_only(tmp_path: Path):
    path = write_rows(tmp_path / "set.parquet", *[("math", [SMALL])] * 6)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    report = check_files([path], progress=False)
    assert [bad.row for bad in report.bad_rows] == [2, 3]
    assert report.abilities["math"] == 4


def test_json_holds_every_bad_row_with_its_five_fields(tmp_path: Path):
    path = write_rows(tmp_path / "set.parquet", ("music", []), ("math", [LARGE]))
    tree = json.loads(render_json(check_files([path], progress=False)))
    assert tree["bad_rows"] == [
        {"file": str(path), "row": 0, "column": "reward_model.style", "expected": "rule, choice, math, llm", "got": "'music'"}
    ]
    assert tree["largest"] == [30, 20]
    assert tree["rows"] == 2


def test_text_tells_neighbours_with_one_fault_together(tmp_path: Path):
    rows = [("math", []), ("music", []), ("music", []), ("music", []), ("math", []), ("music", []), ("search", [b"no image"])]
    path = write_rows(tmp_path / "set.parquet", *rows)
    expected = "column reward_model.style: expected rule, choice, math, llm, got"
    assert render_text(check_files([path], progress=False)).splitlines()[:4] == [
        f"bad row: {path}, rows 1 to 3, {expected} 'music'",
        f"bad row: {path}, row 5, {expected} 'music'",
        f"bad row: {path}, row 6, column images[0]: expected an image that Pillow can decode, got '8 bytes: "
        "cannot identify image file'",
        "rows       7 (2 usable, 5 bad)",
    ]


def test_text_lists_each_bad_row_on_a_line_and_then_the_summary(tmp_path: Path):
    path = write_rows(tmp_path / "set.parquet", ("music", []), ("math", [SMALL]), ("search", [LARGE]), ("math", []))
    assert render_text(check_files([path], progress=False)).splitlines() == [
        f"bad row: {path}, row 0, column reward_model.style: expected rule, choice, math, llm, got 'music'",
        "rows       4 (3 usable, 1 bad)",
        "abilities  math 2 (67%), search 1 (33%)",
        "styles     rule 3 (100%)",
        "sources    unit 3 (100%)",
        "images     2 (0.0 MiB), 5x7 to 30x20 pixels",
        "           to 0.1 MP 2 (100%)",
    ]


def test_files_without_images_or_bad_rows_pass(tmp_path: Path):
    report = check_files([write_rows(tmp_path / "set.parquet", ("math", []))], progress=True)
    assert report.exit_code == 0
    assert render_text(report).splitlines()[-1] == "images     none"
    assert json.loads(render_json(report))["smallest"] is None


def test_a_missing_file_is_an_error_rather_than_a_report(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        check_files([tmp_path / "absent.parquet"], progress=False)


def test_prompts_that_are_too_long_for_the_model_are_bad_rows(tmp_path: Path):
    path = write_rows(tmp_path / "set.parquet", ("math", []), ("math", [SMALL]), ("search", [SMALL, SMALL]), ("music", []))
    report = check_files([path], False, lambda: lambda prompt: 10 + 5 * len(prompt.images), 15, processes=1)
    assert [str(bad) for bad in report.bad_rows] == [
        f"{path}, row 2, column prompt: expected at most rollout.max_prompt_tokens=15 tokens, got 20 tokens",
        f"{path}, row 3, column reward_model.style: expected rule, choice, math, llm, got 'music'",
    ]
    assert (report.longest_prompt, report.images, report.exit_code) == (15, 1, 1)
    assert render_text(report).splitlines()[-2:] == [
        "prompts    up to 15 tokens; 1 over the limit",
        "           to 256 2 (100%)",
    ]
    assert (report.over_limit, report.tokens) == (1, {"to 256": 2})
    assert json.loads(render_json(report))["longest_prompt"] == 15


def test_the_command_counts_tokens_as_a_run_with_the_model_would(
    tmp_path: Path, tiny_folder: Path, chat, capsys: pytest.CaptureFixture[str]
):
    path = write_rows(tmp_path / "set.parquet", ("math", []), ("math", [encoded(64, 64)]))
    lengths = [len(chat.encode_prompt(PromptFiles([path]).read(index)).tokens) for index in (0, 1)]
    assert lengths[1] > lengths[0]

    def check(*options: object) -> tuple[int, dict]:
        code = main(["data", "check", "--json", str(path), *map(str, options)])
        out = capsys.readouterr()
        return code, json.loads(out.out) if out.out else {"error": out.err}

    assert check()[1]["longest_prompt"] is None
    code, tree = check("--model", tiny_folder)
    assert (code, tree["longest_prompt"]) == (0, lengths[1])
    code, tree = check("--model", tiny_folder, "--max-prompt-tokens", lengths[0])
    assert (code, tree["longest_prompt"]) == (1, lengths[0])
    assert [(bad["row"], bad["got"]) for bad in tree["bad_rows"]] == [(1, f"{lengths[1]} tokens")]
    for options in (["--max-prompt-tokens", 5], ["--model", tiny_folder, "--max-prompt-tokens", 0]):
        code, tree = check(*options)
        assert code == 2 and "--max-prompt-tokens: expected a number from 1 on and --model" in tree["error"]


def test_images_for_a_model_that_reads_text_only_are_bad_rows(tmp_path: Path):
    def refuse(prompt):
        if prompt.images:
            raise DataError("the model reads text only")
        return 3

    path = write_rows(tmp_path / "set.parquet", ("math", [SMALL]), ("math", []))
    (bad,) = check_files([path], False, lambda: refuse, 15, processes=1).bad_rows
    assert (bad.row, bad.column, bad.got) == (0, "images", "the model reads text only")


def test_processes_find_what_one_finds_in_the_same_order(tmp_path: Path):
    rows = [(("music" if i % 5 == 3 else "math"), [encoded(9 + i, 9)] if i % 7 else [SMALL[:-30]]) for i in range(50)]
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.parquet", *rows)
    one = check_files([tmp_path], progress=False, processes=1)
    assert check_files([tmp_path], progress=False, processes=2) == one
    assert len(one.bad_rows) == 2 * len({i for i in range(50) if i % 5 == 3 or i % 7 == 0})


def _dies() -> Callable[[Prompt], int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_dies_is_one_line(tmp_path: Path):
    path = write_rows(tmp_path / "a.parquet", *[("math", [SMALL])] * 40)
    with pytest.raises(DataError, match="--processes 1"):
        check_files([path], progress=False, open_counter=_dies, max_prompt_tokens=9, processes=2)


def test_ctrl_c_stops_all_processes_without_a_traceback(tmp_path: Path):
    path = write_rows(tmp_path / "a.parquet", *[("math", [encoded(1500, 1500)])] * 3000)
    command = [sys.executable, "-m", "metis_fast", "data", "check", str(path), "--processes", "2"]

    def listen() -> None:  # which a background job of a shell does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for after_s in (0.0, 0.3, 1.0):
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, preexec_fn=listen
        ) as check:
            children = Path(f"/proc/{check.pid}/task/{check.pid}/children")
            while children.exists() and not children.read_text().strip() and check.poll() is None:
                time.sleep(0.02)  # not while it imports: there Python may lose a signal
            time.sleep(after_s)
            os.killpg(check.pid, signal.SIGINT)  # as a terminal does
            _, err = check.communicate(timeout=60)
        if check.returncode != -signal.SIGINT:  # before Python could take it
            assert check.returncode == 130 and err.decode().strip().splitlines()[-1].startswith("metis-fast: stopped")
            assert b"Traceback" not in err


def test_a_number_of_processes_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(tmp_path), "--processes", "0"]) == 2
    assert "--processes: expected a number from 1 on" in capsys.readouterr().err
