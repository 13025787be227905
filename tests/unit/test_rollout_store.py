"""The rollout store: what is read is what was written, whatever happens in between."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast import seal
from metis_fast.errors import DataError
from metis_fast.rollout.store import RolloutStore, read_rollouts, stored_styles
from metis_fast.types import (
    ImageBlob,
    ImageSpan,
    Message,
    Outcome,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    ToolCall,
    Turn,
    Verdict,
)

CALL = ToolCall("python", '{"code": "1/0"}')


def make_rollout(uid: str, index: int, images: tuple[ImageBlob, ...] = (), num_tokens: int = 30) -> Rollout:
    """A rollout of two turns around a failed tool call; its images stand in prompt and observation."""
    generator = np.random.default_rng([index, num_tokens])
    sampled = np.zeros(num_tokens, bool)
    sampled[12:16] = sampled[22:] = True
    logp = np.where(sampled, -generator.exponential(size=num_tokens), 0).astype(np.float32)
    return Rollout(
        prompt_uid=uid,
        index=index,
        tokens=generator.integers(0, 150_000, num_tokens).astype(np.int32),
        prompt_len=12,
        sampled=sampled,
        logp=logp,
        weight_version=np.where(sampled, np.where(np.arange(num_tokens) < 20, 3, 4), -1).astype(np.int32),
        images=images,
        image_spans=tuple(
            ImageSpan(image.sha256, start, start + 4, (1, 4, 4)) for image, start in zip(images, (2, 17), strict=False)
        ),
        turns=(
            Turn("I look <tool_call>", 12, 16, 22, Outcome.TOOL_ERROR, CALL, "Zero: <image> \0 é", 0.1),
            Turn("<answer>7</answer>", 22, num_tokens, num_tokens, Outcome.ANSWERED),
        ),
        outcome=Outcome.ANSWERED,
    )


def make_group(uid: str, rollouts: tuple[Rollout, ...], kind: str | None = "direct") -> ScoredGroup:
    prompt = Prompt(
        uid=uid,
        data_source="unit",
        messages=(Message("user", "How many?"),),
        images=(),
        ability="math",
        answers=("7", "seven"),
        judge_style="rule",
        question="How many?",
        extra={} if kind is None else {"kind": kind},
    )
    score = Score(Verdict(True, False, "7", "llm m", "says CORRECT"), Outcome.ANSWERED, 0.9, 0.5, 1 / 3, -0.1, True, True, True)
    return ScoredGroup(prompt, rollouts, tuple(score for _ in rollouts))


def assert_same(read: Rollout, written: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        got, expected = getattr(read, field.name), getattr(written, field.name)
        if isinstance(expected, np.ndarray):
            assert got.dtype == expected.dtype, field.name
            assert got.tobytes() == expected.tobytes(), field.name
        else:
            assert got == expected, field.name


RED, BLUE = ImageBlob.of(b"red"), ImageBlob.of(b"blue")


def test_every_field_of_a_rollout_survives_the_disk(tmp_path: Path):
    unlucky = dataclasses.replace(
        make_rollout("b", 1), turns=(), outcome=Outcome.INFRASTRUCTURE_ERROR, error="engine gone", images=()
    )
    written = [
        make_group("a", (make_rollout("a", 0, (RED, BLUE)), make_rollout("a", 1, (RED,)))),
        dataclasses.replace(make_group("b", (unlucky,), kind=None), scores=(Score(None, Outcome.INFRASTRUCTURE_ERROR),)),
        dataclasses.replace(
            make_group("c", (make_rollout("c", 0),)), scores=(Score(None, Outcome.JUDGE_ERROR, no_verdict="é"),)
        ),
    ]
    path = RolloutStore(tmp_path).write("step-000001", written)

    read = list(read_rollouts(path))

    members = [(g, r, s) for g in written for r, s in zip(g.rollouts, g.scores, strict=True)]
    assert len(read) == len(members)
    for stored, (group, rollout, score) in zip(read, members, strict=True):
        assert_same(stored.rollout, rollout)
        assert stored.score == score
        assert (stored.ability, stored.question, stored.answers) == ("math", "How many?", ("7", "seven"))
        assert stored.kind == group.prompt.extra.get("kind")
    assert read[0].text == "I look <tool_call>\n<observation>Zero: <image> \0 é</observation>\n<answer>7</answer>"


def test_log_probs_keep_their_bits(tmp_path: Path):
    rollout = make_rollout("a", 0)
    extremes = np.array([-0.0, -1e-45, -np.finfo(np.float32).tiny, -np.finfo(np.float32).max], np.float32)
    logp = rollout.logp.copy()
    logp[12:16] = extremes
    RolloutStore(tmp_path).write("part", [make_group("a", (dataclasses.replace(rollout, logp=logp),))])

    (stored,) = read_rollouts(tmp_path)

    assert stored.rollout.logp[12:16].tobytes() == extremes.tobytes()


def test_an_image_is_on_disk_once_however_many_rollouts_and_parts_show_it(tmp_path: Path):
    image = ImageBlob.of(b"a very recognisable image")
    store = RolloutStore(tmp_path)
    store.write("step-000001", [make_group("a", (make_rollout("a", 0, (image,)), make_rollout("a", 1, (image,))))])
    store.write("step-000002", [make_group("a", (make_rollout("a", 0, (image, RED)),))])
    RolloutStore(tmp_path).write("step-000003", [make_group("a", (make_rollout("a", 0, (image,)),))])

    on_disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    assert on_disk.count(image.data) == 1
    assert [len(stored.rollout.images) for stored in read_rollouts(tmp_path)] == [1, 1, 2, 1]


def test_rewriting_a_part_after_a_resume_gives_the_same_bytes(tmp_path: Path):
    groups = [make_group("a", (make_rollout("a", 0, (RED,)),))]
    first = RolloutStore(tmp_path).write("step-000001", groups).read_bytes()

    assert RolloutStore(tmp_path).write("step-000001", groups).read_bytes() == first


def test_rewriting_a_part_with_other_rollouts_leaves_the_images_that_later_parts_share(tmp_path: Path):
    store = RolloutStore(tmp_path)
    store.write("step-000001", [make_group("a", (make_rollout("a", 0, (RED,)),))])
    later = store.write("step-000002", [make_group("a", (make_rollout("a", 0, (RED,)),))])
    RolloutStore(tmp_path).write("step-000001", [make_group("a", (make_rollout("a", 0, (BLUE,)),))])

    (stored,) = read_rollouts(later)

    assert stored.rollout.images == (RED,)


def test_a_crash_in_the_middle_of_a_write_leaves_the_old_part(tmp_path: Path):
    store = RolloutStore(tmp_path)
    path = store.write("step-000001", [make_group("a", (make_rollout("a", 0, (RED,)),))])
    mistyped = dataclasses.replace(make_rollout("a", 1, (BLUE,)), error=7)  # type: ignore[arg-type]
    many = tuple(make_rollout("a", index) for index in range(300))

    with pytest.raises(pa.ArrowException):  # dies in the second row group, the first is on disk
        store.write("step-000001", [make_group("a", (*many, mistyped))])

    assert [stored.rollout.images for stored in read_rollouts(path)] == [(RED,)]
    assert len(list(read_rollouts(tmp_path))) == 1
    store.write("step-000001", [make_group("a", many)])
    assert len(list(read_rollouts(tmp_path))) == 300


def test_two_nodes_may_store_the_same_new_images_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = ImageBlob.of(b"the same picture")
    one, other = RolloutStore(tmp_path), RolloutStore(tmp_path)
    sealing, others = seal.seal, list[Path]()

    def amid(path: Path) -> None:
        if not others:
            others.append(path)
            other.write("step-000000.node-1", [make_group("b", (make_rollout("b", 0, (image,)),))])
        sealing(path)

    monkeypatch.setattr(seal, "seal", amid)
    one.write("step-000000.node-0", [make_group("a", (make_rollout("a", 0, (image,)),))])
    assert [stored.rollout.images for stored in read_rollouts(tmp_path)] == [(image,)] * 2
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_an_empty_part_is_written_and_read(tmp_path: Path):
    assert list(read_rollouts(RolloutStore(tmp_path).write("step-000001", []))) == []


def test_token_arrays_may_be_written_to_so_that_torch_takes_them_without_a_copy(tmp_path: Path):
    RolloutStore(tmp_path).write("part", [make_group("a", (make_rollout("a", 0), make_rollout("a", 1)))])
    first, second = (stored.rollout for stored in read_rollouts(tmp_path))
    before = second.tokens.copy()
    first.tokens[:] = 0
    assert (second.tokens == before).all()


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_a_part_name_cannot_leave_the_folder(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="plain file name"):
        RolloutStore(tmp_path).write(name, [])


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path):
    with pytest.raises(DataError, match="found none"):
        list(read_rollouts(tmp_path))
    with pytest.raises(DataError, match="cannot read rollouts"):
        list(read_rollouts(tmp_path / "absent.parquet"))
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(RolloutStore(tmp_path / "s").write("p", [])).select(["text"]), other)
    with pytest.raises(DataError, match="columns are not those"):
        list(read_rollouts(other))


def test_a_part_without_its_images_names_what_to_copy(tmp_path: Path):
    path = RolloutStore(tmp_path / "run").write("part", [make_group("a", (make_rollout("a", 0, (RED,)),))])
    with pytest.raises(DataError, match="copy a part together with its `images` folder"):
        list(read_rollouts(path.rename(tmp_path / "alone.parquet")))


def test_a_damaged_image_is_refused_rather_than_trained_on(tmp_path: Path):
    image = ImageBlob.of(b"a very recognisable image")
    path = RolloutStore(tmp_path).write("part", [make_group("a", (make_rollout("a", 0, (image,)),))])
    (images,) = tmp_path.glob("images/*.arrow")
    images.write_bytes(images.read_bytes().replace(b"recognisable", b"recognizable"))
    with pytest.raises(DataError, match="damaged"):
        list(read_rollouts(path))


def test_image_files_with_a_flipped_bit_are_one_line(tmp_path: Path):
    """Without a seal, Arrow ended the process at some of them."""
    path = RolloutStore(tmp_path).write("part", [make_group("a", (make_rollout("a", 0, (RED,)),))])
    (images,) = tmp_path.glob("images/*.arrow")
    whole, bits = images.read_bytes(), random.Random(0)
    key = whole.rindex(b"sealed:")
    for _ in range(300):
        place = bits.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bits.randrange(8)
        if not key <= place < key + len(b"sealed:") + 16:
            images.write_bytes(flipped)
            with pytest.raises(DataError, match="damaged"):
                list(read_rollouts(path))


def test_a_part_with_nulls_of_another_program_is_one_line(tmp_path: Path):
    path = RolloutStore(tmp_path).write("part", [make_group("a", (make_rollout("a", 0),))])
    table = pq.read_table(path)
    nulls = pa.nulls(len(table), table.schema.field("images").type)
    pq.write_table(table.set_column(table.schema.get_field_index("images"), table.schema.field("images"), nulls), path)
    with pytest.raises(DataError, match="is damaged"):
        list(read_rollouts(path))


def test_an_image_file_cut_short_is_refused_when_the_store_opens(tmp_path: Path):
    RolloutStore(tmp_path).write("part", [make_group("a", (make_rollout("a", 0, (RED,)),))])
    (images,) = tmp_path.glob("images/*.arrow")
    for keep in (100, 0):
        images.write_bytes(images.read_bytes()[:keep])
        with pytest.raises(DataError, match="expected an Arrow file of images"):
            RolloutStore(tmp_path)


def test_an_image_is_read_once_for_all_rollouts_that_show_it(tmp_path: Path):
    blobs = [ImageBlob.of(index.to_bytes(4, "big") * 500) for index in range(1000)]
    template = make_rollout("a", 0, num_tokens=150)
    rollouts = (dataclasses.replace(template, index=i, images=(blobs[i % 1000],)) for i in range(1875))
    RolloutStore(tmp_path).write("trajectories", [make_group("a", tuple(rollouts))])
    read = list(read_rollouts(tmp_path))
    assert len(read) == 1875 and len({id(image) for stored in read for image in stored.rollout.images}) == 1000


def test_a_part_with_a_flipped_bit_is_one_line_and_never_other_data(tmp_path: Path):
    groups = [make_group(f"p{i}", tuple(make_rollout(f"p{i}", j, num_tokens=50) for j in range(2))) for i in range(3)]
    path = RolloutStore(tmp_path).write("step-000001", groups)
    whole, written = path.read_bytes(), list(read_rollouts(path))
    key = whole.rindex(b"sealed:")
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    bits = random.Random(0)
    for place in [*(bits.randrange(len(whole)) for _ in range(150)), *(bits.randrange(footer, len(whole)) for _ in range(150))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bits.randrange(8)
        path.write_bytes(flipped)
        if key <= place < key + len(b"sealed:") + 16:  # no seal, or that of another size; what is sealed is whole
            assert len(list(read_rollouts(path))) == len(written)
            continue
        with pytest.raises(DataError, match=str(path)) as error:
            list(read_rollouts(path))
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert len(list(read_rollouts(path))) == len(written)


def test_pages_carry_checksums_for_other_readers(tmp_path: Path):
    path = RolloutStore(tmp_path).write("a", [make_group("p", (make_rollout("p", 0, num_tokens=900),))])
    column = pq.ParquetFile(path).metadata.row_group(0).column(pq.read_schema(path).get_field_index("prompt_uid"))
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read(["prompt_uid"])


def test_a_part_that_another_program_writes_anew_is_read(tmp_path: Path):
    path = RolloutStore(tmp_path).write("a", [make_group("p", (make_rollout("p", 0), make_rollout("p", 1)))])
    pq.write_table(pq.read_table(path).slice(1), path)
    assert [one.rollout.index for one in read_rollouts(path)] == [1]


def test_a_store_from_before_verdicts_had_reasons_is_read(tmp_path: Path):
    group = make_group("p", (make_rollout("p", 0, (RED,)), make_rollout("p", 1)))
    plain = dataclasses.replace(group.scores[0], verdict=Verdict(True, False, "7"))
    group = dataclasses.replace(group, scores=(plain, Score(None, Outcome.JUDGE_ERROR)))
    path = RolloutStore(tmp_path).write("a", [group])
    rows = pq.read_table(path)
    verdicts = [one and {name: one[name] for name in ("correct", "format_ok", "answer")} for one in rows["verdict"].to_pylist()]
    rows = rows.set_column(rows.schema.get_field_index("verdict"), "verdict", pa.array(verdicts))
    pq.write_table(rows.drop_columns(["judge_style", "no_verdict"]), path)
    read = list(read_rollouts(tmp_path))
    for stored, rollout, score in zip(read, group.rollouts, group.scores, strict=True):
        assert_same(stored.rollout, rollout)
        assert stored.score == score and stored.judge_style == ""
    assert stored_styles(path) == {"": 2}


def test_the_styles_of_a_part_are_counted(tmp_path: Path):
    groups = [make_group(f"p{i}", (make_rollout(f"p{i}", 0), make_rollout(f"p{i}", 1))) for i in range(3)]
    groups[1] = dataclasses.replace(groups[1], prompt=dataclasses.replace(groups[1].prompt, judge_style="llm"))
    path = RolloutStore(tmp_path).write("a", groups)
    assert stored_styles(path) == {"rule": 4, "llm": 2}
    assert [stored.judge_style for stored in read_rollouts(path)] == ["rule", "rule", "llm", "llm", "rule", "rule"]


def test_only_a_file_that_was_written_for_it_is_sealed(tmp_path: Path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no open seal"):
        seal.seal(tmp_path / "a.parquet")
    seal.check_seal(tmp_path / "a.parquet")
