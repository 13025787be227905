"""One way to RGB: every mode and orientation, and damaged files of every format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metis_fast.data.row import MisfitError, parse_prompt
from metis_fast.model import Policy
from metis_fast.pixels import ImageError, decode, to_rgb
from metis_fast.tools.image_search import describe
from metis_fast.types import ImageBlob

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))  # [48, 64], from black on the left to white on the right


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def a_drawing() -> Image.Image:
    """Opaque dark strokes on nothing: black if alpha is thrown away."""
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[10:20, 10:50] = (20, 30, 40, 255)
    pixels[30:40, 10:50] = (200, 30, 40, 128)
    return Image.fromarray(pixels, "RGBA")


def with_palette() -> Image.Image:
    """Index 0 is transparent."""
    image = Image.new("P", (64, 48), 0)
    image.putpalette([0, 0, 0, 20, 30, 40])
    image.paste(1, (10, 10, 50, 20))
    image.info["transparency"] = 0
    return image


TRANSPARENT = {
    "RGBA PNG": encoded(a_drawing()),
    "LA PNG": encoded(a_drawing().convert("LA")),
    "palette PNG": encoded(with_palette(), transparency=0),
    "GIF": encoded(with_palette(), "GIF", transparency=0),
    "WebP": encoded(a_drawing(), "WEBP", lossless=True),
    "RGBA TIFF": encoded(a_drawing(), "TIFF"),
    "RGB PNG with a transparent colour": encoded(a_drawing().convert("RGB"), transparency=(0, 0, 0)),
    "grey PNG with a transparent grey": encoded(a_drawing().convert("L"), transparency=0),
}


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
    upright = Image.fromarray(np.uint8(255 * np.stack([RAMP, RAMP[::-1] * 0, np.linspace(0, 1, 48)[:, None] + 0 * RAMP], -1)))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes each orientation, inverted
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode(encoded(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})))
    assert got.size == (64, 48)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(upright)).mean() < 6


WIDE = {
    "16-bit grey PNG": encoded(Image.fromarray(np.uint16(65535 * RAMP))),
    "16-bit grey TIFF": encoded(Image.fromarray(np.uint16(65535 * RAMP)), "TIFF"),
    "big-endian 16-bit grey TIFF": encoded(
        Image.frombytes("I;16B", (64, 48), np.uint16(65535 * RAMP).astype(">u2").tobytes()), "TIFF"
    ),
    "32-bit grey TIFF, 16 bits used": encoded(Image.fromarray(np.int32(65535 * RAMP)), "TIFF"),
    "32-bit grey TIFF": encoded(Image.fromarray(np.int32(2**30 * RAMP)), "TIFF"),
    "32-bit grey TIFF below 0": encoded(Image.fromarray(np.int32(2000 * RAMP - 1000)), "TIFF"),
    "float TIFF from 0 to 1": encoded(Image.fromarray(np.float32(RAMP)), "TIFF"),
    "float TIFF from 0 to 255": encoded(Image.fromarray(np.float32(255 * RAMP)), "TIFF"),
    "float TIFF of heights": encoded(Image.fromarray(np.float32(9000 * RAMP - 400)), "TIFF"),
    "8-bit grey PNG": encoded(Image.fromarray(np.uint8(255 * RAMP))),
}


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


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    image = Image.fromarray(np.uint8(255 * np.stack([RAMP, RAMP[:, ::-1], RAMP], -1))).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encoded(image, kind)
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
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_image_is_usable_everywhere_or_a_bad_row_everywhere(name: str, policy: Policy) -> None:
    usable = 0
    for number in range(500):
        blob = ImageBlob.of(mutated(FORMATS[name], number))
        row = {
            "data_source": "t", "prompt": [{"role": "user", "content": "<image>?"}], "images": [{"bytes": blob.data}],
            "ability": "perception", "reward_model": {"style": "rule", "ground_truth": "a"},
        }  # fmt: skip
        try:
            parse_prompt(row, "t:0", Path())
        except MisfitError as misfit:
            assert misfit.column == "images[0]" and len(misfit.got.splitlines()) == 1
            with pytest.raises(ImageError):
                policy.images(blob)
            continue
        usable += 1
        image = decode(blob.data)
        assert image.mode == "RGB" and np.isfinite(describe(image)).all()
        if max(image.size) <= 2048:
            assert policy.images(blob).pixels.isfinite().all()
    assert 0 < usable < 500
