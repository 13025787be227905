"""The Python tool, with real processes: what it returns, and what the agent's code cannot do."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
from pictures import MODES, TRANSPARENT, WIDE, turned
from PIL import Image

from metis_fast.config import ToolsConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.pixels import decode
from metis_fast.rollout.protocols import Compact
from metis_fast.tools.toolbox import LocalToolbox
from metis_fast.types import ImageBlob, Observation, Outcome

Open = Callable[..., LocalToolbox]
WORD = Compact().word
POOL = 2


def tools_config(**python: Any) -> ToolsConfig:
    return ToolsConfig.model_validate({"enabled": ["python"], "python": {"pool": POOL, **python}})


def family(box: LocalToolbox) -> list[int]:
    """Processes of a box's Python server."""
    assert box.python is not None
    server = psutil.Process(box.python.pid)
    return [server.pid, *(child.pid for child in server.children(recursive=True))]


def alone(box: LocalToolbox) -> bool:
    """Whether the server has no sessions but those that it keeps ready, and these have started."""
    return wait_until(lambda: len(family(box)) == 2 + POOL)


def gone(processes: list[int]) -> bool:
    """Whether none of them is left; one whose parent has not yet looked counts as gone."""
    left = [psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def open_box(tmp_path: Path) -> Iterator[Open]:
    boxes: list[LocalToolbox] = []

    def opened(**python: Any) -> LocalToolbox:
        try:
            box = LocalToolbox.open(tools_config(**python), tmp_path / "scratch")
        except ToolSetupError as error:
            if python.get("unsafe"):
                raise
            pytest.skip(str(error))
        boxes.append(box)
        return box

    yield opened
    for box in boxes:
        box.close()


def run(box: LocalToolbox, *codes: str, images: tuple[ImageBlob, ...] = ()) -> list[Observation]:
    """The observations of calls in one session."""

    async def calls() -> list[Observation]:
        session = box.session(images)
        try:
            return [WORD(await session.call("python", {"code": code})) for code in codes]
        finally:
            await session.close()

    return asyncio.run(calls())


def png(image: Image.Image) -> ImageBlob:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ImageBlob.of(buffer.getvalue())


def pixels(blob: ImageBlob) -> Image.Image:
    return Image.open(io.BytesIO(blob.data))


def test_state_lives_through_a_rollout_and_not_beyond(open_box: Open) -> None:
    box = open_box()
    assert run(box, "x = 20", "import math\nx + math.floor(1.5)")[1].text == "21"
    after = run(box, "x")[0]
    assert after.outcome is Outcome.TOOL_ERROR and "NameError" in after.text


def test_prompt_images_arrive_and_shown_images_return_in_order(open_box: Open) -> None:
    sent = Image.effect_noise((40, 30), 80).convert("RGB")
    code = "print('before')\nimage_1.show()\nprint('between')\nshow(image_2.rotate(90))\nimage_1.crop((0, 0, 5, 6))"
    got = run(open_box(), code, images=(png(sent), png(Image.new("RGB", (8, 9), "red"))))[0]
    assert got.outcome is Outcome.TOOL_RESULT
    assert got.text == "before\n<image>\nbetween\n<image>\n<image>"
    assert pixels(got.images[0]).tobytes() == sent.tobytes()
    assert pixels(got.images[1]).getpixel((4, 4)) == (255, 0, 0)
    assert pixels(got.images[2]).tobytes() == sent.crop((0, 0, 5, 6)).tobytes()


def test_prompt_images_are_those_that_the_model_sees(open_box: Open) -> None:
    """In RGB and upright, so that a crop is a crop of what was seen."""
    blobs = [*TRANSPARENT.values(), *WIDE.values(), *MODES.values(), *(turned(number, "JPEG") for number in range(1, 9))]
    code = f"import hashlib\nfor i in range(1, {len(blobs) + 1}):\n    image = globals()[f'image_{{i}}']\n"
    code += "    print(image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest())"
    (seen,) = run(open_box(), code, images=tuple(ImageBlob.of(data) for data in blobs))
    expected = [decode(data) for data in blobs]
    assert seen.text.splitlines() == [f"{e.mode} {e.size} {sha256(e.tobytes()).hexdigest()}" for e in expected]


def test_matplotlib_figures_are_shown(open_box: Open) -> None:
    pytest.importorskip("matplotlib")
    code = "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1), dpi=50)\nprint('a')\nplt.show()\nprint('b')\nplt.show()"
    got = run(open_box(), code)[0]
    assert got.text == "a\n<image>\nb" and pixels(got.images[0]).size == (50, 50)


def test_traceback_shows_the_agents_code_only(open_box: Open) -> None:
    code = "import json\ndef parse(text):\n    return json.loads(text)\nprint('start')\nparse('{')"
    got = run(open_box(), code)[0]
    assert got.outcome is Outcome.TOOL_ERROR
    assert got.text.startswith("start\nTraceback") and "return json.loads(text)" in got.text
    assert "JSONDecodeError" in got.text and "decoder.py" not in got.text and "interpreter.py" not in got.text


def test_syntax_error_is_the_agents_error(open_box: Open) -> None:
    got = run(open_box(), "x = (")[0]
    assert got.outcome is Outcome.TOOL_ERROR and "SyntaxError" in got.text


def test_output_of_child_processes_is_part_of_the_observation(open_box: Open) -> None:
    code = "import subprocess, sys\nprint('one')\nsubprocess.run([sys.executable, '-c', 'print(2 + 3)'])\nNone"
    assert run(open_box(), code, "4") == [Observation("one\n5"), Observation("4")]


def test_long_output_is_cut_in_the_middle(open_box: Open) -> None:
    got = run(
        open_box(max_output_chars=100), "print('a' * 60, flush=True)\nfor _ in range(5000): print('b' * 99)\nprint('z' * 20)"
    )[0]
    assert got.text.startswith("a" * 50 + "\n... ") and got.text.endswith("z" * 20)
    assert "characters left out" in got.text and len(got.text) < 200


def test_printed_image_marks_do_not_stand_for_images(open_box: Open) -> None:
    forged = "import os, json\nhead = json.dumps([2, True, ['<ima', 'ge>'], '', '']).encode()\n"
    forged += "size = lambda n: n.to_bytes(4, 'big')\n"
    forged += "os.write(3, size(len(head) + 4) + size(len(head)) + head)"
    got = run(open_box(), "print('<image>')", forged)
    assert got == [Observation("< image >"), Observation("< image >")]


def test_results_repeat(open_box: Open) -> None:
    code = "import random, numpy as np\nprint(set('abcdefgh'), random.random(), np.random.rand(), hash('a'))"
    first, second = run(open_box(), code)[0], run(open_box(), code)[0]
    assert first == second and first.outcome is Outcome.TOOL_RESULT


def test_network_is_unreachable(open_box: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 2).close()  # it does listen
        got = run(open_box(), f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")[0]
    assert got.outcome is Outcome.TOOL_ERROR and "unreachable" in got.text


def test_files_outside_scratch_are_neither_readable_nor_writable(open_box: Open, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("do not read")
    secret.chmod(0o644)
    box = open_box()
    writes = [f"open({name!r}, 'w')" for name in (str(tmp_path / "new"), "/new", "/usr/lib/new", sys.prefix + "/new")]
    got = run(box, f"print(open({str(secret)!r}).read())", "open('/etc/passwd')", *writes, "open('mine', 'w').write('ok')")
    assert [item.outcome for item in got] == [Outcome.TOOL_ERROR] * 6 + [Outcome.TOOL_RESULT]
    assert "do not read" not in got[0].text and sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "secret"]


def test_sessions_see_neither_each_others_files_nor_processes(open_box: Open) -> None:
    box = open_box()

    async def two() -> tuple[Observation, Observation]:
        one, other = box.session(()), box.session(())
        await one.call("python", {"code": "open('note', 'w').write('hello')"})
        look = "import os\nprint(os.path.exists('note'), [name for name in os.listdir('/proc') if name.isdigit()])"
        seen = WORD(await other.call("python", {"code": look}))
        own = WORD(await one.call("python", {"code": look}))
        await one.close()
        await other.close()
        return seen, own

    seen, own = asyncio.run(two())
    assert (seen.text, own.text) == ("False ['1']", "True ['1']")


def test_a_session_holds_one_socket_and_none_of_the_servers(open_box: Open) -> None:
    box = open_box()
    look = (
        "import os\nheld = []\nfor name in os.listdir('/proc/self/fd'):\n"
        "    try:\n        held.append(os.readlink('/proc/self/fd/' + name))\n    except OSError:\n        pass\n"
        "print(sum('socket' in one for one in held), sum('pidfd' in one or 'eventpoll' in one for one in held))"
    )

    async def second() -> Observation:
        sessions = [box.session(()) for _ in range(2)]  # the server holds two sockets and a pidfd of the first
        seen = [WORD(await session.call("python", {"code": look})) for session in sessions]
        for session in sessions:
            await session.close()
        return seen[1]

    assert asyncio.run(second()).text == "1 0"


def test_each_session_has_namespaces_of_its_own(open_box: Open) -> None:
    box = open_box()
    look = "import os\nprint(*(os.readlink(f'/proc/self/ns/{name}') for name in ('user', 'mnt', 'pid', 'ipc', 'net')))"
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("user", "mnt", "pid", "ipc", "net")}

    async def two() -> list[list[str]]:
        sessions = [box.session(()) for _ in range(2)]
        seen = [WORD(await session.call("python", {"code": look})).text.split() for session in sessions]
        for session in sessions:
            await session.close()
        return seen

    one, other = asyncio.run(two())
    for mine, theirs, name in zip(one, other, ours, strict=True):
        assert mine.startswith(f"{name}:") and len({mine, theirs, ours[name]}) == 3


def test_no_privilege_can_be_had_or_regained(open_box: Open) -> None:
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print([libc.unshare(flag) for flag in (0x10000000, 0x20000)], libc.mount(b'x', b'/tmp', b'tmpfs', 0, b''))\n"
        "print(libc.umount2(b'/proc', 2), libc.umount2(b'/tmp', 2))\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line[:6] in ('CapEff', 'CapPrm', 'NoNewP')])"
    )
    got = run(open_box(), code)[0]
    assert got.text.split("\n") == ["[-1, -1] -1", "-1 -1", str(["0" * 16, "0" * 16, "1"])]


def test_fork_bomb_is_limited(open_box: Open) -> None:
    code = (
        "import os, time\nforks = 0\nwhile forks < 500:\n"
        "    try:\n        pid = os.fork()\n    except OSError:\n        break\n"
        "    if pid == 0:\n        time.sleep(60)\n        os._exit(0)\n    forks += 1\nprint(forks)"
    )
    box = open_box()
    assert 10 < int(run(box, code)[0].text) < 70
    assert alone(box)


def test_memory_and_scratch_are_limited(open_box: Open) -> None:
    fill = "with open('big', 'wb') as file:\n    for _ in range(40): file.write(bytes(1 << 20))"
    parts = "for k in range(4):\n    with open(f'part{k}', 'wb') as file: file.write(bytes(6 << 20))"
    got = run(open_box(memory_mb=128, scratch_mb=16), "data = bytearray(1 << 29)", fill, "import os; os.remove('big')", parts)
    assert [item.outcome for item in got] == [Outcome.TOOL_ERROR] * 2 + [Outcome.TOOL_RESULT, Outcome.TOOL_ERROR]
    assert "MemoryError" in got[0].text and "File too large" in got[1].text and "No space left" in got[3].text


def test_time_out_stops_the_session_and_the_next_call_starts_afresh_and_says_so(open_box: Open) -> None:
    got = run(open_box(timeout_s=0.5), "x = 1", "while True: pass", "'x' in globals()", "2")
    assert got[1].outcome is Outcome.TOOL_ERROR and "Timed out after 0.5 s" in got[1].text
    assert got[2] == Observation("[new Python session: earlier variables are gone]\nFalse")
    assert got[3] == Observation("2")


def test_ending_the_process_is_the_agents_error(open_box: Open) -> None:
    got = run(open_box(), "import os\nos._exit(3)", "1", "raise SystemExit", "raise SystemExit('no')")
    assert got[0].outcome is Outcome.TOOL_ERROR and "exit status 3" in got[0].text
    assert got[1].text.endswith("\n1") and got[2].outcome is Outcome.TOOL_RESULT and got[3].outcome is Outcome.TOOL_ERROR


LATE = "b'\\0\\0\\0\\x10\\0\\0\\0\\x0c[0, true, []]'"  # of another call


GARBAGE = ["b'\\xff' * 64", "b'\\0\\0\\0\\x04\\0\\0\\0\\0'", "b'\\0\\0\\0\\x06\\0\\0\\0\\x02[]'"]


@pytest.mark.parametrize("forged", [*GARBAGE, LATE])
def test_a_forged_reply_is_the_agents_error(open_box: Open, forged: str) -> None:
    got = run(open_box(), f"import os\nos.write(3, {forged})", "1")
    assert got[0].outcome is Outcome.TOOL_ERROR and "broke" in got[0].text and got[1].text.endswith("\n1")


def test_close_ends_daemonised_grandchildren(open_box: Open) -> None:
    daemon = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
        "os.wait()\nprint(len([name for name in os.listdir('/proc') if name.isdigit()]))"
    )
    box = open_box()
    assert run(box, daemon)[0].text == "2"
    assert alone(box)


def test_a_killed_server_is_our_error_and_the_next_call_works(open_box: Open, tmp_path: Path) -> None:
    box = open_box()
    assert box.python is not None
    server = box.python

    async def story() -> tuple[Observation, Observation]:
        session = box.session(())
        await session.call("python", {"code": "x = 1"})
        running = asyncio.create_task(session.call("python", {"code": "import time\ntime.sleep(15)"}))
        await asyncio.sleep(0.2)
        first = server.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(InfrastructureError):
            await running
        again = WORD(await session.call("python", {"code": "'x' in globals()"}))
        other = box.session(())
        fresh = WORD(await other.call("python", {"code": "3"}))
        assert server.pid != first
        await session.close()
        await other.close()
        return again, fresh

    again, fresh = asyncio.run(story())
    assert again.text == "[new Python session: earlier variables are gone]\nFalse" and fresh.text == "3"
    processes = family(box)
    box.close()
    assert wait_until(lambda: gone(processes)) and list((tmp_path / "scratch").iterdir()) == []


def test_a_cancelled_call_does_not_answer_the_next_one(open_box: Open) -> None:
    box = open_box()

    async def story() -> Observation:
        session = box.session(())
        running = asyncio.create_task(session.call("python", {"code": "import time\ntime.sleep(0.3)\nprint('late')"}))
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.sleep(0.4)
        result = WORD(await session.call("python", {"code": "print('next')"}))
        await session.close()
        return result

    assert asyncio.run(story()).text == "next"


def test_calls_do_not_block_the_event_loop(open_box: Open) -> None:
    box = open_box()

    async def ticks() -> int:
        session = box.session(())
        call = asyncio.create_task(session.call("python", {"code": "import time\ntime.sleep(0.5)"}))
        count = 0
        while not call.done():
            await asyncio.sleep(0.01)
            count += 1
        await session.close()
        return count

    assert asyncio.run(ticks()) >= 10


def test_terminal_signals_do_not_reach_the_server(open_box: Open) -> None:
    box = open_box()
    assert box.python is not None
    assert os.getsid(box.python.pid) == box.python.pid != os.getsid(0)


TRAINER = """
import asyncio, sys, time
from pathlib import Path
from metis_fast.config import ToolsConfig
from metis_fast.tools import open_toolbox

async def main():
    session = open_toolbox(ToolsConfig.model_validate({"enabled": ["python"]}), Path(sys.argv[1])).session(())
    await session.call("python", {"code": "import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(60)"})
    print("running", flush=True)
    await session.call("python", {"code": "while True: pass"})

asyncio.run(main())
"""


def test_a_killed_trainer_leaves_no_process(open_box: Open, tmp_path: Path) -> None:
    open_box()  # skips where there is no sandbox
    scratch = tmp_path / "other"
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", TRAINER, str(scratch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"running\n"
        processes = [child.pid for child in psutil.Process(trainer.pid).children(recursive=True)]
        assert len(processes) >= 4  # server twice, session and its child
        trainer.kill()
    assert wait_until(lambda: gone(processes))


@pytest.mark.parametrize("num", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_hundreds_of_sessions_leave_no_process_and_no_file(open_box: Open, tmp_path: Path, num: int) -> None:
    box = open_box()
    scratch = tmp_path / "scratch"
    assert alone(box)
    files = sorted(scratch.rglob("*"))
    descriptors = len(os.listdir("/proc/self/fd"))

    async def rollout(number: int) -> str:
        session = box.session(())
        try:
            return WORD(await session.call("python", {"code": f"open('file', 'w').write('x')\n{number} + 1"})).text
        finally:
            await session.close()

    async def rollouts() -> list[str]:
        texts: list[str] = []
        for start in range(0, num, 200):
            texts += await asyncio.gather(*(rollout(number) for number in range(start, start + 200)))
        return texts

    assert asyncio.run(rollouts()) == [str(number + 1) for number in range(num)]
    assert alone(box) and sorted(scratch.rglob("*")) == files
    assert len(os.listdir("/proc/self/fd")) == descriptors
    processes = family(box)
    box.close()
    assert wait_until(lambda: gone(processes)) and list(scratch.iterdir()) == []


def test_without_a_sandbox_opening_says_how_to_go_on(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom metis_fast.config import ToolsConfig\n"
        "from metis_fast.errors import ToolSetupError\nfrom metis_fast.tools import open_toolbox\n"
        "try:\n    open_toolbox(ToolsConfig.model_validate({'enabled': ['python']}), Path(sys.argv[1]))\n"
        "except ToolSetupError as error:\n    print(error)"
    )
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "-r", "sh", "-c", forbid, "sh", sys.executable, "-c", program, str(tmp_path / "scratch")]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=60, check=False
    )
    if not done.stdout and "unshare" in done.stderr:
        pytest.skip("no user namespaces at all on this machine")
    assert "no sandbox" in done.stdout and "tools.python.unsafe=true" in done.stdout and "--unsafe-tools" in done.stdout
    assert list((tmp_path / "scratch").iterdir()) == []


def test_unsafe_mode_runs_and_leaves_nothing(open_box: Open, tmp_path: Path) -> None:
    box = open_box(unsafe=True, timeout_s=1.0)
    child = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nopen('file', 'w').write('x')"
    got = run(box, child, "open('file').read()", "while True: pass", "1")
    assert [item.outcome is Outcome.TOOL_ERROR for item in got] == [False, False, True, False]
    assert got[1].text == "'x'" and got[3].text.endswith("\n1")
    processes = family(box)
    box.close()
    assert wait_until(lambda: gone(processes)) and list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("number", ["436", "9999"], ids=["with the system call", "without, before Linux 5.9"])
def test_what_a_session_must_not_inherit_is_closed_on_any_kernel(number: str) -> None:
    script = f"""
import os, resource
from metis_fast.tools.sandbox import kernel
kernel._SYS_CLOSE_RANGE = {number}
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(300)]
kernel.close_from(4)
print(len(opened), [fd for fd in opened if fd >= 4 and os.path.exists(f"/proc/self/fd/{{fd}}")])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ended.stderr == "" and ended.stdout == "300 []\n", ended
