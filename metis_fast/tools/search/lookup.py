"""`image_search` by the row's index, in a cache of the published form: nothing is seen, pages were searched for before."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from metis_fast import pixels
from metis_fast.config import ImageSearchConfig
from metis_fast.errors import InfrastructureError, ToolSetupError, one_line
from metis_fast.image_source import NoImageError, read_image
from metis_fast.pixels import ImageError
from metis_fast.tools.protocol import MAX_CALL_IMAGES
from metis_fast.tools.results import ImageSearchResult, Refused, SeenPage
from metis_fast.tools.search import ImageSource
from metis_fast.tools.search.reply import clean
from metis_fast.types import ImageBlob

_LOG = logging.getLogger(__name__)
_TITLES, _PATHS = "tool_returned_web_title", "cached_images_path"


@dataclass(frozen=True, slots=True)
class _Found:
    """A page of the cache. path: of its image, from the folder of images; None where there is none."""

    title: str
    path: str | None


class CachedImages:
    """An `ImageSource` over `tools.image_search.cache`. otherwise: asked where that has nothing; None: nothing is the result.

    Raises:
        ToolSetupError: the cache cannot be read, has another form, or none of its images is where it should be.
    """

    def __init__(self, config: ImageSearchConfig, otherwise: ImageSource | None = None) -> None:
        assert config.cache is not None
        path = config.cache.absolute()
        self._images = (config.cache_images or path.parent).absolute()
        self._otherwise = otherwise
        self._pages = _read(path)
        self._missing = _missing(self._pages, path, self._images)

    async def search(self, images: Sequence[ImageBlob], extra: Mapping[str, object]) -> ImageSearchResult | Refused:
        """See `ImageSource`. At most 8 pages; where a page's image is none, or was missing at the start, it has only its title.

        Raises:
            InfrastructureError: an image that was there has gone.
        """
        index = extra.get("index")
        found = self._pages.get("" if index is None else str(index))
        if found is None and self._otherwise is not None:
            return await self._otherwise.search(images, extra)
        return await asyncio.to_thread(self._shown, found or ())

    def close(self) -> None:
        """Close what is asked otherwise."""
        if self._otherwise is not None:
            self._otherwise.close()

    def _shown(self, found: Sequence[_Found]) -> ImageSearchResult:
        # an observation cannot have more images than engines make room for
        return ImageSearchResult(
            tuple(SeenPage(clean(page.title), "", self._image(page.path)) for page in found[:MAX_CALL_IMAGES])
        )

    def _image(self, path: str | None) -> ImageBlob | None:
        if path is None:
            return None
        try:
            data = read_image({"path": path}, self._images)
            pixels.decode(data)
        except NoImageError:
            if path in self._missing:
                return None
            raise InfrastructureError(
                f"image_search: {self._images / path} was there when the run began and has gone; make it available again"
            ) from None
        except ImageError as error:
            _LOG.warning("image_search: %s cannot be read and is not shown: %s", self._images / path, error)
            return None
        return ImageBlob.of(data)


def _read(path: Path) -> dict[str, tuple[_Found, ...]]:
    """Pages by index."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"is no JSON ({one_line(error)})") from None
    if not isinstance(value, dict) or not value:
        raise _refused(path, "is empty" if value in ({}, []) else f"is of type {type(value).__name__}")
    return {index: _entry(path, index, entry) for index, entry in value.items()}


def _entry(path: Path, index: str, entry: object) -> tuple[_Found, ...]:
    if not isinstance(entry, dict) or not entry.keys() & {_TITLES, _PATHS}:
        what = f"the names {', '.join(map(str, list(entry)[:8]))}" if isinstance(entry, dict) else type(entry).__name__
        raise _refused(path, f"has {what} under {index!r}")
    titles, paths = entry.get(_TITLES) or [], entry.get(_PATHS) or []
    for name, values in ((_TITLES, titles), (_PATHS, paths)):
        if not isinstance(values, list) or not all(one is None or isinstance(one, str) for one in values):
            raise _refused(path, f"has no list of texts in {name!r} under {index!r}")
    return tuple(_Found(title or "", image or None) for title, image in zip_longest(titles, paths))


def _refused(path: Path, what: str) -> ToolSetupError:
    form = f'{{"index": {{"{_TITLES}": ["..."], "{_PATHS}": ["a/b.jpg", null]}}}}'
    return ToolSetupError(f"tools.image_search.cache={path} {what}; expected {form}; set it to a cache in that form")


def _missing(pages: Mapping[str, Sequence[_Found]], path: Path, images: Path) -> frozenset[str]:
    """Images that are not there, which are told of.

    Raises:
        ToolSetupError: none is.
    """
    listed: dict[Path, frozenset[str]] = {}
    missing: list[str] = []
    total = 0

    def is_there(name: str) -> bool:
        place = images / name
        if place.parent not in listed:  # one listing of a folder instead of a request for each file
            try:
                with os.scandir(place.parent) as entries:
                    here = [one.name for one in entries if not one.is_symlink() or Path(one.path).exists()]
                listed[place.parent] = frozenset(here)
            except (OSError, ValueError):
                listed[place.parent] = frozenset()
        return place.name in listed[place.parent]

    for page in (page for found in pages.values() for page in found if page.path is not None):
        assert page.path is not None
        total += 1
        if not is_there(page.path):
            missing.append(page.path)
    if missing and len(missing) == total:
        raise ToolSetupError(
            f"none of the {total} images that tools.image_search.cache={path} names is in {images}, for example {missing[0]}; "
            "unpack them there, or set tools.image_search.cache_images to their folder"
        )
    if missing:
        _LOG.warning(
            "image_search: %d of %d images are missing in %s and are not shown; the first: %s",
            *(len(missing), total, images, missing[0]),
        )
    return frozenset(missing)
