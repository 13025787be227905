"""The page of `metis-fast view` in a real browser: every filter, link and key, phone width, light and dark, hostile text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import ENTER, ESCAPE, LIMIT_S, MISSING, NO_AXE, RIGHT, Page, browser
from harness import Command
from view_runs import ABILITIES, ATTACK, Maker, stats, write_benchmark, write_run

from metis_fast.config import LogConfig
from metis_fast.report.log import RunLog
from metis_fast.rollout.store import RolloutStore

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING or "all is here")]

STEPS, PROMPTS, SIZE = 12, 9, 6
RUNS = ["hdpo", "grpo-1", "grpo-2"]
ALL = STEPS * PROMPTS * SIZE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("view")
    first = write_run(base / "hdpo", steps=STEPS, prompts=PROMPTS, size=SIZE)
    write_benchmark(first, 0, 0.8)
    write_benchmark(first, STEPS, 0.9)
    others = [write_run(base / f"grpo-{seed}", steps=3, prompts=3, size=4, seed=seed, w_tool=0.0) for seed in (1, 2)]
    return [first, *others]


@pytest.fixture(scope="module")
def url(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = Command(["view", *folders, "--port", 0, "--json"], tmp_path_factory.mktemp("server"))
    deadline = time.monotonic() + LIMIT_S
    while not command.read("out").endswith("\n"):
        assert command.alive and time.monotonic() < deadline, command.read("err")
        time.sleep(0.05)
    yield json.loads(command.read("out"))["url"]
    os.kill(command.pid, signal.SIGTERM)
    ended = command.wait()
    assert (ended.code, ended.err, ended.orphans) == (0, "", ())


@pytest.fixture(scope="module")
def opened(url: str) -> Iterator[Page]:
    with browser() as driver:
        yield Page(driver, url)


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """With a wide window and light colours; whatever the console says fails the test."""
    opened.size(1440)
    opened.dark(False)
    yield opened
    assert opened.complaints() == []
    assert opened.script("return document.title") != "owned"


def test_the_token_leaves_the_address_and_the_overview_has_what_it_should(page: Page):
    page.to("overview?runs=hdpo")
    assert "token" not in page.script("return location.href")
    titles = [element.text for element in page.all(".plot h3")]
    for title in ("Held-out accuracy", "Tool rate by kind", "Tool rate by ability", "Losses", "Rollouts with signal",
                  "Tokens with signal", "Clip fractions", "Ratio extremes", "Engine gap and KL", "Entropy", "Staleness",
                  "Outcomes", "Failures of ours", "Time by stage", "Tokens a second", "FLOPs of the update"):  # fmt: skip
        assert title in titles
    page.until(lambda: len(page.all(".plot canvas")) == len(titles), "a curve is not drawn")
    label = page.one("#plot-tools_kind canvas").get_attribute("aria-label")
    assert "direct" in label and "%" in label
    assert "Held out, before → after" in page.text and "tool_needed" in page.text and "nothing sick" in page.text
    cells = [element.text for element in page.all(".benchmarks tbody td")]
    assert cells[cells.index(f"step-{STEPS:06d}, rule") + 1].startswith("90.0 ± 2.0") and "Metis (published)" in cells
    assert ATTACK in page.one(".benchmarks ol").text
    page.one("#plot-losses details summary").click()
    page.until(lambda: len(page.all("#plot-losses .numbers tbody tr")) == STEPS, "not a row for each step")


def test_runs_are_laid_over_one_another_and_seeds_make_bands(page: Page):
    page.to("overview")
    assert [element.get_attribute("value") for element in page.all("input[name=run]")] == RUNS
    assert [row.text.split()[0] for row in page.all("[aria-label='Comparison of runs'] tbody tr")] == [
        "hdpo",
        "grpo-1",
        "grpo-2",
    ]
    plot = "[id='plot-tools_kind-all'] .u-legend th"
    page.until(lambda: len(page.all(plot)) >= 4, "no curve for each run")
    page.one("input[name=bands]").click()
    page.until(lambda: "bands=1" in page.at, "no bands in the address")
    page.settle()
    names = page.until(lambda: page.texts(plot), "no legend")
    assert any("(2)" in name for name in names), names
    lines = [row.text for row in page.all("[aria-label='Comparison of runs'] tbody tr")]
    assert len(lines) == 2 and " to " not in lines[0] and " to " in lines[1]
    page.one("input[name=run][value=grpo-1]").click()
    page.until(lambda: "runs=hdpo,grpo-2" in page.at, "the choice is not in the address")
    page.settle()
    assert len(page.all(".run")) == 2


def test_every_filter_changes_the_list_and_the_address_alone_brings_it_back(page: Page):
    page.to("rollouts?run=hdpo")
    assert page.total == ALL
    for name, value in [
        ("step_min", "4"), ("step_max", "6"), ("ability", ABILITIES[1]), ("kind", "uncertain"), ("outcome", "judge_error"),
        ("correct", "0"), ("calls_min", "1"), ("calls_max", "1"), ("channel", "tool"), ("q", "1"), ("adv_acc_min", "0.2"),
        ("adv_acc_max", "-0.2"), ("adv_tool_min", "0.2"), ("adv_tool_max", "-0.2"), ("text", "ZeroDivision"),
    ]:  # fmt: skip
        page.to("rollouts?run=hdpo")
        page.choose(name, value)
        found, address = page.total, page.at
        assert 0 < found < ALL, (name, found)
        page.to("overview?runs=hdpo")
        page.to(address.removeprefix("#/"))
        assert page.total == found and page.one(".panel summary").text == "Filters (1 set)"
        assert page.one(f".filters [name={name}]").get_attribute("value") == value
    page.to("rollouts?run=hdpo&text=nowhere at all")
    assert "No rollout is like that" in page.text
    page.one(".filters button").click()
    page.until(lambda: "text=" not in page.at, "the filters are not cleared")
    page.settle()
    assert page.total == ALL
    page.choose("run", "grpo-1")
    assert page.total == 3 * 3 * 4


def test_a_bar_of_the_histogram_filters_to_its_rollouts(page: Page):
    page.to("rollouts?run=hdpo&hist=calls")
    bars = page.all(".bars button")
    expected = int(bars[1].get_attribute("aria-label").split()[-2])
    bars[1].click()
    page.until(lambda: "calls_min=1" in page.at, "the bar does nothing")
    page.settle()
    assert page.total == expected


def test_pages_order_and_keys_of_the_list(page: Page):
    page.to("rollouts?run=hdpo&sort=adv_acc")
    first = page.one("tr[data-href]").get_attribute("data-href")
    page.press("n")
    assert "offset=50" in page.at and page.one("tr[data-href]").get_attribute("data-href") != first
    page.press("p")
    assert page.one("tr[data-href]").get_attribute("data-href") == first
    page.press("j", "j", "k", "j")
    assert page.script("return [...document.querySelectorAll('tr')].indexOf(document.querySelector('tr.marked'))") == 2
    marked = page.one("tr.marked").get_attribute("data-href")
    page.driver.switch_to.active_element.send_keys(ENTER)
    page.until(lambda: page.script("return location.hash") == marked, "Enter does not open it")
    page.settle()
    assert page.heading.startswith("Rollout #")
    page.press("u")
    assert page.heading == "Rollouts" and "sort=adv_acc" in page.at
    page.press("/")
    assert page.script("return document.activeElement.name") == "text"
    page.driver.switch_to.active_element.send_keys(ESCAPE)
    page.press("?")
    assert page.one("#help").is_displayed()
    page.driver.switch_to.active_element.send_keys(ESCAPE)
    page.until(lambda: not page.one("#help").is_displayed(), "the list of keys stays open")
    page.press("o")
    assert page.heading == "Overview"


def test_a_rollout_shows_what_was_said_with_the_box_of_its_crop_and_a_closer_look(page: Page, folders: list[Path]):
    page.to("rollouts?run=hdpo&calls_min=2&correct=1&text=panel 1?")
    page.one("tr[data-href] a").click()
    page.until(lambda: page.heading.startswith("Rollout #"), "no rollout")
    assert "panel = image_1.crop(box)" in page.text and "ZeroDivisionError" in page.text
    assert "<script>document.title='owned'</script>" in page.text
    assert f"metis-fast judge rescore {folders[0]}" in page.text
    assert len(page.all(".user .boxes rect.over")) == 1
    rect = page.one(".user .boxes rect.over")
    assert [rect.get_attribute(name) for name in ("x", "y", "width", "height")] == ["24", "40", "96", "64"]
    loaded = "return [...document.querySelectorAll('.talk img')].every((image) => image.complete && image.naturalWidth > 0)"
    page.until(lambda: page.script(loaded), "an image is not shown")
    page.one(".user .picture").click()
    assert page.one("#zoom").is_displayed() and len(page.all("#zoom .boxes rect.over")) == 1
    page.until(lambda: "256 × 192" in page.one("#zoom-size").text, "the size is not said")
    page.one("[data-zoom='3']").click()
    assert page.script("return document.querySelector('#zoom img').clientWidth") == 768
    page.driver.switch_to.active_element.send_keys(ESCAPE)
    page.until(lambda: not page.one("#zoom").is_displayed(), "the image stays open")


def test_the_members_of_a_group_are_side_by_side_and_one_key_apart(page: Page):
    page.to("rollouts?run=hdpo&channel=both")
    page.press("j", "g")
    page.until(lambda: page.heading.startswith("Group in step"), "no group")
    assert len(page.all("table.group tbody tr")) == SIZE
    assert "in Q" in page.text and ("likelier" in page.text or "rarer" in page.text)
    page.one("table.group tbody tr a").click()
    page.until(lambda: page.heading.startswith("Rollout #0"), "no rollout")
    page.press("]")
    assert page.heading.startswith("Rollout #1")
    page.press("[")
    assert page.heading.startswith("Rollout #0")
    page.one(".steps summary").click()
    assert len(page.all(".steps tbody tr")) == STEPS
    page.press("g")
    assert page.heading.startswith("Group in step")


def test_the_token_strip_is_coloured_five_ways(page: Page):
    page.to("rollouts?run=hdpo&channel=both&calls_min=1")
    address = page.one("tr[data-href]").get_attribute("data-href")
    page.to(f"{address.removeprefix('#/')}&tokens=logp")
    page.until(lambda: page.all(".token.sampled"), "no tokens")
    assert page.one(".strip").text.startswith("<|im_start|>user") and "image · 12 tokens" in page.one(".strip").text
    colours = "return [...document.querySelectorAll('.token.sampled')].map((token) => token.style.backgroundColor)"
    seen = {}
    for mode in ("logp", "acc", "tool", "version", "mask"):
        page.script(
            "const s = document.querySelector('.tokens select'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            mode,
        )
        seen[mode] = page.script(colours)
        assert all(seen[mode]) and page.one(".key").text
        assert not any(page.script(colours.replace(".sampled", ":not(.sampled)")))
    assert len(set(seen["logp"])) > 3
    assert [len(set(seen[mode])) for mode in ("acc", "tool", "version", "mask")] == [1] * 4
    page.script("document.querySelectorAll('.token.sampled')[1].click()")
    assert "log-prob -" in page.one(".detail").text and "weights" in page.one(".detail").text
    before = page.one(".detail").text
    page.one(".strip").send_keys(RIGHT)
    assert page.one(".detail").text != before


_CUT_OFF = """
const inside = ".scroll, .strip, details:not([open]), .u-over";
return [...document.querySelectorAll("main *")]
  .filter((one) => !one.closest(inside) && getComputedStyle(one).clipPath === "none")
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  .concat([...document.querySelectorAll("main .scroll")].filter((one) => one.scrollWidth > one.clientWidth))
  .map((one) => `${one.tagName}.${one.className}`);
"""
PAGES = ("overview?runs=hdpo", "overview?bands=1", "rollouts?run=hdpo", "group", "rollout")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_is_cut_off_or_too_faint_at_any_width(page: Page, width: int, dark: bool, tmp_path: Path):
    page.to("rollouts?run=hdpo&calls_min=2&text=panel 1?")
    rollout = page.one("tr[data-href]").get_attribute("data-href").removeprefix("#/")
    group = page.one("tr[data-href]").get_attribute("data-group").removeprefix("#/")
    page.size(width)
    page.dark(dark)
    for name in PAGES:
        page.to({"group": group, "rollout": f"{rollout}&tokens=logp"}.get(name, name))
        page.until(lambda: page.script("return document.body.clientWidth > 0"), "nothing is shown")
        assert page.script("return document.documentElement.scrollWidth") <= width, name
        wide = page.script(_CUT_OFF)
        assert wide == [], name
        ink, paper = page.script("const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]")
        assert (brightness(paper) < 60) == dark and abs(brightness(ink) - brightness(paper)) > 150, name
        page.driver.save_screenshot(str(tmp_path / f"{PAGES.index(name)}-{width}-{'dark' if dark else 'light'}.png"))


@pytest.mark.skipif(bool(NO_AXE), reason=NO_AXE or "all is here")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_axe_finds_nothing_serious(page: Page, width: int, dark: bool):
    page.to("rollouts?run=hdpo&calls_min=2&text=panel 1?")
    rollout = page.one("tr[data-href]").get_attribute("data-href").removeprefix("#/")
    group = page.one("tr[data-href]").get_attribute("data-group").removeprefix("#/")
    page.size(width)
    page.dark(dark)
    for name in PAGES:
        page.to({"group": group, "rollout": f"{rollout}&tokens=acc"}.get(name, name))
        if "tokens=" in page.at:
            page.until(lambda: page.all(".token.sampled"), "no tokens")
        assert page.problems() == [], name
    page.press("?")
    assert page.problems() == []
    page.driver.switch_to.active_element.send_keys(ESCAPE)


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 3


def test_the_theme_can_be_chosen_and_stays(page: Page):
    page.to("overview?runs=hdpo")
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = page.script(paper)
    for _ in range(2):
        page.one("#theme").click()
    assert page.one("#theme").text == "Theme: dark" and page.script(paper) != light
    page.open(f"{page.base}#/overview?runs=hdpo")
    assert page.one("#theme").text == "Theme: dark" and page.script(paper) != light
    page.one("#theme").click()
    assert page.script(paper) == light


def test_a_step_that_is_written_meanwhile_is_shown_without_a_reload(page: Page, folders: list[Path]):
    page.to("overview?runs=grpo-2")
    assert "3 of 3" in page.text
    maker = Maker(9)
    groups = [maker.group(row, 3, 4, 0.5) for row in range(3)]
    RolloutStore(folders[2] / "rollouts").write("step-000003", groups)
    with RunLog(folders[2], LogConfig(tensorboard=False)) as log:
        log.step(stats(3, 0.5, groups, maker.generator))
    page.until(lambda: "4 of 3" in page.text, "the new step is not shown")
    page.to("rollouts?run=grpo-2&step_min=3")
    assert page.total == 12


def test_what_is_missing_is_said_and_the_rest_is_shown(page: Page, folders: list[Path]):
    folder = folders[1]
    (folder / "summary.json").unlink()
    (folder / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1 cut")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "cut')
    for path in (folder / "rollouts" / "images").iterdir():
        path.unlink()
    page.to("overview?runs=grpo-1")
    notes = page.script("return document.querySelector('.notes').textContent")
    assert "summary.json is missing" in notes and "no end yet" in notes and "step-000001.parquet" in notes
    assert "3 of 3" in page.text
    page.until(lambda: page.all(".plot canvas"), "a curve is not drawn")
    page.to("rollouts?run=grpo-1")
    assert page.total == 2 * 3 * 4
    page.to("rollout?run=grpo-1&part=step-000077&row=0")
    assert "there is no rollout" in page.text
    page.to("nothing")
    assert "There is no page nothing" in page.text
    assert all("404" in complaint for complaint in page.complaints())  # the browser's own line about the answer above


def test_a_folder_that_has_gone_is_said_without_a_reload(page: Page, folders: list[Path]):
    page.to("overview?runs=grpo-2")
    page.until(lambda: page.all(".plot canvas"), "a curve is not drawn")
    shutil.rmtree(folders[2])
    page.until(lambda: f"{folders[2]} has gone" in page.text, "that it has gone is not said")
    page.to("rollouts?run=grpo-2")
    assert "has gone" in page.text and "log.rollouts" not in page.text and page.total == 0
    page.to("overview?runs=hdpo")
    assert "has gone" not in page.text and page.all(".facts")
