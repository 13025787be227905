"""The stream: each row once an epoch, the order a function of (seed, epoch), exact resume whatever happened before."""

import dataclasses
import json
import logging
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metis_fast.data.cursor import CursorState, epoch_order, prompt_cursor, prompts, read_once
from metis_fast.data.parquet import Layout, PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.errors import CheckpointError, DataError


def write_rows(path: Path, abilities: list[str], row_group_size: int) -> None:
    rows = [
        {
            "data_source": "unit",
            "prompt": [{"role": "user", "content": f"row {row}"}],
            "ability": ability,
            "reward_model": {"ground_truth": str(row), "style": "music" if ability == "music" else "rule"},
        }
        for row, ability in enumerate(abilities)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 rows in 5 row groups of 2 files; rows a:2 and b:0 are bad."""
    folder = tmp_path_factory.mktemp("cursor")
    write_rows(folder / "a.parquet", ["math", "math", "music", "math", "search"], row_group_size=2)
    write_rows(folder / "b.parquet", ["music", *["perception"] * 7], row_group_size=4)
    return folder


NUM_ROWS, NUM_BAD = 13, 2
SMALL, LARGE = 600, 1 << 20  # cache sizes: a few row groups of the folder, all of them
SEEDS = st.integers(-(2**63), 2**63 - 1)


def test_the_small_cache_of_these_tests_cuts_an_epoch_into_windows(folder: Path):
    sizes = [group.num_bytes for group in PromptFiles([folder]).row_groups]
    assert len(sizes) == 5
    assert max(sizes) < SMALL < sum(sizes)


@given(
    seed=SEEDS,
    shuffle=st.booleans(),
    cache_bytes=st.sampled_from([0, SMALL, LARGE]),
    steps=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12),
)
@settings(max_examples=30)
def test_any_interleaving_of_next_and_resume_gives_the_same_sequence(
    folder: Path, seed: int, shuffle: bool, cache_bytes: int, steps: list[tuple[int, bool]]
):
    files = PromptFiles([folder], cache_bytes)
    whole = prompt_cursor(files, seed, shuffle, "skip")
    expected = whole.next(sum(n for n, _ in steps))
    cursor, got = prompt_cursor(files, seed, shuffle, "skip"), []
    for n, resume in steps:
        got += cursor.next(n)
        if resume:
            saved = json.loads(json.dumps(dataclasses.asdict(cursor.state())))
            cursor.next(3)  # what a crashed run did after its checkpoint does not matter
            cursor = prompt_cursor(PromptFiles([folder], cache_bytes), seed, shuffle, "skip")
            cursor.restore(CursorState(**saved))
    assert got == expected
    assert cursor.state() == whole.state()


@given(seed=SEEDS, shuffle=st.booleans(), cache_bytes=st.sampled_from([0, SMALL, LARGE]))
@settings(max_examples=40)
def test_every_epoch_visits_each_usable_row_exactly_once(folder: Path, seed: int, shuffle: bool, cache_bytes: int):
    cursor = prompt_cursor(PromptFiles([folder], cache_bytes), seed, shuffle, "skip")
    usable = {f"a:{row}" for row in (0, 1, 3, 4)} | {f"b:{row}" for row in range(1, 8)}
    for _ in range(3):
        uids = [prompt.uid for prompt in cursor.next(len(usable))]
        assert len(uids) == len(usable)
        assert set(uids) == usable
    cursor.next(1)
    assert cursor.epoch == 3


@given(seed=SEEDS, epoch=st.integers(0, 1000), cache_bytes=st.sampled_from([0, SMALL, LARGE]))
@settings(max_examples=30)
def test_row_groups_in_use_always_fit_the_cache(folder: Path, seed: int, epoch: int, cache_bytes: int):
    files = PromptFiles([folder], cache_bytes)
    order = epoch_order(files.layout, seed, epoch).tolist()
    assert sorted(order) == list(range(NUM_ROWS))
    group_of = {group.start + row: group for group in files.row_groups for row in range(group.num_rows)}
    visits = [group_of[index] for index in order]
    for place in range(NUM_ROWS):
        in_use = set(visits[: place + 1]) & set(visits[place:])
        assert len(in_use) == 1 or sum(group.num_bytes for group in in_use) <= cache_bytes


def test_rows_of_a_set_that_fits_the_cache_are_mixed_over_all_row_groups(folder: Path):
    files = PromptFiles([folder])
    first = {epoch_order(files.layout, 0, epoch)[0] for epoch in range(200)}
    assert first == set(range(NUM_ROWS))
    neighbours = [
        after - before for epoch in range(200) for before, after in pairwise(epoch_order(files.layout, 0, epoch).tolist())
    ]
    # A uniform permutation of 13 puts i + 1 right after i in 1 of 13 places.
    assert abs(neighbours.count(1) / len(neighbours) - 1 / 13) < 0.02


def test_the_order_is_the_same_on_every_machine_and_version():
    # Golden orders, of a set that is mixed as a whole and of one in windows: resuming after an upgrade relies on them.
    assert epoch_order(Layout(((13, 1),), 10), 7, 2).tolist() == [6, 2, 5, 10, 7, 1, 9, 8, 0, 4, 3, 12, 11]
    windows = Layout(((3, 4), (4, 4), (2, 4), (4, 4)), 9)
    assert epoch_order(windows, 7, 2).tolist() == [6, 2, 5, 1, 0, 4, 3, 10, 7, 9, 8, 12, 11]


def test_seeds_and_epochs_have_orders_of_their_own(folder: Path):
    files = PromptFiles([folder])
    orders = {tuple(epoch_order(files.layout, seed, epoch)) for seed in (-1, 0, 1, 2**40) for epoch in range(25)}
    assert len(orders) == 100


def test_without_shuffling_rows_come_in_the_order_of_the_files(folder: Path):
    cursor = prompt_cursor(PromptFiles([folder]), seed=3, shuffle=False, on_bad_row="skip")
    assert [prompt.uid for prompt in cursor.next(6)] == ["a:0", "a:1", "a:3", "a:4", "b:1", "b:2"]


def test_a_drawn_prompt_is_found_again_by_its_row_and_reading_it_moves_nothing(folder: Path):
    files = PromptFiles([folder])
    cursor, plain = (prompt_cursor(files, 5, on_bad_row="skip") for _ in range(2))
    drawn = cursor.draw(15)  # over the end of the epoch
    assert [prompt for _, prompt in drawn] == plain.next(15)
    place = cursor.state()
    assert [cursor.read(row) for row, _ in drawn] == [prompt for _, prompt in drawn]
    assert cursor.state() == place == plain.state()


def test_skipped_rows_are_counted_each_time_and_logged_once(folder: Path, caplog: pytest.LogCaptureFixture):
    cursor = prompt_cursor(PromptFiles([folder]), seed=0, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        cursor.next(2 * (NUM_ROWS - NUM_BAD) + 1)
    assert 2 * NUM_BAD <= cursor.skipped <= 3 * NUM_BAD
    assert sorted(record.getMessage().split(", ")[1] for record in caplog.records) == ["row 0", "row 2"]
    assert all("'music'" in record.getMessage() for record in caplog.records)


def test_a_bad_row_stops_the_stream_and_leaves_it_in_place(folder: Path):
    cursor = prompt_cursor(PromptFiles([folder]), seed=0, shuffle=False)
    before = cursor.state()
    for _ in range(2):
        with pytest.raises(BadRowError, match=r"row 2, column reward_model.style.*on_bad_row=skip"):
            cursor.next(5)
        assert cursor.state() == before
    assert [prompt.uid for prompt in cursor.next(2)] == ["a:0", "a:1"]


def test_an_epoch_without_a_usable_row_is_an_error_not_a_loop(tmp_path: Path):
    write_rows(tmp_path / "bad.parquet", ["music"] * 3, row_group_size=2)
    with pytest.raises(DataError, match="no usable row among 3"):
        prompt_cursor(PromptFiles([tmp_path]), seed=0, on_bad_row="skip").next(1)


def test_rows_that_all_go_bad_after_a_good_epoch_end_the_stream(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "pixels.png")
    row = {
        "data_source": "unit",
        "prompt": [{"role": "user", "content": "<image>"}],
        "images": ["pixels.png"],
        "ability": "math",
        "reward_model": {"ground_truth": "1", "style": "rule"},
    }
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "set.parquet")
    cursor = prompt_cursor(PromptFiles([tmp_path]), seed=0, on_bad_row="skip")
    assert len(cursor.next(4)) == 4
    (tmp_path / "pixels.png").unlink()
    with pytest.raises(DataError, match="no usable row among 3"):
        cursor.next(1)


def test_one_usable_row_is_enough_for_a_stream(tmp_path: Path):
    write_rows(tmp_path / "one.parquet", ["music", "music", "math", "music"], row_group_size=2)
    cursor = prompt_cursor(PromptFiles([tmp_path]), seed=0, on_bad_row="skip")
    assert [prompt.uid for prompt in cursor.next(5)] == ["one:2"] * 5


def test_a_state_of_changed_files_another_seed_or_order_is_refused(folder: Path, tmp_path: Path):
    state = prompt_cursor(PromptFiles([folder]), seed=0).state()
    write_rows(tmp_path / "a.parquet", ["math"] * 5, row_group_size=2)
    for cursor, message in (
        (prompt_cursor(PromptFiles([tmp_path]), seed=0), "has files = 13 rows.*now files = 5 rows"),
        (prompt_cursor(PromptFiles([folder], cache_bytes=SMALL), seed=0), "has files"),
        (prompt_cursor(PromptFiles([folder]), seed=1), "has run.seed = 0, now run.seed = 1"),
        (prompt_cursor(PromptFiles([folder]), seed=0, shuffle=False), "has data.shuffle"),
    ):
        before = cursor.state()
        with pytest.raises(CheckpointError, match=message):
            cursor.restore(state)
        assert cursor.state() == before


@pytest.mark.parametrize("change", [{"position": NUM_ROWS}, {"position": -1}, {"epoch": -1}, {"skipped": -1}], ids=str)
def test_an_impossible_place_is_refused(folder: Path, change: dict[str, int]):
    cursor = prompt_cursor(PromptFiles([folder]), seed=0)
    with pytest.raises(CheckpointError, match="impossible"):
        cursor.restore(dataclasses.replace(cursor.state(), **change))


def test_reading_once_gives_every_usable_row_and_no_row_twice(folder: Path):
    files = PromptFiles([folder])
    uids = [prompt.uid for _, prompt in read_once(prompts(files), len(files), "skip")]
    assert len(uids) == len(set(uids)) == NUM_ROWS - NUM_BAD and uids[:3] == ["a:0", "a:1", "a:3"]
    with pytest.raises(BadRowError):
        list(read_once(prompts(files), len(files), "stop"))
