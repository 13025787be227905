"""image_search over a small set of drawn images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from metis_fast.config import ImageSearchConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools.image_search import DESCRIPTOR_SIZE, ImageSearch, describe
from metis_fast.tools.results import ImageSearchResult, Refused, SeenPage
from metis_fast.tools.search.wording import compact_images
from metis_fast.types import ImageBlob


def picture(seed: int) -> Image.Image:
    """Random coloured blocks: a different layout for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(blocks).resize((210, 150), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.parquet"
    images = [encode(picture(seed)) for seed in range(30)]
    images[4] = b"not an image"
    table = pa.table(
        {
            "title": [f"Page {seed}" for seed in range(30)],
            "link": [f"https://example.org/{seed}" if seed % 2 else "" for seed in range(30)],
            "image": images,
        }
    )
    pq.write_table(table, path, row_group_size=7)
    return path


def tool(corpus: Path, **changes: int) -> ImageSearch:
    return ImageSearch(ImageSearchConfig.model_validate({"corpus": corpus, **changes}))


def pages(result: ImageSearchResult | Refused) -> tuple[SeenPage, ...]:
    assert isinstance(result, ImageSearchResult)
    return result.pages


@pytest.mark.parametrize("seed", [0, 7, 13, 29])
@pytest.mark.parametrize("size", [(210, 150), (97, 61), (640, 480)])
def test_the_same_image_resized_and_recompressed_is_found_first(corpus: Path, seed: int, size: tuple[int, int]) -> None:
    query = ImageBlob.of(encode(picture(seed).resize(size), "JPEG", quality=60))
    (page,) = pages(tool(corpus, max_results=1).search(query))
    assert page.title == f"Page {seed}" and page.image is not None


def test_a_darker_copy_is_found_first(corpus: Path) -> None:
    query = ImageEnhance.Brightness(picture(9)).enhance(0.7)
    assert pages(tool(corpus, max_results=1).search(ImageBlob.of(encode(query))))[0].title == "Page 9"


def test_results_hold_title_link_and_a_small_copy_of_the_image(corpus: Path) -> None:
    got = tool(corpus, max_results=2, thumbnail_px=64).search(ImageBlob.of(encode(picture(3))))
    assert isinstance(got, ImageSearchResult)
    text, images = compact_images(got, numbered=True)
    first, second = text.split("\n\n")
    assert first == "1. Page 3\nhttps://example.org/3\n<image>" and second.startswith("2. Page ")
    thumbnail = Image.open(io.BytesIO(images[0].data))
    assert max(thumbnail.size) == 64 and float(describe(thumbnail) @ describe(picture(3))) > 0.95


def test_pages_without_title_link_or_image_have_no_line_for_it() -> None:
    image = ImageBlob.of(b"x")
    found = ImageSearchResult((SeenPage("A", "", None), SeenPage("", "https://example.org", image)))
    assert compact_images(found, numbered=False) == ("A\n\nhttps://example.org\n<image>", (image,))
    assert compact_images(found, numbered=True) == ("1. A\n\n2. \nhttps://example.org\n<image>", (image,))
    assert compact_images(ImageSearchResult(()), numbered=True) == ("No results.", ())


def test_an_unreadable_corpus_image_is_never_found(corpus: Path) -> None:
    titles = [page.title for page in pages(tool(corpus, max_results=30).search(ImageBlob.of(encode(picture(4)))))]
    assert "Page 5" in titles and "Page 4" not in titles


def test_an_unreadable_prompt_image_is_answered(corpus: Path) -> None:
    assert tool(corpus).search(ImageBlob.of(b"nothing")) == Refused("image_search cannot read the image of the prompt.")


def test_descriptors_are_kept_beside_the_corpus(corpus: Path) -> None:
    query = ImageBlob.of(encode(picture(3)))
    before = tool(corpus).search(query)
    (file,) = corpus.parent.glob("*.descriptors-*/descriptors.npy")
    made = file.stat().st_mtime_ns
    assert tool(corpus).search(query) == before and file.stat().st_mtime_ns == made
    assert np.load(file).shape == (30, DESCRIPTOR_SIZE)


def test_descriptors_have_unit_length_and_plain_images_are_like_nothing() -> None:
    assert np.linalg.norm(describe(picture(1))) == pytest.approx(1, abs=1e-6)
    assert not describe(Image.new("RGB", (50, 50), "teal")).any()


def test_an_unset_corpus_is_refused_when_opened() -> None:
    with pytest.raises(ToolSetupError, match=r"tools\.image_search\.corpus"):
        ImageSearch(ImageSearchConfig())
