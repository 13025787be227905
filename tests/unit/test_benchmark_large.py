"""Files of many large images: a few rows are in memory at a time, of TSV and of Parquet."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metis_fast.evaluate.files.tsv import TsvTable

MIB = 2**20
PEAK = """
import os, re, sys
from pathlib import Path
# of this program: what getrusage says began with the memory of the process that started it
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
COLUMNS = ("index", "question", "A", "B", "answer", "category", "cycle_category")
READ = """
from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.files.reading import read
from metis_fast.pixels import size
before = peak()
questions = read(BENCHMARKS["hrbench8k"], [Path(sys.argv[1])], any_md5=True).questions
sizes = {size(image.data) for question in questions for image in question.images()}
print(len(questions), *sizes.pop(), len(sizes), peak() - before)
"""
PREPARE = """
from metis_fast.config import Config
from metis_fast.evaluate.promptset import prepare
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one thread that decodes, whatever the machine
before = peak()
files = {"hrbench8k": [sys.argv[1]]}
config = Config.model_validate({"run": {"dir": sys.argv[2]}, "benchmark": {"files": files, "any_md5": True}})
made = prepare(config, "hrbench8k", progress=False)
print(made.folder, sum(one.stat().st_size for one in made.folder.rglob("*")), peak() - before)
"""
PLAY = """
from metis_fast.data.parquet import PromptFiles
prompts = PromptFiles([Path(sys.argv[1]) / "prompts.parquet"], any_style=True)
before = peak()
print(len({prompts.read(row).images[0].sha256 for row in range(len(prompts))}), peak() - before)
"""


def test_a_tsv_of_many_megabytes_takes_the_memory_of_a_row(tmp_path: Path):
    image = base64.b64encode(Image.effect_noise((1000, 800), 80).tobytes()).decode()
    path = tmp_path / "a.tsv"
    with path.open("w") as file:
        file.write("index\timage\tquestion\n")
        file.writelines(f"{at}\t{image}\tWhich?\n" for at in range(40))
    tracemalloc.start()
    try:
        table = TsvTable(path)
        assert len(list(table.rows())) == 40
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 40 * MIB
    assert peak < 15 * MIB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the most memory that was used")
@pytest.mark.parametrize("form", ["tsv", "parquet"])
def test_rows_of_8k_images_stream(tmp_path: Path, form: str):
    out, rows = io.BytesIO(), 24
    Image.effect_noise((7680, 4320), 60).save(out, "JPEG", quality=80)
    texts = (base64.b64encode(out.getvalue() + bytes([at])).decode() for at in range(rows))  # no two are the same
    path = tmp_path / f"hr_bench_8k.{form}"
    cells = [(str(at), f"Which {at // 4}?", "one", "two", "A", "single", str(at % 4)) for at in range(rows)]
    if form == "tsv":
        with path.open("w") as file:
            file.write("\t".join((*COLUMNS, "image")) + "\n")
            file.writelines("\t".join((*cell, text)) + "\n" for cell, text in zip(cells, texts, strict=True))
    else:
        schema = pa.schema([(name, pa.string()) for name in (*COLUMNS, "image")])
        # one row group, with pages that are no larger than they have to be
        with pq.ParquetWriter(path, schema, use_dictionary=False, write_batch_size=1) as writer:
            table = [
                dict(zip((*COLUMNS, "image"), (*cell, text), strict=True)) for cell, text in zip(cells, texts, strict=True)
            ]
            writer.write_table(pa.Table.from_pylist(table, schema), row_group_size=rows)
            del table
    assert path.stat().st_size > 400 * MIB
    questions, width, height, others, kilobytes = map(int, _told(READ, str(path)))
    assert (questions, width, height, others) == (rows, 7680, 4320, 0)
    assert kilobytes * 1024 < 350 * MIB  # 23 MiB of base64 a row, of which csv holds four bytes a character


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the most memory that was used")
def test_prompts_of_8k_images_take_the_room_of_each_image_once(tmp_path: Path):
    out, images, orders = io.BytesIO(), 4, 4
    Image.effect_noise((7680, 4320), 60).save(out, "JPEG", quality=80)
    path = tmp_path / "HRBench8K.tsv"
    with path.open("w") as file:
        file.write("\t".join((*COLUMNS, "image")) + "\n")
        for row in range(images * orders):
            text = base64.b64encode(out.getvalue() + bytes([row % images])).decode()
            cell = (str(row), f"Which {row % images}?", "one", "two", "A", "single", str(row // images))
            file.write("\t".join((*cell, text)) + "\n")
    folder, on_disk, kilobytes = _told(PREPARE, str(path), str(tmp_path / "run"))
    assert int(on_disk) < images * len(out.getvalue()) + MIB
    assert int(kilobytes) * 1024 < 700 * MIB  # a row as csv holds it, and the pixels of two images
    distinct, kilobytes = _told(PLAY, folder)
    assert int(distinct) == images
    assert int(kilobytes) * 1024 < 4 * len(out.getvalue())  # a few copies of one image, and not those of all rows


def _told(program: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PEAK + program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()
