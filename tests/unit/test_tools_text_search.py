"""text_search over small corpora."""

from __future__ import annotations

import os
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tantivy
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import TextSearchConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools.results import Page, TextSearchResult
from metis_fast.tools.search.wording import compact_text
from metis_fast.tools.text_search import TextSearch
from metis_fast.tools.words import analyzer, prepared, query_units

Row = tuple[str, str, str]
PAGES: Sequence[Row] = (
    ("Ouagadougou", "https://example.org/ouaga", "The capital of Burkina Faso. " + "A city of markets. " * 40),
    ("Burkina Faso", "https://example.org/bf", "A country in West Africa."),
    ("Capitals of Africa", "", "Burkina Faso: Ouagadougou. Burkina Faso borders Mali. " + "Burkina Faso Burkina Faso. " * 30),
    ("Zürich", "https://example.org/zh", "A lake and a large station."),
)


def write(path: Path, rows: Sequence[Row]) -> Path:
    titles, links, texts = zip(*rows, strict=True)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"title": titles, "link": links, "text": texts}), path)
    return path


def tool(path: Path, **changes: int) -> TextSearch:
    return TextSearch(TextSearchConfig.model_validate({"corpus": path, **changes}))


def titles(result: TextSearchResult) -> list[str]:
    return [page.title for page in result.pages]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "pages.parquet", PAGES)


@pytest.fixture(scope="module")
def search(pages: Path) -> TextSearch:
    return tool(pages)


def test_a_single_result_is_title_link_snippet(pages: Path) -> None:
    got = tool(pages, max_results=1).search("burkina faso")
    page = Page(1, "Burkina Faso", "https://example.org/bf", "A country in West Africa.")
    assert got == TextSearchResult("burkina faso", (page,))
    assert compact_text(got, numbered=False) == "Burkina Faso\nhttps://example.org/bf\nA country in West Africa."


def test_several_results_are_numbered_and_an_empty_link_leaves_no_line(search: TextSearch) -> None:
    result = search.search("ouagadougou africa")
    assert [page.rank for page in result.pages] == [1, 2, 3]
    first, second, third = compact_text(result, numbered=True).split("\n\n")
    lines = [result.split("\n") for result in (first, second, third)]
    assert [line[0].split(". ")[0] for line in lines] == ["1", "2", "3"]
    unlinked = next(line for line in lines if line[0].endswith("Capitals of Africa"))
    assert len(unlinked) == 2 and "https" not in unlinked[1]


def test_an_empty_title_leaves_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "pages.parquet", [("", "https://example.org", "A lake."), ("", "", "A lake, too.")])
    assert compact_text(tool(path).search("lake"), numbered=True) == "1. https://example.org\nA lake\n\n2. A lake, too"


@pytest.mark.parametrize("title", [page[0] for page in PAGES])
@pytest.mark.parametrize("change", [str.lower, str.upper, lambda title: f'"{title}"?'])
def test_a_query_that_equals_a_title_returns_that_page_first(search: TextSearch, title: str, change) -> None:
    assert titles(search.search(change(title)))[0] == title


def test_an_equal_title_beats_any_number_of_words_in_bodies(tmp_path: Path) -> None:
    loud = [(f"Red fox {number}", "", "red fox " * 500) for number in range(40)]
    corpus = write(tmp_path / "corpus.parquet", [*loud, ("The red fox", "", "nothing else"), *loud])
    assert titles(tool(corpus).search("the red fox"))[0] == "The red fox"


def test_words_of_the_title_count_more_than_words_of_the_body(tmp_path: Path) -> None:
    corpus = write(
        tmp_path / "corpus.parquet", [("Lakes", "", "about the heron bird"), ("Heron facts", "", "about a bird too")]
    )
    assert titles(tool(corpus).search("heron"))[0] == "Heron facts"


def test_word_forms_and_accents_match(search: TextSearch) -> None:
    assert titles(search.search("zurich"))[0] == "Zürich" and titles(search.search("stations"))[0] == "Zürich"


def test_snippet_is_short_and_holds_the_words_searched_for(tmp_path: Path) -> None:
    text = "filler words here. " * 200 + "The okapi lives in the Congo. " + "more filler text. " * 200
    corpus = write(tmp_path / "corpus.parquet", [("Animal", "", text)])
    (page,) = tool(corpus, max_results=1, snippet_chars=80).search("okapi").pages
    assert page.title == "Animal" and "okapi" in page.snippet and len(page.snippet) <= 80


@pytest.mark.parametrize("query", ["", "  ", "?!", "xylophone"])
def test_nothing_found_is_a_result(search: TextSearch, query: str) -> None:
    result = search.search(query)
    assert result == TextSearchResult(query, ()) and compact_text(result, numbered=True) == "No results."


@given(
    st.text(max_size=60)
    | st.text(st.characters(), max_size=60)
    | st.text(alphabet='+-&|!(){}[]^"~*?:\\/ AND OR NOT title burkina', max_size=60)
)
@settings(max_examples=150)
def test_no_query_breaks_the_search(search: TextSearch, query: str) -> None:
    assert all(page.title or page.snippet for page in search.search(query).pages)


@pytest.mark.parametrize("query", ["\ud83d burkina", "burkina\udc00"])
def test_half_a_pair_of_surrogates_is_no_word(search: TextSearch, query: str) -> None:
    assert search.search(query).pages == search.search("burkina").pages


def test_query_syntax_has_no_meaning(search: TextSearch) -> None:
    assert (
        search.search("title:zürich -lake AND NOT station*").pages == search.search("title zürich lake and not station").pages
    )


def test_equals_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", [("Same page", f"link{number}", "equal text") for number in range(300)])
    pages = tool(corpus, max_results=5).search("equal").pages
    assert [page.link for page in pages] == [f"link{number}" for number in range(5)]


def test_the_index_is_kept_and_a_changed_corpus_is_indexed_anew(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", [("Old", "", "first text")])
    assert titles(tool(corpus).search("text")) == ["Old"]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    made = folder.stat().st_mtime_ns
    assert titles(tool(corpus).search("text")) == ["Old"] and folder.stat().st_mtime_ns == made
    times = corpus.stat()
    write(corpus, [("New", "", "first text")])
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time: the content decides
    assert titles(tool(corpus).search("text")) == ["New"]


def test_a_corpus_that_was_touched_renamed_or_moved_with_its_index_keeps_it(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a" / "corpus.parquet", PAGES)
    tool(corpus)
    os.utime(corpus, (1, 1))
    (tmp_path / "a").rename(tmp_path / "b")
    tool(tmp_path / "b" / "corpus.parquet")
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_builds_at_the_same_time_leave_one_index_and_no_rest(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", PAGES)
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(str(tool(corpus).search("lake").pages))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and len(set(got)) == 1 and "Zürich" in got[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_index_is_built_again(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", PAGES)
    expected = tool(corpus).search("lake")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "meta.json").write_text("{")
    assert tool(corpus).search("lake") == expected


def test_a_word_of_any_length_that_a_language_has_is_found(tmp_path: Path) -> None:
    long = "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz"
    corpus = write(
        tmp_path / "corpus.parquet", [("Law", "", f"The {long}."), ("Other", "", "text"), ("Name", "", "തിരുവനന്തപുരത്തേക്കുള്ള")]
    )
    assert titles(tool(corpus).search(long.upper())) == ["Law"]
    assert titles(tool(corpus).search("തിരുവനന്തപുരത്തേക്കുള്ള")) == ["Name"]


SCRIPTS: Sequence[Row] = (
    (
        "东京大学",
        "https://example.org/1",
        "东京大学是日本的一所国立大学。" + "学校的历史很长。" * 60 + "图书馆藏书九百万册。" + "学校很大。" * 60,
    ),
    ("日本語のページ", "", "データベースは情報の集まりである。" * 30 + "ジョン・スミスが書いた。"),
    ("서울특별시", "", "서울은 대한민국의 수도이다. " + "한강이 흐른다. " * 60 + "경복궁이 있다."),
    ("กรุงเทพมหานคร", "", "กรุงเทพเป็นเมืองหลวงของประเทศไทย" * 20 + "มีวัดพระแก้ว"),
    ("ວຽງຈັນ", "", "ນະຄອນຫຼວງຂອງປະເທດລາວ"),
    ("ភ្នំពេញ", "", "រាជធានីនៃប្រទេសកម្ពុជា"),
    ("ရန်ကုန်", "", "မြန်မာနိုင်ငံ၏ အကြီးဆုံးမြို့"),
    ("Qwen3模型", "", "Qwen3模型 的 accuracy 正确率 是 ＡＢＣ１２３ 和 ｶﾞｷﾞ。"),
    ("Москва", "", "Столица России — Москва. Ёлка у Кремля."),
    ("Αθήνα", "", "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας. Αθήνας."),
    ("القاهرة", "", "القَاهِرَة هي عاصمة مصر"),
    ("ירושלים", "", "שָׁלוֹם מירושלים"),
    ("दिल्ली", "", "हिन्दी विश्वविद्यालय दिल्ली में है"),
    ("Hà Nội", "", unicodedata.normalize("NFD", "Phở và cà phê ở Việt Nam.")),
    ("İstanbul", "", "Türkiye'nin en kalabalık şehri. Straße, cafe\u0301, Donau\u00addampf."),
)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> TextSearch:
    return tool(write(tmp_path_factory.mktemp("scripts") / "pages.parquet", SCRIPTS), snippet_chars=60)


@pytest.mark.parametrize(
    ("query", "title", "shown"),
    [
        ("图书馆", "东京大学", "图书馆"),
        ("册", "东京大学", "册"),  # one sign alone, inside of a run
        ("藏书有多少？", "东京大学", "藏书"),
        ("データベース", "日本語のページ", "データベース"),
        ("ﾃﾞｰﾀﾍﾞｰｽ", "日本語のページ", "データベース"),
        ("スミス", "日本語のページ", "スミス"),
        ("경복궁", "서울특별시", "경복궁"),
        (unicodedata.normalize("NFD", "경복궁"), "서울특별시", "경복궁"),
        ("วัดพระแก้ว", "กรุงเทพมหานคร", "วัดพระแก้ว"),
        ("ປະເທດລາວ", "ວຽງຈັນ", "ປະເທດລາວ"),
        ("កម្ពុជា", "ភ្នំពេញ", "កម្ពុជា"),
        ("မြန်မာ", "ရန်ကုန်", "မြန်မာ"),
        ("Qwen3模型 accuracy", "Qwen3模型", "accuracy"),
        ("qwen3 的正确率", "Qwen3模型", "正确率"),
        ("abc123", "Qwen3模型", "ＡＢＣ１２３"),
        ("ガギ", "Qwen3模型", "ｶﾞｷﾞ"),
        ("МОСКВА", "Москва", "Москва"),
        ("елка", "Москва", "Ёлка"),
        ("ΑΘΗΝΑΣ", "Αθήνα", "Αθήνας"),
        ("القاهرة", "القاهرة", "القَاهِرَة"),
        ("שלום", "ירושלים", "שָׁלוֹם"),
        ("विश्वविद्यालय", "दिल्ली", "विश्वविद्यालय"),
        ("ca phe", "Hà Nội", unicodedata.normalize("NFD", "cà phê")),
        ("istanbul", "İstanbul", ""),
        ("ISTANBUL cafés", "İstanbul", "cafe\u0301"),
        ("strasse", "İstanbul", "Straße"),
        ("Donaudampf", "İstanbul", "Donau\u00addampf"),
    ],
)
def test_every_script_is_found_and_its_place_shown(scripts: TextSearch, query: str, title: str, shown: str) -> None:
    first = scripts.search(query).pages[0]
    assert (first.rank, first.title) == (1, title)
    assert shown in first.snippet and len(first.snippet) <= 60


@pytest.mark.parametrize("title", [page[0] for page in SCRIPTS])
def test_an_equal_title_of_any_script_comes_first(tmp_path: Path, title: str) -> None:
    others = [(f"{title} {title}", "", f"{title} " * 50), (title[: len(title) // 2], "", title * 50)]
    corpus = write(tmp_path / "corpus.parquet", [*others, (title, "", "-"), *others])
    assert titles(tool(corpus).search(f"  {title}?"))[0] == title


@pytest.mark.parametrize("query", ["火星", "飛行機", "비행기", "สนามบิน", "😀", "❤️ ☃", "，。！？", "→ ≠ +"])
def test_what_is_not_there_is_not_found_in_any_script(scripts: TextSearch, query: str) -> None:
    assert scripts.search(query).pages == ()


_SIGNS = st.text(alphabet="东京大学图书馆データ경복궁กรุงเทพဗမာខ្មែរພາສາ", min_size=2, max_size=12)


@given(_SIGNS, st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=100)
def test_a_part_of_a_run_of_signs_is_searched_for_as_it_stands_there(text: str, before: int, after: int) -> None:
    words = analyzer()
    page = f" {' '.join(words.analyze(prepared('〇' * before + text + '〇' * after)))} "
    units = query_units(words, text)
    assert units and all(f" {' '.join(unit)} " in page for unit in units)


@given(st.text(alphabet=st.characters(max_codepoint=0x7F) | st.sampled_from("éèüßñøÅ’“”—…™½²€ﬁ"), max_size=80))
@settings(max_examples=200)
def test_latin_text_gives_the_words_that_tantivy_finds_in_it(text: str) -> None:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for item in (tantivy.Filter.lowercase(), tantivy.Filter.ascii_fold(), tantivy.Filter.stemmer("English")):
        builder = builder.filter(item)
    assert analyzer().analyze(prepared(text)) == builder.build().analyze(text)


def test_a_letter_gives_the_same_word_whatever_else_is_in_the_text() -> None:
    words = analyzer()
    for text in (f"x{letter}y" for letter in map(chr, range(0x80, 0x3000))):  # a Greek word: no short cut for Latin text
        assert words.analyze(prepared(text)) == words.analyze(prepared(f"{text} ω"))[:-1]


@given(st.text(max_size=80))
@settings(max_examples=200)
def test_composed_and_decomposed_text_is_the_same(text: str) -> None:
    words, (composed, decomposed) = analyzer(), (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert words.analyze(prepared(composed)) == words.analyze(prepared(decomposed))


def test_a_corpus_that_cannot_serve_is_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(ToolSetupError, match=r"set tools\.text_search\.corpus, or tools\.text_search\.provider, or remove"):
        TextSearch(TextSearchConfig())
    with pytest.raises(ToolSetupError, match="absent"):
        tool(tmp_path / "absent.parquet")
    (tmp_path / "other.parquet").write_text("not a table")
    with pytest.raises(ToolSetupError, match="not a Parquet file"):
        tool(tmp_path / "other.parquet")
    pq.write_table(pa.table({"title": ["a"], "text": ["b"]}), tmp_path / "short.parquet")
    with pytest.raises(ToolSetupError, match="no column 'link'"):
        tool(tmp_path / "short.parquet")
