"""The page in a real browser, in short: as one file from the disk, which has the same code as the page that is served."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import ESCAPE, MISSING, Page, browser
from view_runs import ATTACK, write_run

from metis_fast import cli

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "all is here")


def test_a_report_file_opens_from_the_disk_with_curves_rollouts_images_and_tokens(tmp_path: Path):
    folder, out = write_run(tmp_path / "hdpo", steps=2, prompts=3, size=3), tmp_path / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    with browser() as driver:
        page = Page(driver, f"{out.as_uri()}#/overview")
        page.until(lambda: page.all(".plot canvas"), "no curve")
        assert "Held out, before → after" in page.text
        page.to("rollouts?run=hdpo&calls_min=1&text=panel 1?")
        assert 0 < page.total < 18 and "This file holds all 18 stored rollouts" in page.text
        page.one("tr[data-href] a").click()
        page.until(lambda: page.heading.startswith("Rollout #"), "no rollout")
        assert ATTACK in page.text and len(page.all(".user .boxes rect.over")) == 1
        shown = "return [...document.querySelectorAll('.talk img')].every((image) => image.complete && image.naturalWidth > 0)"
        page.until(lambda: page.script(shown), "an image is not shown")
        page.one(".user .picture").click()
        page.until(lambda: "256 × 192" in page.one("#zoom-size").text, "the image does not open")
        page.driver.switch_to.active_element.send_keys(ESCAPE)
        page.one(".tokens summary").click()
        page.until(lambda: page.all(".token.sampled"), "no tokens")
        page.press("g")
        assert page.heading.startswith("Group in step") and len(page.all("table.group tbody tr")) == 3
        assert page.complaints() == [] and page.script("return document.title") != "owned"
