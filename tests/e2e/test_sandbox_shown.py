"""What the agent is shown of its calls of the Python tool: warnings and errors of its own lines, plots, text that was cut."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from python_calls import Run, observations, serve

from metis_fast.tools.python_tool import PythonServer
from metis_fast.tools.sandbox.transcript import Transcript, transcript_size
from metis_fast.types import Observation


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    yield from serve(tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def run(server: PythonServer) -> Run:
    """The observations of calls in one session."""

    return partial(observations, server)


# -- warnings and paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("warnings.warn('w')", "UserWarning: w"),
        ("warnings.warn('w', stacklevel=2)", "UserWarning: w"),
        ("warnings.warn('w', stacklevel=9)", "UserWarning: w"),
        ("warnings.warn('w', DeprecationWarning)", "DeprecationWarning: w"),
        ("x = 1 is 1", 'SyntaxWarning: "is" with a literal. Did you mean "=="?'),
        ("numpy.log(numpy.zeros(1))[0] * 0 and None", "RuntimeWarning: divide by zero encountered in log"),
        ("(lambda: warnings.warn('w', stacklevel=2))()", "UserWarning: w"),
        (
            "np.ma.masked_array([1.0], [True]).mean() + float(np.ma.masked) and None",
            "UserWarning: Warning: converting a masked element to nan.",
        ),
    ],
)
def test_a_warning_names_the_line_of_the_call_and_comes_again_in_the_next(run: Run, line: str, shown: str) -> None:
    code = f"import warnings, numpy\nimport numpy as np\n{line}"
    for number, got in enumerate(run(code, code), start=1):
        assert got.text.startswith(f"<call {number}>:3: {shown}\n  {line}")
        assert "metis_fast" not in got.text and "site-packages" not in got.text


def test_a_warning_where_the_agents_folder_is_gone_is_no_error(run: Run) -> None:
    assert run("import os, warnings\nos.mkdir('d'); os.chdir('d'); os.rmdir('../d')\nwarnings.warn('w')") == [
        Observation("<call 1>:3: UserWarning: w\n  warnings.warn('w')")
    ]


FAIL = "import json, traceback\ndef fail(x): return json.loads('x')\n"


@pytest.mark.parametrize(
    "code",
    [
        "from multiprocessing import Process\nchild = Process(target=fail, args=(1,)); child.start(); child.join()",
        "from multiprocessing import Pool\nwith Pool(1) as pool: pool.map(fail, [1])",
        "import logging\ntry: fail(1)\nexcept ValueError: logging.exception('x')",
        "try: fail(1)\nexcept ValueError: traceback.print_exc()",
    ],
    ids=["Process", "Pool", "logging", "traceback"],
)
def test_whoever_shows_an_error_shows_the_agents_lines_only(run: Run, code: str) -> None:
    (got,) = run(FAIL + code)
    assert "JSONDecodeError" in got.text and 'File "<call 1>", line 2, in fail' in got.text
    assert all(name.startswith("<call ") for name in re.findall(r'File "([^"]*)"', got.text))


def test_a_file_that_the_agent_wrote_is_its_own(run: Run) -> None:
    (got,) = run("open('mine.py', 'w').write('def fail():\\n    1 / 0\\n')\nimport mine\nmine.fail()")
    assert 'mine.py", line 2, in fail\n    1 / 0' in got.text


PLOT = "import matplotlib\n{}\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\n"


@pytest.mark.parametrize("choose", ["", "matplotlib.use('Agg')"])
def test_plots_are_shown_whatever_back_end_is_asked_for(run: Run, choose: str) -> None:
    (got,) = run(PLOT.format(choose) + "plt.show()")
    assert got.text == "<image>" and len(got.images) == 1


def test_a_process_that_the_agent_starts_can_plot(run: Run) -> None:
    script = PLOT.format("") + "plt.savefig('a.png')"
    code = f"import subprocess, sys\nopen('s.py', 'w').write({script!r})\nsubprocess.run([sys.executable, 's.py']).returncode"
    assert run(code) == [Observation("0")]


def test_groups_of_errors_show_the_agents_lines_only(run: Run) -> None:
    code = "import asyncio, json\nasync def parse(): json.loads('x')\nasync def main():\n"
    code += "    async with asyncio.TaskGroup() as group: group.create_task(parse())\nasyncio.run(main())"
    nest = "import json\ntry: json.loads('x')\n"
    nest += "except ValueError as e: raise ExceptionGroup('a', [ExceptionGroup('b', [e])]) from None"
    for got in run(code, nest):
        files = set(re.findall(r'File "([^"]*)"', got.text))
        assert "JSONDecodeError" in got.text and files and all(name.startswith("<call ") for name in files)


def test_the_path_of_imports_holds_only_what_the_sandbox_has(run: Run) -> None:
    code = "import os, sys\n[path for path in sys.path[1:] if not path.endswith('.zip') and not os.listdir(path)]"
    got, listed = run(code, "print('\\n'.join(sys.path))")
    assert got == Observation("[]") and str(Path(__file__).parents[2]) not in listed.text.split("\n")


def test_nothing_that_the_agent_is_shown_names_our_files(run: Run) -> None:
    look = [
        "import inspect, logging, sys, traceback\nlogging.basicConfig(format='%(pathname)s %(message)s')",
        "print([frame.filename for frame in inspect.stack()])",
        "traceback.print_stack()",
        "logging.warning('x')",
        "print(sys.argv, sys.orig_argv[1:], globals())",
        "def f():\n    return 1\nprint(inspect.getsource(f), inspect.getfile(f))",
        "try:\n    1 / 0\nexcept ZeroDivisionError: traceback.print_exc()",
        "raise ValueError",
    ]
    (got,) = run("\n".join(look))
    assert "metis_fast/" not in got.text and "['<call 1>', '<string>']" in got.text and "[''] []" in got.text
    assert "return 1\n <call 1>" in got.text and got.text.endswith("ValueError")


# -- transcripts ----------------------------------------------------------------------------------------------------------


def expected(items: list[str | int], limit: int) -> str:
    text = "".join(item for item in items if isinstance(item, str))
    if len(text) <= limit:
        return text
    half = limit // 2
    return (
        f"{text[: limit - half]}\n... {len(text) - limit} characters left out ...\n{text[len(text) - half :] if half else ''}"
    )


@given(
    limit=st.integers(1, 40),
    items=st.lists(st.one_of(st.text("aé☃😀\n", max_size=60), st.just(0)), max_size=12),
)
@settings(max_examples=200)
def test_a_transcript_keeps_the_ends_of_the_text_and_the_place_of_every_image(limit: int, items: list[str | int]) -> None:
    memory = bytearray(transcript_size(limit))
    transcript, images = Transcript(memoryview(memory), limit), 0
    transcript.begin(1)
    for item in items:
        if isinstance(item, str):
            transcript.write(item.encode())
        else:
            images += transcript.add_image()
    for reader in (transcript, Transcript(memoryview(memory), limit)):  # the writer, and whoever finds the memory
        parts = reader.parts()
        text = "".join(part for part in parts if isinstance(part, str))
        more = items.count(0) - images
        assert text == expected(items, limit) + (f"\n... {more} more images not shown ...\n" if more else "")
        assert [part for part in parts if isinstance(part, int)] == list(range(images))
    if sum(len(item) for item in items if isinstance(item, str)) <= limit:
        place, before = [], ""
        for part in transcript.parts():
            if isinstance(part, int):
                place.append(before)
            else:
                before += part
        meant, before = [], ""
        for item in items:
            if item == 0:
                meant.append(before)
            else:
                before += str(item)
        assert place == meant[:images]


@given(st.binary(min_size=transcript_size(20), max_size=transcript_size(20)), st.binary(max_size=50))
@settings(max_examples=100)
def test_a_forged_transcript_is_read_without_an_error(memory: bytes, more: bytes) -> None:
    transcript = Transcript(memoryview(bytearray(memory)), 20)
    transcript.write(more)
    assert sum(len(part) for part in transcript.parts() if isinstance(part, str)) < 20 + 120
