"""The page's interface: who gets in, what a browser may do, conversations, boxes of crops, and advisories."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from view_runs import ATTACK, BOX, CODE, Maker, photo, stats, write_run

from metis_fast.types import Slice, StepStats
from metis_fast.view.advisories import advisories
from metis_fast.view.app import make_app
from metis_fast.view.conversation import segments
from metis_fast.view.crops import Crop, boxes_in, find_crop
from metis_fast.view.run import open_runs

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hdpo", steps=3, prompts=6, size=6)


@pytest.fixture(scope="module")
def get(folder: Path) -> Callable[..., httpx2.Response]:
    """Asks the page. token: in a bearer header; empty: none is sent."""
    app = make_app(open_runs([folder], None), TOKEN)

    def ask(path: str, token: str = TOKEN, method: str = "GET", **headers: str) -> httpx2.Response:
        async def request() -> httpx2.Response:
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8600") as client:
                sent = headers | ({"authorization": f"Bearer {token}"} if token else {})
                return await client.request(method, path, headers=sent)

        return asyncio.run(request())

    return ask


def rollout_with(get: Callable[..., Any], **query: str) -> tuple[dict[str, Any], str]:
    rows = get("/api/rollouts?run=hdpo&" + "&".join(f"{name}={value}" for name, value in query.items())).json()["rows"]
    address = f"run=hdpo&part={rows[0]['part']}&row={rows[0]['row']}"
    return get(f"/api/rollout?{address}").json(), address


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/runs", "/api/image?run=hdpo&sha=0"])
def test_nobody_gets_in_without_the_token(get: Callable[..., httpx2.Response], path: str):
    assert get(path, token="").status_code == 401
    assert get(path, token="another").status_code == 401
    assert get(path, token="", cookie="metis_view_8600=another").status_code == 401
    assert get(f"{path}{'&' if '?' in path else '?'}token=another", token="").status_code == 401


def test_an_address_with_the_token_becomes_a_cookie_and_loses_it(get: Callable[..., httpx2.Response]):
    answer = get(f"/?a=1&token={TOKEN}", token="")
    assert answer.status_code == 303 and answer.headers["location"] == "/?a=1"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"metis_view_8600={TOKEN};") and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert get("/api/runs", token="", cookie=f"metis_view_8600={TOKEN}").status_code == 200
    assert (
        get(f"http://127.0.0.1:8600//elsewhere.example/?token={TOKEN}", token="").headers["location"] == "/elsewhere.example/"
    )


def test_every_answer_forbids_scripts_that_are_not_the_pages_own(get: Callable[..., httpx2.Response]):
    for path, token in [("/", TOKEN), ("/", ""), ("/api/runs", TOKEN), ("/nowhere", TOKEN), ("/main.js", TOKEN)]:
        headers = get(path, token=token).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_page_only_reads(get: Callable[..., httpx2.Response]):
    assert [get("/api/runs", method=method).status_code for method in ("POST", "PUT", "DELETE")] == [405] * 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/rollouts?run=other", "expected one of hdpo"),
        ("/api/overview?runs=other", "expected some of hdpo"),
        ("/api/rollouts?run=hdpo&offset=-1", "expected a whole number"),
        ("/api/rollouts?run=hdpo&sort=x", "expected one of newest"),
        ("/api/rollout?run=hdpo&part=step-000000&row=999", "there is no rollout"),
        ("/api/rollout?run=hdpo&part=../../etc/passwd&row=0", "there is no rollout"),
        ("/api/image?run=hdpo&sha=../../etc/passwd", "is missing"),
        ("/../../etc/passwd", "Not Found"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(get: Callable[..., httpx2.Response], path: str, said: str):
    answer = get(path)
    assert answer.status_code == 404 and said in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_pages_of_a_list_make_the_whole_list(get: Callable[..., httpx2.Response]):
    found, offset = [], 0
    while rows := get(f"/api/rollouts?run=hdpo&limit=20&sort=adv_acc&offset={offset}").json()["rows"]:
        found += rows
        offset += 20
    assert len({(row["part"], row["row"]) for row in found}) == len(found) == 3 * 6 * 6
    assert [row["adv_acc"] for row in found] == sorted((row["adv_acc"] for row in found), reverse=True)


def test_a_conversation_has_calls_images_where_they_stand_and_the_box_of_a_crop(get: Callable[..., httpx2.Response]):
    tree, _ = rollout_with(get, calls_min="2", correct="1")
    talk = tree["talk"]
    first, second, last = talk["turns"]
    assert [piece["kind"] for piece in first["pieces"]] == ["reason"]
    assert first["call"] == {"name": "python", "arguments": [{"name": "code", "text": CODE}], "raw": ""}
    assert [list(piece) for piece in first["observation"]] == [["text"], ["image"], ["text"]]
    assert first["observation"][2]["text"] == ATTACK
    crop = first["crops"][0]
    assert (crop["source"], tuple(crop["box"]), crop["size"]) == (talk["images"][0], BOX, [256, 192])
    assert second["outcome"] == "tool_error" and second["crops"] == []
    assert last["pieces"][-1] == {"kind": "answer", "text": "42"} and last["call"] is None


def test_a_group_has_all_members_with_their_advantages(get: Callable[..., httpx2.Response]):
    tree, address = rollout_with(get, channel="both")
    group = get(f"/api/group?{address}").json()
    assert [one["sample"] for one in group["members"]] == list(range(6))
    assert {one["uid"] for one in group["members"]} == {tree["head"]["uid"]}
    assert group["weights"] == {"w_acc": 1.0, "w_tool": 0.15, "n_acc": 5000.0, "n_tool": 2500.0, "mini_batches": 2}
    assert [one["step"] for one in group["steps"]] == [0, 1, 2]
    assert sum(one["adv_acc"] for one in group["members"]) == pytest.approx(0, abs=1e-4)


def test_tokens_are_those_that_were_sampled_with_their_text(get: Callable[..., httpx2.Response]):
    tree, address = rollout_with(get, calls_max="0", correct="1")
    whole = get(f"/api/tokens?{address}").json()
    sampled = "".join(text for text, own in zip(whole["texts"], whole["sampled"], strict=True) if own)
    assert sampled == "<reason>I can read it as it is.</reason>\n<answer>42</answer>"
    assert sum(whole["sampled"]) == tree["head"]["tokens"] and tree["tokenizer"]
    pieces = [get(f"/api/tokens?{address}&start={start}&count=10").json() for start in range(0, whole["total"], 10)]
    for name in ("ids", "texts", "logp", "version", "sampled"):
        assert [value for piece in pieces for value in piece[name]] == whole[name]


def test_images_are_encoded_afresh(folder: Path, get: Callable[..., httpx2.Response]):
    tree, _ = rollout_with(get, calls_min="1")
    sha = tree["talk"]["images"][0]
    answer = get(f"/api/image?run=hdpo&sha={sha}&size=full")
    assert answer.headers["content-type"] == "image/png"
    stored = open_runs([folder], None)[0].images.blob(sha).data
    assert answer.content != stored
    before, after = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (stored, answer.content))
    assert np.array_equal(before, after)


def test_numbers_that_json_lacks_do_not_break_the_page(tmp_path: Path):
    folder = write_run(tmp_path / "nan", steps=2, prompts=1, size=2)
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["updates"][0]["grad_norm"] = float("nan")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    app = make_app(open_runs([folder], None), TOKEN)

    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get("/api/overview", headers={"authorization": f"Bearer {TOKEN}"})

    answer = asyncio.run(ask())
    assert "NaN" not in answer.text
    assert [one["name"] for one in answer.json()["runs"][0]["advisories"]] == ["not_finite"]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<reason>a</reason>\n<answer>b</answer>", ["reason", "answer"]),
        ("a <reason>b</reason> c", ["text", "reason", "text"]),
        ("<reason>never closed", ["reason"]),
        ("plain", ["text"]),
        (" \n", []),
        ("<tool_call>{}</tool_call>", ["tool_call"]),
    ],
)
def test_messages_are_taken_apart(text: str, kinds: list[str]):
    assert [piece["kind"] for piece in segments(text)] == kinds


@pytest.mark.parametrize(
    ("code", "boxes"),
    [
        ("image_1.crop((1, 2, 30, 40)).show()", [(1, 2, 30, 40)]),
        ("box = [1, 2, 30, 40]\nimage_1.crop(box)\nimage_1.crop(box=box)", [(1, 2, 30, 40)]),
        ("image_1.crop((0.4, 2, 30.6, -40))", [(0, 2, 31, -40)]),
        ("this is no code .crop((1,2,3,4))", [(1, 2, 3, 4)]),
        ("image_1.crop((w // 2, 0, w, h))", []),
        ("image_1.crop((1, 2, 3))", []),
        ("crop = '(1, 2, 3, 4)'", []),
        ("image_1.crop(('a', 2, 3, 4))", []),
        ("(" * 10_000, []),
    ],
)
def test_boxes_are_read_from_code(code: str, boxes: list[tuple[int, ...]]):
    assert boxes_in(code) == boxes


def test_a_box_counts_only_if_its_pixels_are_those_that_came_back():
    source, other = photo(1), photo(2)
    cut = source.crop(BOX)
    code = f"image_1.crop({BOX})"
    assert find_crop(code, cut, [source]) == Crop(0, BOX, (256, 192))
    assert find_crop(code, cut.resize((960, 640), Image.Resampling.LANCZOS), [other, source]) == Crop(1, BOX, (256, 192))
    assert find_crop(code, cut.resize((48, 32)), [source]) == Crop(0, BOX, (256, 192))
    out = io.BytesIO()
    cut.save(out, "JPEG", quality=85)
    assert find_crop(code, Image.open(out).convert("RGB"), [source]) == Crop(0, BOX, (256, 192))
    assert find_crop(code, other.crop(BOX), [source]) is None
    assert find_crop("image_1.crop((40, 40, 136, 104))", cut, [source]) is None
    assert find_crop(code, cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT), [source]) is None
    assert find_crop(code, cut.rotate(90, expand=True), [source]) is None


def test_no_box_is_drawn_where_pixels_tell_nothing_or_where_it_lies_outside():
    plain, source = Image.new("RGB", (200, 200), "white"), photo(1)
    assert find_crop("image_1.crop((0, 0, 50, 50))", plain.crop((100, 100, 150, 150)), [plain]) is None
    assert find_crop("image_1.crop((200, 100, 300, 250))", source.crop((200, 100, 300, 250)), [source]) is None
    assert find_crop("image_1.crop((0, 0, 256, 192))", source, [source]) is None


HEALTHY = 14


@functools.cache
def healthy() -> tuple[StepStats, ...]:
    maker = Maker(1)
    groups = [maker.group(row, 0, 8, 0.5) for row in range(9)]
    made = [stats(step, 0.5, groups, maker.generator) for step in range(HEALTHY)]
    return tuple(dataclasses.replace(one, signal_share=0.5, judge_failed_rate=0.0) for one in made)


def steps(change: Callable[[int, StepStats], StepStats] = lambda step, one: one) -> list[StepStats]:
    """Steps in which nothing is sick, changed."""
    return [change(one.step, one) for one in healthy()]


def sliced(one: StepStats, name: str, **changes: float) -> StepStats:
    old = one.slices.get(name, Slice(16, 0, 0.5, 0.5, 0.7, 1.0, 50.0))
    return dataclasses.replace(one, slices={**one.slices, name: dataclasses.replace(old, **changes)})


def gap(one: StepStats, value: float) -> StepStats:
    return dataclasses.replace(one, updates=tuple(dataclasses.replace(update, engine_gap=value) for update in one.updates))


CASES: dict[str, tuple[int, Callable[[int, StepStats], StepStats]]] = {
    "no_tool_signal": (6, lambda step, one: dataclasses.replace(one, signal_share=0.5 if step < 6 else 0.0)),
    "tools_given_up": (7, lambda step, one: sliced(one, "tool_needed", tool_rate=0.9 if step < 7 else 0.2)),
    "gap_growing": (8, lambda step, one: gap(one, 0.004 if step < 8 else 0.05)),
    "judge_failing": (11, lambda step, one: dataclasses.replace(one, judge_failed_rate=0.0 if step < 11 else 0.2)),
    "infrastructure_failing": (12, lambda step, one: dataclasses.replace(one, infra_failed_rate=0.0 if step < 12 else 0.2)),
    "never_varies": (4, lambda step, one: sliced(one, "direct", num=24, accuracy=0.0, tool_rate=1.0, tool_calls=1.0)),
    "engine_idle": (0, lambda step, one: dataclasses.replace(one, seconds={"rollout": 1.0, "update": 4.0})),
}


def test_a_healthy_run_has_no_advisory():
    assert advisories(steps(), {}) == []
    assert advisories([], {}) == []


@pytest.mark.parametrize("name", CASES)
def test_each_advisory_says_its_step_and_why_and_what_to_try(name: str):
    since, change = CASES[name]
    found = advisories(steps(change), {})
    assert [(one.name, one.step) for one in found] == [(name, since)]
    assert found[0].why and found[0].attempt and found[0].sick == (name != "engine_idle")


@pytest.mark.parametrize("name", CASES)
def test_what_has_passed_is_no_advisory(name: str):
    change = CASES[name][1]
    assert advisories([*steps(change), *steps()[-3:]], {}) == []


def test_a_sick_run_gets_no_tuning_tip():
    idle, failing = CASES["engine_idle"][1], CASES["judge_failing"][1]
    found = advisories(steps(lambda step, one: idle(step, failing(step, one))), {})
    assert [one.name for one in found] == ["judge_failing"]


def test_advisories_know_the_settings_and_the_stored_rollouts():
    silent = CASES["no_tool_signal"][1]
    assert advisories(steps(silent), {"loss.w_tool": 0.0}) == advisories(steps(silent), {"score.estimator": "grpo"}) == []
    assert advisories(steps(CASES["engine_idle"][1]), {"rollout.mode": "async"}) == []
    shares = {step: 0.5 if step < 5 else 0.0 for step in range(HEALTHY)}
    assert [(one.name, one.step) for one in advisories(steps(), {}, shares)] == [("no_accuracy_signal", 5)]
    learnt = steps(lambda step, one: sliced(one, "direct", num=24, accuracy=1.0, tool_rate=0.0, tool_calls=0.0))
    assert [(one.name, one.sick) for one in advisories(learnt, {})] == [("never_varies", False)]
