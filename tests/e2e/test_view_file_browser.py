"""The page as one file in a real browser: from the disk, with several runs, hostile text and images, and every way between its
pages."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator

import pytest
from browsing import ENTER, MISSING, NO_AXE, Page, browser
from view_runs import Maker, write_run

from metis_fast.rollout.store import RolloutStore
from metis_fast.types import ImageBlob, ScoredGroup
from metis_fast.view.file import write_file
from metis_fast.view.run import open_runs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING or "all is here")]

OWNED = "document.title='owned'"
HOSTILE = f"</script><script>{OWNED}</script><!-- ]]></style></pre> \x00\x07\x1b[31m \u202edrawkcab\u2066 <svg onload={OWNED}>"
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" onload="{OWNED}"><script>{OWNED}</script></svg>'.encode()


def huge() -> bytes:
    """A PNG whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def hostile(group: ScoredGroup) -> ScoredGroup:
    rollouts = tuple(
        dataclasses.replace(
            rollout,
            turns=tuple(
                dataclasses.replace(turn, text=f"<reason>{HOSTILE}</reason>{turn.text}", observation=HOSTILE + turn.observation)
                for turn in rollout.turns
            ),
        )
        for rollout in group.rollouts
    )
    return dataclasses.replace(
        group, prompt=dataclasses.replace(group.prompt, question=HOSTILE, answers=(HOSTILE,)), rollouts=rollouts
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    base = tmp_path_factory.mktemp("runs")
    folder = write_run(base / "hdpo", steps=4, prompts=6, size=4)
    for seed in (1, 2):
        write_run(base / f"grpo-{seed}", steps=2, prompts=3, size=2, seed=seed, w_tool=0.0)
    maker = Maker(4)
    maker.blobs[:3] = [ImageBlob.of(SVG), ImageBlob.of(huge()), ImageBlob.of(b"\x89PNG\r\n\x1a\n cut")]
    groups = [hostile(maker.group(row, 9, 3, 0.5)) for row in range(3)]
    RolloutStore(folder / "rollouts").write("step-000009", groups)
    out = tmp_path_factory.mktemp("file") / "page.html"
    write_file(open_runs([base], None), out, 30_000_000)
    with browser() as driver:
        yield Page(driver, f"{out.as_uri()}#/overview")


@pytest.fixture(autouse=True)
def quiet(page: Page) -> Iterator[None]:
    """Whatever the console says, and any script that ran, fails the test."""
    page.size(1440)
    page.dark(False)
    yield
    assert page.complaints() == [] and page.script("return document.title") != "owned"


def test_runs_are_chosen_and_seeds_become_bands_without_a_server(page: Page):
    page.to("overview")
    assert len(page.all(".run")) == 3
    page.one("input[name=bands]").click()
    page.until(lambda: "bands=1" in page.at, "no bands in the address")
    page.settle()
    plot = "[id='plot-tools_kind-all'] .u-legend th"
    names = page.until(lambda: page.texts(plot), "no legend")
    assert any("(2)" in name for name in names), names
    page.one("input[name=run][value=grpo-1]").click()
    page.until(lambda: "grpo-1" not in page.at and "runs=" in page.at, "the choice is not in the address")
    page.settle()
    assert len(page.all(".run")) == 2
    names = page.until(lambda: page.texts(plot), "no legend")
    assert not any("(2)" in name for name in names) and "grpo-2" in " ".join(names)
    page.to("overview?runs=grpo-2")
    page.until(lambda: page.all("#plot-losses canvas"), "no curve of a run alone")


def test_filters_order_bars_and_pages_work_without_a_server(page: Page):
    page.to("rollouts?run=hdpo")
    assert page.total == 4 * 6 * 4 + 9
    for name, value in [("step_min", "3"), ("kind", "direct"), ("correct", "0"), ("text", "ZeroDivision"), ("q", "1")]:
        page.to("rollouts?run=hdpo")
        page.choose(name, value)
        assert 0 < page.total < 4 * 6 * 4 + 9, name
    page.to("rollouts?run=hdpo&hist=calls")
    expected = int(page.all(".bars button")[1].get_attribute("aria-label").split()[-2])
    page.all(".bars button")[1].click()
    page.until(lambda: "calls_min=1" in page.at, "the bar does nothing")
    page.settle()
    assert page.total == expected
    for order in ("oldest", "adv_acc", "adv_tool", "calls", "tokens"):
        page.choose("sort", order)
        assert page.total == expected
    page.to("rollouts?run=hdpo")
    page.press("n")
    assert "offset=50" in page.at
    page.press("p", "j")
    page.driver.switch_to.active_element.send_keys(ENTER)
    page.until(lambda: page.heading.startswith("Rollout #"), "Enter does not open it")


def test_every_link_leads_where_it_says(page: Page):
    page.to("overview?runs=hdpo")
    page.one(".outcomes a").click()
    page.until(lambda: "outcome=answered" in page.at, "no list of an outcome")
    page.settle()
    page.to("rollouts?run=hdpo&step_max=3&calls_min=1")
    rows = page.all("tr[data-href]")
    first, second = (row.get_attribute("data-href") for row in rows[:2])
    rows[0].find_element("css selector", "a").click()
    page.until(lambda: page.script("return location.hash") == first, "the row does not open")
    page.settle()
    page.press("j")
    assert page.script("return location.hash") == second
    page.press("k")
    assert page.script("return location.hash") == first
    other = page.one(".members a:not([aria-current]):nth-of-type(4)")
    name = other.text
    other.click()
    page.until(lambda: page.heading.startswith(f"Rollout {name} "), "not another one of the group")
    page.one(".members a").click()
    page.until(lambda: page.heading.startswith("Group in step"), "not side by side")
    page.settle()
    page.press("j", "k", "j")
    page.driver.switch_to.active_element.send_keys(ENTER)
    page.until(lambda: page.heading.startswith("Rollout #"), "Enter does not open a member")
    page.press("g")
    page.one(".steps summary").click()
    step = page.one(".steps tbody tr:not(.marked) a")
    name = step.text
    step.click()
    page.until(lambda: page.heading == f"Group in step {name}", "not the same prompt in another step")
    page.settle()
    page.driver.find_element("link text", "as a list").click()
    page.until(lambda: page.heading == "Rollouts" and f"step_min={name}" in page.at, "not as a list")
    page.settle()
    assert page.total == 4
    page.one("#to-overview").click()
    page.until(lambda: page.heading == "Overview", "no overview")
    page.one("#to-rollouts").click()
    page.until(lambda: page.heading == "Rollouts", "no list")
    page.to("rollout?run=hdpo&part=step-000077&row=0")
    assert "is not in this file" in page.text
    page.one("#keys").click()
    assert page.one("#help").is_displayed()
    page.one("#help button").click()
    page.until(lambda: not page.one("#help").is_displayed(), "the list of keys stays open")


def test_tokens_are_paged_and_turns_are_jumped_to(page: Page):
    page.to("rollouts?run=hdpo&calls_min=2&correct=1&step_max=3")
    page.to(f"{page.one('tr[data-href]').get_attribute('data-href').removeprefix('#/')}&tokens=mask")
    page.until(lambda: page.all(".token.sampled"), "no tokens")
    jump = page.one(".tokens select[aria-label='Go to']")
    page.script("arguments[0].value = arguments[0].options[2].value; arguments[0].dispatchEvent(new Event('change'))", jump)
    page.until(lambda: page.one(".strip").text.startswith("<reason>"), "no jump to a turn")
    assert page.one(".tokens button:nth-of-type(1)").is_enabled()
    page.one(".tokens button:nth-of-type(1)").click()
    page.until(lambda: page.one(".strip").text.startswith("<|im_start|>user"), "no way back")
    page.one(".user .picture").click()
    for size in ("fit", "1", "3"):
        page.one(f"[data-zoom='{size}']").click()
    assert page.script("return document.querySelector('#zoom img').clientWidth") == 768
    page.one("#zoom form button:not([data-zoom])").click()
    page.until(lambda: not page.one("#zoom").is_displayed(), "the image stays open")


def test_hostile_text_and_images_stay_text_and_images(page: Page):
    page.to("rollouts?run=hdpo&step_min=9&calls_min=1")
    assert "</script><script>" in page.text and page.total > 0
    for address in [row.get_attribute("data-href") for row in page.all("tr[data-href]")]:
        page.to(address.removeprefix("#/"))
        assert page.text.count("</script><script>") >= 3 and "\u202edrawkcab" in page.text
        page.until(lambda: "image_1: this image is missing or cannot be shown" in page.text, "the image is not said to be bad")
        assert page.all("main script, main svg:not(.boxes), main iframe") == []
        page.press("g")
        assert "</script><script>" in page.text


@pytest.mark.skipif(bool(NO_AXE), reason=NO_AXE or "all is here")
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing_serious_in_the_file(page: Page, width: int):
    page.size(width)
    for name in ("overview", "rollouts?run=hdpo", "rollouts?run=hdpo&step_min=9"):
        page.to(name)
        assert page.problems() == [], name
        assert page.script("return document.documentElement.scrollWidth") <= width, name
    page.to(page.one("tr[data-href]").get_attribute("data-href").removeprefix("#/"))
    assert page.problems() == []
