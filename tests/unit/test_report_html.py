"""The report of a run: complete, self-contained, and safe whatever the model wrote. The run is made up."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from metis_fast import cli
from metis_fast import config as configuration
from metis_fast.config import LogConfig
from metis_fast.errors import DataError
from metis_fast.report.curves import draw_curves
from metis_fast.report.html import write_report
from metis_fast.report.log import Evaluation, RunLog, step_scalars
from metis_fast.report.slices import KINDS, slices
from metis_fast.report.summary import write_summary
from metis_fast.rollout.store import RolloutStore
from metis_fast.types import (
    Avoided,
    ImageBlob,
    ImageSpan,
    Message,
    Outcome,
    Prompt,
    Rollout,
    Savings,
    Score,
    ScoredGroup,
    Slice,
    StepStats,
    ToolCall,
    Turn,
    UpdateStats,
    Verdict,
)

ATTACK = "<script>alert('<img src=x onerror=1>')</script>"
CODE = "for panel in (1, 2):\n    crop = image_1.crop((0, 0, 32 * panel, 32))\n    crop.show()\nprint('digits:', 42)"


def picture(colour: str, text: str) -> ImageBlob:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 6, 57, 57), fill=colour)
    draw.text((24, 24), text, fill="white")
    out = io.BytesIO()
    image.save(out, "PNG")
    return ImageBlob.of(out.getvalue())


CHART, CROP = picture("navy", "42"), picture("darkred", "4")


def conversation(uid: str, index: int, *, tool: bool, correct: bool) -> Rollout:
    num = 40 if tool else 20
    sampled = np.zeros(num, bool)
    sampled[10:20] = True
    sampled[30:] = True
    last = Turn(
        f"<reason>The observation says 42.</reason>\n<answer>{42 if correct else 41}</answer>",
        30 if tool else 10,
        num,
        num,
        Outcome.ANSWERED,
    )
    call = ToolCall("python", json.dumps({"code": CODE}))
    text = f"<reason>I should look closer. {ATTACK}</reason>\n<tool_call>{json.dumps({'name': 'python'})}</tool_call>"
    look = Turn(text, 10, 20, 30, Outcome.TOOL_RESULT, call, f"digits: 42 {ATTACK} <image>", 0.31)
    return Rollout(
        prompt_uid=uid,
        index=index,
        tokens=np.arange(num, dtype=np.int32),
        prompt_len=10,
        sampled=sampled,
        logp=np.where(sampled, -0.5, 0).astype(np.float32),
        weight_version=np.where(sampled, 1, -1).astype(np.int32),
        images=(CHART, CROP) if tool else (CHART,),
        image_spans=(ImageSpan(CHART.sha256, 2, 6, (1, 4, 4)), ImageSpan(CROP.sha256, 22, 26, (1, 4, 4)))
        if tool
        else (ImageSpan(CHART.sha256, 2, 6, (1, 4, 4)),),
        turns=(look, last) if tool else (last,),
        outcome=Outcome.ANSWERED,
    )


def groups(tool_rate: dict[str, float], accuracy: dict[str, float], seed: int, per_prompt: int = 8) -> list[ScoredGroup]:
    """One group of every ability and kind, its rollouts drawn with the given rates; one rollout without a verdict."""
    generator = np.random.default_rng(seed)
    made = []
    for ability in ("math", "perception", "search"):
        for kind in KINDS:
            uid = f"train.parquet:{len(made)}"
            prompt = Prompt(
                uid,
                "demo",
                (Message("user", "<image>?"),),
                (CHART,),
                ability,
                ("42",),
                "rule",
                f"Which number is written in the {kind} panel? {ATTACK}",
                {"kind": kind},
            )
            rollouts, scores = [], []
            for index in range(per_prompt):
                tool, correct = bool(generator.random() < tool_rate[kind]), bool(generator.random() < accuracy[kind])
                rollouts.append(conversation(uid, index, tool=tool, correct=correct))
                r_tool = (0.5 if tool else 1.0) * correct
                verdict = Verdict(correct, True, "42" if correct else "41", f"llm {ATTACK}", f"says {ATTACK}")
                scores.append(
                    Score(verdict, Outcome.ANSWERED, 0.9 * correct + 0.1, r_tool, 0.71, -1.22, correct, correct, True)
                )
            if not made:
                broken = dataclasses.replace(rollouts[0], outcome=Outcome.INFRASTRUCTURE_ERROR, error=f"server gone {ATTACK}")
                rollouts[0], scores[0] = broken, Score(None, Outcome.INFRASTRUCTURE_ERROR)
            made.append(ScoredGroup(prompt, tuple(rollouts), tuple(scores)))
    return made


def rates_at(progress: float) -> tuple[dict[str, float], dict[str, float]]:
    tool_rate = {"direct": 0.95 - 0.9 * progress, "uncertain": 0.9 - 0.3 * progress, "tool_needed": 0.97}
    accuracy = {"direct": 0.7 + 0.25 * progress, "uncertain": 0.55 + 0.2 * progress, "tool_needed": 0.6 + 0.25 * progress}
    return tool_rate, accuracy


def write_run(folder: Path, num_steps: int) -> None:
    generator = np.random.default_rng(0)
    store = RolloutStore(folder / "rollouts")
    with RunLog(folder, LogConfig(tensorboard=False)) as log:
        for step in range(num_steps):
            progress = step / max(num_steps - 1, 1)
            batch = groups(*rates_at(progress), seed=step)
            if step % 10 == 0 or step == num_steps - 1:
                store.write(f"step-{step:06d}", batch)
                log.evaluation(step, slices(groups(*rates_at(progress), seed=1000 + step, per_prompt=16)))
            update = UpdateStats(
                loss=-0.01 * generator.random(),
                loss_acc=-0.01 * progress,
                loss_tool=-0.02 * progress**2,
                grad_norm=float(generator.lognormal(-0.5, 0.3)),
                lr=1e-6,
                clip_acc=0.002 * generator.random(),
                clip_tool=0.003 * generator.random(),
                kl=1e-4 * generator.random(),
                ratio_max=1 + float(generator.exponential(0.6)),
                ratio_min=float(np.exp(-generator.exponential(0.5))),
                entropy=0.9 - 0.5 * progress,
                engine_gap=0.004,
                num_tokens=9000,
                flops=9e12,
                avoided=Savings(rollouts=Avoided(30, 2e12), prompts=Avoided(120, 5e11)),
                n_acc=5000,
                n_tool=2500,
            )
            log.step(
                StepStats(
                    step=step,
                    epoch=0,
                    reward_acc=0.6 + 0.3 * progress,
                    reward_tool=0.3 + 0.3 * progress,
                    slices=slices(batch),
                    outcomes={"answered": 68, "length": 2, "turn_limit": 1, "infrastructure_error": 1},
                    tool_errors=3,
                    qualifying_share=0.6 + 0.3 * progress,
                    signal_share=0.2 + 0.5 * progress * (1 - progress),
                    bad_rows_skipped=0,
                    updates=(update, update),
                    seconds={"rollout": 4 + generator.random(), "score": 0.3, "train": 2.5 - progress, "sync": 0.2},
                )
            )
    config = configuration.build({"run": {"seed": 7, "dir": str(folder)}, "loss": {"w_tool": 0.2}, "rollout": {"max_turns": 3}})
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    before, after = (slices(groups(*rates_at(progress), seed=5, per_prompt=64)) for progress in (0.0, 1.0))
    write_summary(folder / "summary.json", seed=7, wall_s=1503.2, before=before, after=after)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo-hdpo"
    write_run(folder, 21)
    return folder


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the text of its titles, cells and `pre` blocks."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("h1", "h2", "h3", "pre", "td"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture(scope="module")
def page(run_dir) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_report_has_every_section_and_every_curve(page: Page):
    assert page.texts["h1"] == ["demo-hdpo"]
    assert page.texts["h2"] == [
        "Before and after, on held-out prompts",
        "Curves over steps",
        "How rollouts ended",
        "Conversations",
        "Configuration that differs from the defaults",
    ]
    assert page.texts["h3"] == [
        "Held-out accuracy",
        "Held-out tool rate",
        "Accuracy by kind",
        "Tool rate by kind",
        "Accuracy by ability",
        "Tool rate by ability",
        "Rewards",
        "Losses",
        "Qualifying and signal shares",
        "Clip fractions",
        "Entropy",
        "Gradient norm",
        "Ratio extremes",
        "Engine gap and KL",
        "Response length",
        "Outcomes",
        "FLOPs of the update",
        "Time by stage",
        "Step 0",
        "Step 10",
        "Step 20",
    ]


def test_text_of_the_model_and_the_data_never_becomes_markup(page: Page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "link"}
    assert all((attributes["src"] or "").startswith("data:image/jpeg") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = "\n".join(page.texts["pre"])
    for start in ("I should look closer. ", "digits: 42 ", "panel? ", "server gone "):
        assert start + ATTACK in shown, "the reader sees the text as it was written"


def test_report_asks_nothing_of_the_network(run_dir: Path, page: Page):
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    names = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")
    addresses = [value or "" for _, attributes in page.tags for name, value in attributes.items() if name in names]
    addresses += re.findall(r"url\(([^)]*)\)", text)
    assert addresses
    assert [address for address in addresses if not address.startswith(("data:", "#"))] == []
    assert "@import" not in text
    policies = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_conversations_show_right_and_wrong_ones_with_calls_line_breaks_and_images(page: Page):
    assert f"code\n{CODE}" in page.texts["pre"]
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    pixels = {Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).getpixel((10, 40)) for uri in images}
    assert len(pixels) == 2, "the image of the prompt and the one that the tool returned"
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
    assert "tag good" in classes and "tag bad" in classes


def test_table_compares_before_and_after(run_dir: Path, page: Page):
    summary = json.loads((run_dir / "summary.json").read_text())
    row = page.texts["td"].index("direct")
    expected = [summary[side]["direct"][rate] for rate in ("tool_rate", "accuracy") for side in ("before", "after")]
    cells = [cell for cell in page.texts["td"][row + 1 : row + 7] if cell != "→"]
    assert cells == [f"{value:.1%}" for value in expected]


def test_only_values_that_differ_from_the_defaults_are_listed(run_dir: Path, page: Page):
    cells = page.texts["td"]
    start = cells.index("run.dir")
    assert cells[start:] == [
        "run.dir",
        str(run_dir),
        "runs/default",
        "run.seed",
        "7",
        "0",
        "rollout.max_turns",
        "3",
        "10",
        "loss.w_tool",
        "0.2",
        "0.15",
    ]


@pytest.mark.usefixtures("page")  # which has written it once
def test_report_repeats_byte_for_byte(run_dir: Path):
    first = (run_dir / "report.html").read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_a_running_run_of_one_step_has_a_report(tmp_path: Path):
    write_run(tmp_path, 1)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "config.yaml").unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Conversations" in page.texts["h2"]
    assert "Before and after, on held-out prompts" not in page.texts["h2"]


def test_parts_of_steps_that_a_resume_dropped_are_not_shown(tmp_path: Path):
    write_run(tmp_path, 1)
    RolloutStore(tmp_path / "rollouts").write("step-000009", groups(*rates_at(1), seed=1))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Step 0" in page.texts["h3"]
    assert "Step 9" not in page.texts["h3"]


def test_an_image_that_cannot_be_decoded_does_not_stop_the_report(tmp_path: Path):
    blob = ImageBlob.of(b"no image")
    (first, *_) = groups(*rates_at(0), seed=0)
    spans = (ImageSpan(blob.sha256, 2, 6, (1, 4, 4)),)
    rollout = dataclasses.replace(
        conversation(first.prompt.uid, 1, tool=False, correct=True), images=(blob,), image_spans=spans
    )
    group = dataclasses.replace(first, rollouts=(rollout,), scores=first.scores[1:2])
    RolloutStore(tmp_path / "rollouts").write("step-000000", [group])
    assert "an image that cannot be decoded" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"expected a run's metrics\.jsonl") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_settings_of_any_shape_and_none_at_all_do_not_end_in_a_traceback(tmp_path: Path):
    write_run(tmp_path, 1)
    (tmp_path / "config.yaml").write_text("1: {2: 3}\n")
    assert "1.2" in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    notes: list[str] = []
    assert "config.yaml is not valid YAML" in write_report(tmp_path, notes.append).read_text(encoding="utf-8")
    assert len(notes) == 1 and "config.yaml" in notes[0]


def test_what_is_damaged_or_of_a_newer_version_is_said_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    write_run(tmp_path, 6)
    path = tmp_path / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["newer"] = {"deep": [1]}
        record["slices"]["all"]["spread"] = 0.5
        record["updates"][0]["avoided"]["padding"] = {"tokens": 1, "flops": 2.0}
    records[3]["seconds"] = {"rollout": {"wall": 1.0}}
    records[4]["outcomes"] = {"answered": 10**400}
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "cut')
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["after"]["calibration"] = 0.3
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "rollouts" / "step-000005.parquet").write_bytes(b"PAR1 cut")
    (tmp_path / "benchmarks" / "vstar").mkdir(parents=True)
    (tmp_path / "benchmarks" / "vstar" / "result.json").write_text("{}")
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    notes = json.loads(captured.out)["notes"]
    text = " ".join(notes)
    for said in (
        "2 lines are no records of this version and are left out; the first is line 4: seconds.rollout",
        "newer, slices.spread, updates.avoided.padding", "no end yet", "after.calibration", "step-000005.parquet", "vstar",
    ):  # fmt: skip
        assert said in text, said
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "6 things are missing" in caplog.text
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.texts["h2"][:3] == ["What is missing", "Before and after, on held-out prompts", "Curves over steps"]
    assert "Step 0" in page.texts["h3"] and "Step 5" not in page.texts["h3"]


def test_no_content_of_a_file_stops_the_report(tmp_path: Path):
    rates = slices(groups(*rates_at(0.5), seed=5, per_prompt=2))
    write_summary(tmp_path / "summary.json", seed=7, wall_s=1.0, before=rates, after=rates)
    (tmp_path / "eval.jsonl").write_text(json.dumps(dataclasses.asdict(Evaluation(0, rates))) + "\n")
    contents = (
        "[]\n",
        "null\n",
        "{}\n",
        "\x00\n",
        '{"step": "a"}\n',
        "[" * 1100 + "\n",
        "1e999\n",
        "a: 2020-13-45\n",
        "\ud800\n",
    )
    for name in ("metrics.jsonl", "eval.jsonl", "summary.json", "config.yaml"):
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else b""
        for content in contents:
            path.write_text(content, errors="surrogatepass")
            notes: list[str] = []
            page = Page(write_report(tmp_path, notes.append).read_text(encoding="utf-8"))
            assert page.texts["h1"] == [tmp_path.name], (name, content)
            assert name == "config.yaml" or any(name in note for note in notes), (name, content)
        path.write_bytes(before)


def test_a_report_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path):
    write_run(tmp_path, 1)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".report*"))


def test_a_slice_where_nothing_was_judged_is_no_point_of_a_curve():
    unjudged, judged = Slice(4, 4, 0.0, 0.0, 0.0, 0.0, 0.0), Slice(4, 1, 0.5, 0.0, 0.0, 1.0, 9.0)
    stats = StepStats(0, 0, 0.0, 0.0, {"search": unjudged, "math": judged}, {}, 0, 0.0, 0.0, 0, (), {})
    tags = step_scalars(stats)
    assert tags["accuracy/math"] == 0.5
    assert "accuracy/search" not in tags


def test_staleness_and_what_a_step_left_have_curves_only_where_rollouts_ran_ahead():
    plain = [StepStats(step, 0, 0.0, 0.0, {}, {}, 0, 0.0, 0.0, 0, (), {}, staleness=(100,)) for step in range(2)]
    ahead = [*plain, dataclasses.replace(plain[0], step=2, staleness=(0, 25, 75), groups_in_flight=8)]
    titles = [{curve.title for curve in draw_curves(steps, [])} for steps in (plain, ahead)]
    assert titles[1] - titles[0] == {"Staleness", "Groups a step left"}
