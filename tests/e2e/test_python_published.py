"""The Python session as the published checkpoints know it, with real processes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metis_fast.config import ToolsConfig
from metis_fast.errors import ToolSetupError
from metis_fast.rollout.protocols import Metis
from metis_fast.tools.results import PythonResult
from metis_fast.tools.toolbox import LocalToolbox
from metis_fast.types import ImageBlob


def encoded(image: Image.Image, kind: str = "PNG") -> ImageBlob:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return ImageBlob.of(buffer.getvalue())


PHOTO = encoded(Image.effect_noise((2048, 1536), 60).convert("RGB"), "JPEG")
LOGO = encoded(Image.linear_gradient("L").resize((60, 40)).convert("RGBA"))


def sizes(result: PythonResult) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(image.data)).size for image in result.images]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LocalToolbox]]:
    opened: dict[str, LocalToolbox] = {}
    try:
        for images in ("seen", "original"):
            tree: dict[str, Any] = {
                "enabled": ["python"],
                "python": {"images": images, "max_output_chars": 2000, "timeout_s": 60},
            }
            opened[images] = LocalToolbox.open(ToolsConfig.model_validate(tree), tmp_path_factory.mktemp(images))
    except ToolSetupError as error:
        pytest.skip(str(error))
    yield opened
    for box in opened.values():
        box.close()


def run(box: LocalToolbox, *codes: str, seen: tuple[tuple[int, int], ...] = ((2048, 1536), (320, 224))) -> list[PythonResult]:
    async def calls() -> list[PythonResult]:
        session = box.session((PHOTO, LOGO), {}, seen)
        try:
            results = [await session.call("python", {"code": code}) for code in codes]
        finally:
            await session.close()
        assert all(isinstance(result, PythonResult) for result in results)
        return results  # pyright: ignore[reportReturnType]

    return asyncio.run(calls())


def test_names_are_ready(boxes: dict[str, LocalToolbox]) -> None:
    code = "print(np.pi, math.pi, sin(0), cos(0), os.sep, base64.b64encode(b'x'), Image.new('RGB', (1, 2)).size, BytesIO)"
    (result,) = run(boxes["original"], code)
    assert result.ok and result.stdout.startswith("3.14159") and "(1, 2)" in result.stdout
    plotting = "plt.figure(figsize=(2, 1)); plt.plot([1, 2])"
    saved = "plt.savefig(file := BytesIO(), bbox_inches='tight'); print(*Image.open(file).size)"
    (plot,) = run(boxes["original"], f"%matplotlib inline\n{plotting}; {saved}; plt.show()")
    assert plot.ok and sizes(plot) == [tuple(map(int, plot.stdout.split()))] and plot.stderr == ""
    (wrong,) = run(boxes["original"], "%timeit 1")
    assert not wrong.ok and "SyntaxError" in wrong.stderr


def test_a_session_goes_on_after_exit_as_it_was(boxes: dict[str, LocalToolbox]) -> None:
    """`exit()` closes stdin, too."""
    before, ended, after = run(boxes["original"], "input()", "x = 1\nexit()", "print(x)\ninput()")
    assert "EOFError" in before.stderr and "EOFError" in after.stderr and after.stdout == "1\n"
    assert ended.stdout == ""
    codes = [
        "import sys\nfrom io import StringIO\nsys.stdin = StringIO('7')",
        "print(input())\nsys.stdin = 3",
        "2\n",
        "del sys.stdin",
    ]
    assert [result.stdout for result in run(boxes["original"], *codes, "print('on')")] == ["", "7\n", "2", "", "on\n"]


@pytest.mark.parametrize("where", ["3e4, 3e4, 'far'", "300, 300, 'far', transform=plt.gca().transAxes"])
def test_a_figure_with_text_far_outside_is_shown_as_it_is(boxes: dict[str, LocalToolbox], where: str) -> None:
    (result,) = run(boxes["original"], f"plt.figure(figsize=(2, 1)).add_subplot().text({where})\nplt.show()\nprint('shown')")
    assert result.ok and sizes(result) == [(200, 100)] and result.stdout == "shown\n"


def test_a_name_that_the_agent_took_stays_its_own(boxes: dict[str, LocalToolbox]) -> None:
    results = run(boxes["original"], "math = 3", "print(math)", "p" + "lt = 4\nprint(p" + "lt)", "print(plt, 'plt')")
    assert [result.stdout for result in results] == ["", "3\n", "4\n", "4 plt\n"]


def test_children_know_the_names_too(boxes: dict[str, LocalToolbox]) -> None:
    code = (
        "import multiprocessing\ndef area(n):\n    return n * math.pi\n"
        "with multiprocessing.get_context('spawn').Pool(1) as pool:\n    print(pool.map(area, [1]))"
    )
    (result,) = run(boxes["original"], code)
    assert result.ok and result.stdout == "[3.141592653589793]\n", result


def test_streams_are_apart_and_a_value_has_no_line_break(boxes: dict[str, LocalToolbox]) -> None:
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('more')\n6 * 7"
    (result, failed) = run(boxes["original"], code, "print('before')\n1 / 0")
    assert (result.stdout, result.stderr) == ("out\nmore\n42", "err\n")
    assert result.parts == ("out\nerr\nmore\n42\n",)
    assert failed.stdout == "before\n" and not failed.ok
    assert failed.stderr.startswith("Traceback") and failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert Metis().word(result).text == ("Code execution result:\nstdout:\n```\nout\nmore\n42\n```\n\nstderr:\n```\nerr\n\n```")


def test_what_children_print_counts_as_stdout(boxes: dict[str, LocalToolbox]) -> None:
    (result,) = run(
        boxes["original"], "import sys\nprint('a', file=sys.stderr)\nsys.stderr.flush()\nos.system('true')\nprint('b')"
    )
    assert (result.stdout, result.stderr) == ("b\n", "a\n")


def test_a_call_that_is_stopped_has_both_streams_and_a_note(tmp_path: Path) -> None:
    tree = {"enabled": ["python"], "python": {"timeout_s": 1.0}}
    try:
        box = LocalToolbox.open(ToolsConfig.model_validate(tree), tmp_path)
    except ToolSetupError as error:
        pytest.skip(str(error))
    try:
        slow, after = run(box, "import sys\nprint('o')\nprint('e', file=sys.stderr)\nwhile True: pass", "1")
    finally:
        box.close()
    assert (slow.stdout, slow.stderr, slow.ok) == ("o\n", "e\n", False)
    assert slow.note == "[Timed out after 1 s. The Python session was stopped; the next call starts a new one.]"
    assert after.note == "[new Python session: earlier variables are gone]" and after.stdout == "1" and after.ok
    assert Metis().word(slow).text.endswith("stderr:\n```\ne\n" + slow.note + "\n```")


def test_images_are_as_the_model_sees_them_or_as_they_are(boxes: dict[str, LocalToolbox]) -> None:
    code = "print(image_1.size, image_1.mode, image_2.size, image_2.mode)"
    (seen,) = run(boxes["seen"], code)
    (original,) = run(boxes["original"], code)
    assert seen.stdout == "(2048, 1536) RGB (320, 224) RGB\n"
    assert original.stdout == "(2048, 1536) RGB (60, 40) RGB\n"


def test_a_seen_image_has_the_pixels_that_the_model_gets(boxes: dict[str, LocalToolbox]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from metis_fast.pictures import ImagePreparer

    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 1 << 20})
    images = ImagePreparer(processor)
    size = (images.seen(PHOTO), images.seen(LOGO))
    assert size[0] != (2048, 1536)
    (result,) = run(boxes["seen"], "image_1.show()\nimage_2.show()", seen=size)
    for shown, image in zip(result.images, (PHOTO, LOGO), strict=True):
        expected = Image.fromarray(images.picture(image).pixels.numpy())
        assert Image.open(io.BytesIO(shown.data)).tobytes() == expected.tobytes()


def test_a_large_image_is_scaled_and_none_is_dropped_without_a_word(boxes: dict[str, LocalToolbox]) -> None:
    code = "Image.new('RGB', (4000, 3000)).show()\nImage.new('RGB', (2000, 2000)).show()\nImage.new('RGB', (9000, 10)).show()"
    large, many = run(boxes["original"], code, "for i in range(11): Image.new('RGB', (2, 2)).show()\nprint('end')")
    (width, height), *others = sizes(large)
    assert 5_200_000 < width * height <= 5_242_880 and abs(width / height - 4 / 3) < 0.01
    assert others == [(2000, 2000), (4096, 5)]
    assert len(many.images) == 8 and many.stdout == "end\n\n... 3 more images not shown ..."
    assert Metis().word(many).text.endswith("Images:\n" + "<image>" * 8)


def test_display_shows_images_and_figures_and_prints_everything_else(boxes: dict[str, LocalToolbox]) -> None:
    code = "f = plt.figure(figsize=(2, 1))\ndisplay(image_2, 'a', f)\nf"
    (result,) = run(boxes["original"], code)
    assert sizes(result) == [(60, 40), (200, 100), (200, 100)] and result.stdout == "'a'\n"


def test_figures_that_a_call_leaves_open_are_shown_at_its_end_and_closed(boxes: dict[str, LocalToolbox]) -> None:
    """As in a notebook. One that the call has displayed is not shown twice, and none outlives its call."""
    figure = "f = plt.figure(figsize=({}, 1))\n"
    codes = [
        figure.format(2) + figure.format(3) + "print('drawn')",  # no plt.show()
        "plt.show()",  # nothing is left
        figure.format(2) + "plt.show()",
        figure.format(2) + figure.format(3) + "plt.close()",  # the later one
        figure.format(2) + "display(f)\n" + figure.format(3) + "f",
        figure.format(4) + "1 / 0",
        "2",  # the failed call's is gone
        figure.format(2) + "import os\nif os.fork() == 0: pass\nelse: os.wait()",
    ]
    results = run(boxes["original"], *codes)
    wide = [[width // 100 for width, _ in sizes(result)] for result in results]
    assert wide == [[2, 3], [], [2], [2], [2, 3], [], [], [2]]
    assert results[0].stdout == "drawn\n" and results[6].stdout == "2" and all(not r.stderr for r in results[:5])
