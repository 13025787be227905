"""One way to RGB: every mode and orientation, and damaged files of every format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from pictures import MODES, RAMP, TRANSPARENT, UPRIGHT, WIDE, encoded, turned
from PIL import Image

from metis_fast.data.parquet import RawRow
from metis_fast.data.row import BadRowError
from metis_fast.model import Policy
from metis_fast.pixels import ImageError, decode, size, to_rgb
from metis_fast.tools.image_search import describe
from metis_fast.types import ImageBlob


@pytest.mark.parametrize("name", TRANSPARENT)
def test_alpha_lies_on_white(name: str) -> None:
    pixels = np.asarray(decode(TRANSPARENT[name]))
    assert pixels.shape == (48, 64, 3)
    assert (pixels[0, 0] == 255).all() and (pixels[47, 63] == 255).all()
    assert (pixels[15, 30] < 60).all()


def test_half_transparent_is_half_white() -> None:
    assert np.abs(np.asarray(decode(TRANSPARENT["RGBA PNG"]))[35, 30].astype(int) - (227, 142, 147)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_stand_upright(orientation: int, kind: str) -> None:
    got = decode(turned(orientation, kind))
    assert got.size == (64, 48)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(UPRIGHT)).mean() < 6


@pytest.mark.parametrize("name", WIDE)
def test_wide_types_are_scaled_by_their_range(name: str) -> None:
    pixels = np.asarray(decode(WIDE[name])).astype(int)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0] - 255 * RAMP).max() <= 1.01


def test_what_is_no_number_is_black_and_hides_nothing_else() -> None:
    values = (1000 * RAMP).astype(np.float32)
    values[:4] = np.nan
    values[4:8] = np.inf
    pixels = np.asarray(decode(encoded(Image.fromarray(values), "TIFF"))).astype(int)
    assert (pixels[:8] == 0).all() and np.abs(pixels[8:, :, 0] - 255 * RAMP[8:]).max() <= 1.01


def test_one_grey_outside_of_the_usual_ranges_is_an_image_too() -> None:
    assert decode(encoded(Image.fromarray(np.full((48, 64), -400, np.float32)), "TIFF")).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    got = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **options))
    assert got.getpixel((30, 20)) == (255, 0, 0)


def test_the_size_is_known_from_the_header() -> None:
    files = {f"{kind} {turn}": turned(turn, kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for turn in range(1, 9)}
    for name, data in {**files, **MODES, **TRANSPARENT, **WIDE}.items():
        assert size(data) == decode(data).size, name
        assert size(data[: len(data) // 2 + 200]) == size(data), name  # nothing behind it is read, but for what turns a PNG


def test_a_png_may_say_behind_its_pixels_how_it_is_turned() -> None:
    data = turned(6, "PNG")
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    late = data[:at] + data[end:-12] + data[at:end] + data[-12:]
    assert size(late) == decode(late).size == (64, 48)


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    data = MODES[mode]
    with Image.open(io.BytesIO(data)) as opened:
        expected = opened.convert("RGB")
    assert (np.asarray(decode(data)) == np.asarray(expected)).all()


def test_an_image_of_the_agent_is_shown_as_one_from_a_file() -> None:
    for data in (*TRANSPARENT.values(), *WIDE.values()):
        with Image.open(io.BytesIO(data)) as opened:
            assert (np.asarray(to_rgb(opened)) == np.asarray(decode(data))).all()


# -- damaged files ----------------------------------------------------------------------------------------------------------

_NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
FORMATS = {
    "PNG": encoded(_NOISE),
    "palette PNG": TRANSPARENT["palette PNG"],
    "APNG": encoded(_NOISE, "PNG", save_all=True, append_images=[_NOISE.rotate(180)] * 2, duration=40),
    "JPEG": encoded(_NOISE, "JPEG"),
    "progressive JPEG": encoded(_NOISE, "JPEG", progressive=True),
    "WebP": encoded(_NOISE, "WEBP"),
    "GIF": encoded(_NOISE, "GIF", save_all=True, append_images=[_NOISE.rotate(180)]),
    "TIFF": encoded(_NOISE, "TIFF", compression="tiff_lzw"),
    "float TIFF": WIDE["float TIFF of heights"],
    "BMP": encoded(_NOISE, "BMP"),
}


def mutated(data: bytes, number: int) -> bytes:
    """Bits flipped, bytes overwritten, removed or repeated, or cut short."""
    random = np.random.default_rng([number, len(data)])
    out = bytearray(data)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(0, len(out) if random.random() < 0.5 else min(len(out), 200)))
        match int(random.integers(0, 5)):
            case 0:
                out[at] ^= 1 << int(random.integers(0, 8))
            case 1:
                out[at : at + 4] = random.bytes(4)
            case 2:
                del out[at : at + int(random.integers(1, 20))]
            case 3:
                out[at:at] = out[at : at + int(random.integers(1, 20))]
            case _:
                del out[max(at, 4) :]
        if not out:
            break
    return bytes(out)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest has its own filters in place of ours
@pytest.mark.parametrize("num", [120, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_image_is_usable_everywhere_or_a_bad_row_everywhere(name: str, num: int, policy: Policy) -> None:
    usable = 0
    for number in range(num):
        blob = ImageBlob.of(mutated(FORMATS[name], number))
        row = {
            "data_source": "t", "prompt": [{"role": "user", "content": "<image>?"}], "images": [{"bytes": blob.data}],
            "ability": "perception", "reward_model": {"style": "rule", "ground_truth": "a"},
        }  # fmt: skip
        try:
            RawRow("t:0", Path("t.parquet"), 0, row).decoded()
        except BadRowError as error:
            misfit = error.bad_row
            assert misfit.column == "images[0]" and len(misfit.got.splitlines()) == 1
            with pytest.raises(ImageError):
                policy.images.picture(blob)
            assert policy.images.broken([blob])[blob.sha256]
            continue
        usable += 1
        image = decode(blob.data)
        assert image.mode == "RGB" and np.isfinite(describe(image)).all()
        assert size(blob.data) == image.size and not policy.images.broken([blob])
        if max(image.size) <= 2048:
            assert policy.images(blob).pixels.isfinite().all()
    assert usable < num and (usable or num < 500)  # few damaged PNGs are usable
