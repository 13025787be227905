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
COLUMNS = ("index", "question", "A", "B", "answer", "category", "cycle_category")
READ = """
import re, sys
from pathlib import Path
from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.files.reading import read
from metis_fast.pixels import size
# of this program: what getrusage says began with the memory of the process that started it
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
questions = read(BENCHMARKS["hrbench8k"], [Path(sys.argv[1])], any_md5=True).questions
sizes = {size(image.data) for question in questions for image in question.images()}
print(len(questions), *sizes.pop(), len(sizes), peak() - before)
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
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    questions, width, height, others, kilobytes = map(int, done.stdout.split())
    assert (questions, width, height, others) == (rows, 7680, 4320, 0)
    assert kilobytes * 1024 < 350 * MIB  # 23 MiB of base64 a row, of which csv holds four bytes a character
