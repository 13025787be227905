"""image_search by the row's index, in a cache of the published form."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from metis_fast.config import ImageSearchConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.tools.results import ImageSearchResult, Refused, SeenPage
from metis_fast.tools.search import open_image_source
from metis_fast.types import ImageBlob


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (seed * 20, 90, 200 - seed)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, cache: object) -> Path:
    """The cache file; images 0 to 9 are in `cached_images` beside it."""
    (folder / "cached_images").mkdir(exist_ok=True)
    for seed in range(10):
        (folder / "cached_images" / f"{seed}.jpg").write_bytes(picture(seed))
    (folder / "cache.json").write_text(json.dumps(cache))
    return folder / "cache.json"


def entry(titles: object, paths: object) -> dict[str, object]:
    return {"tool_returned_web_title": titles, "cached_images_path": paths}


def look(config: ImageSearchConfig, extra: Mapping[str, object], *images: bytes) -> ImageSearchResult | Refused:
    source = open_image_source(config)
    result = asyncio.run(source.search([ImageBlob.of(image) for image in images], extra))
    source.close()
    return result


def pages(config: ImageSearchConfig, index: object) -> tuple[SeenPage, ...]:
    result = look(config, {"index": index})
    assert isinstance(result, ImageSearchResult)
    return result.pages


def test_titles_and_images_of_the_rows_index_come_in_order(tmp_path: Path) -> None:
    titles, paths = (
        ["First <image>\nof it", "Second", "Third"],
        ["cached_images/3.jpg", None, "cached_images/1.jpg", "cached_images/2.jpg"],
    )
    cache = write(tmp_path, {"fvqa_train_7": entry(titles, paths), "8": entry(["Only a title"], []), "9": entry(None, None)})
    config = ImageSearchConfig(cache=cache)
    three, one, two = (ImageBlob.of(picture(seed)) for seed in (3, 1, 2))
    assert pages(config, "fvqa_train_7") == (
        SeenPage("First < image > of it", "", three),
        SeenPage("Second", "", None),
        SeenPage("Third", "", one),
        SeenPage("", "", two),
    )
    assert pages(config, 8) == (SeenPage("Only a title", "", None),) and pages(config, "9") == ()


def test_a_row_that_the_cache_does_not_have_has_no_results(tmp_path: Path) -> None:
    config = ImageSearchConfig(cache=write(tmp_path, {"a": entry(["t"], ["cached_images/1.jpg"])}))
    for extra in ({}, {"index": None}, {"index": "b"}, {"index": ""}):
        assert look(config, extra, picture(1)) == ImageSearchResult(())


def test_no_more_images_than_an_observation_may_have(tmp_path: Path) -> None:
    paths = [f"cached_images/{seed}.jpg" for seed in range(10)]
    config = ImageSearchConfig(cache=write(tmp_path, {"a": entry([f"t{i}" for i in range(10)], paths)}), max_results=1)
    assert [page.title for page in pages(config, "a")] == [f"t{i}" for i in range(8)]


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    cache = write(tmp_path, {"a": entry(["t"], ["1.jpg"])})
    with pytest.raises(ToolSetupError, match=r"none of the 1 images .* is in .*, for example 1\.jpg; .*cache_images to their"):
        open_image_source(ImageSearchConfig(cache=cache))
    config = ImageSearchConfig(cache=cache, cache_images=tmp_path / "cached_images")
    assert pages(config, "a")[0].image == ImageBlob.of(picture(1))


def test_missing_and_damaged_images_are_told_and_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = ["cached_images/1.jpg", "cached_images/gone.jpg", "elsewhere/2.jpg", "cached_images/bad.jpg", "\0"]
    cache = write(tmp_path, {"a": entry(["0", "1", "2", "3", "4"], paths)})
    (tmp_path / "cached_images" / "bad.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        found = pages(ImageSearchConfig(cache=cache), "a")
    assert [(page.title, page.image is None) for page in found] == [(str(i), i > 0) for i in range(5)]
    assert "3 of 5 images are missing" in caplog.text and "the first: cached_images/gone.jpg" in caplog.text
    assert "bad.jpg cannot be read and is not shown" in caplog.text


def test_images_that_go_away_during_a_run_are_a_failure_of_ours(tmp_path: Path) -> None:
    cache = write(tmp_path, {"a": entry(["0", "1"], ["cached_images/0.jpg", "cached_images/gone.jpg"])})
    (tmp_path / "cached_images" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")  # was never there
    source = open_image_source(ImageSearchConfig(cache=cache))
    before = asyncio.run(source.search([], {"index": "a"}))
    assert isinstance(before, ImageSearchResult)
    assert [page.image is None for page in before.pages] == [False, True]
    (tmp_path / "cached_images").rename(tmp_path / "away")
    with pytest.raises(InfrastructureError, match=r"cached_images/0\.jpg was there when the run began and has gone"):
        asyncio.run(source.search([], {"index": "a"}))
    source.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"is no JSON"),
        ("{}", "is empty"),
        ("[1]", "is of type list"),
        ('{"a": ["t"]}', "has list under 'a'"),
        ('{"a": {"titles": [], "images": []}}', "has the names titles, images under 'a'"),
        ('{"a": {"cached_images_path": "x.jpg"}}', "has no list of texts in 'cached_images_path' under 'a'"),
        ('{"a": {"tool_returned_web_title": [1]}}', "has no list of texts in 'tool_returned_web_title' under 'a'"),
    ],
)
def test_another_form_is_refused_at_the_start(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ToolSetupError, match=rf"^tools\.image_search\.cache=.* {said}.*; expected .*cached_images_path.*; set"):
        open_image_source(ImageSearchConfig(cache=tmp_path / "cache.json"))


def test_a_cache_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ToolSetupError, match=r"cannot be read \(No such file or directory\); expected"):
        open_image_source(ImageSearchConfig(cache=tmp_path / "cache.json"))


def test_the_similarity_search_answers_where_the_cache_has_nothing(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = []
    for left, right in (("red", "blue"), ("white", "green")):
        image = Image.new("RGB", (60, 40), left)
        image.paste(right, (30, 0, 60, 40))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images.append(buffer.getvalue())
    pq.write_table(pa.table({"title": ["one", "two"], "link": ["", ""], "image": images}), tmp_path / "corpus.parquet")
    cache = write(tmp_path, {"a": entry(["cached"], [None])})
    config = ImageSearchConfig(cache=cache, corpus=tmp_path / "corpus.parquet", max_results=1)
    assert pages(config, "a") == (SeenPage("cached", "", None),)
    result = look(config, {"index": "b"}, images[1])
    assert isinstance(result, ImageSearchResult) and result.pages[0].title == "two"
    assert look(config, {}) == Refused("image_search needs an image in the prompt; there is none.")
