"""Benchmarks played by a node: prompts, stored replies, failures of ours, judges, and what is made of results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, DataError, InfrastructureError
from metis_fast.evaluate import run
from metis_fast.evaluate.compare import compare_runs
from metis_fast.evaluate.export import FAILED, export_lmms_eval, export_vlmeval
from metis_fast.evaluate.judging import LlmJudges
from metis_fast.evaluate.promptset import FORCED, prepare
from metis_fast.evaluate.replies import ReplyFile, read_lines
from metis_fast.evaluate.result import read_results
from metis_fast.evaluate.standin import write_standins
from metis_fast.evaluate.table import METIS, as_html, as_json, as_latex, as_markdown, make_table
from metis_fast.model import Policy
from metis_fast.node.node import InMemory, Node
from metis_fast.rollout.chat import Chat
from metis_fast.run.fleet import Fleet
from metis_fast.run.interrupt import Interrupts
from metis_fast.score.judge import open_judge
from metis_fast.standin import write_standin
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.testing.judge import JudgeServer, Reply, completion, serving
from metis_fast.types import Observation

N = 4
CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
Json = dict[str, Any]


class Engine(FakeEngine):
    """One model behind it."""

    num_replicas = 1


@pytest.fixture(scope="session")
def vstar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_standins(tmp_path_factory.mktemp("files"), ["vstar"], count=N, pixels=(32, 32))["vstar"].tsv[0]


@pytest.fixture
def config(tmp_path: Path, vstar: Path) -> Callable[..., Config]:
    def make(name: str = "run", score: Json | None = None, rollout: Json | None = None, **benchmark: Any) -> Config:
        tree = {
            "run": {"dir": tmp_path / name},
            "log": {"progress": False},
            "model": {"path": tmp_path},
            "rollout": {"max_prompt_tokens": 20000, "max_response_tokens": 400, "retries": 0, "max_turns": 3} | (rollout or {}),
            "benchmark": {"files": {"vstar": [vstar]}, "any_md5": True} | benchmark,
            "score": score or {},
        }
        return Config.model_validate(tree)

    return make


@pytest.fixture
def play(policy: Policy, chat: Chat) -> Callable[..., Json]:
    """Plays V*Bench with an agent that says given messages, one list a rollout; returns the result."""

    def run_it(config: Config, scripts: Sequence[Sequence[str]], tools: FakeToolbox | None = None) -> Json:
        prompts = prepare(config, "vstar", progress=False)
        engine, files = Engine(policy.tokenizer, scripts), {"benchmark": PromptFiles([prompts.parquet], any_style=True)}
        judge = open_judge(config.score.model_copy(update={"judge": "by_row"}), ())
        tools = tools or FakeToolbox([Observation("ok")])
        node = Node(0, config, chat, engine, tools, judge, files, policy.images.broken, InMemory())  # type: ignore[arg-type]
        (table,) = run.open_tables(config, [prompts])
        with Interrupts() as interrupts:
            run.play(config, Fleet([node], config), table, interrupts)
            return run.score(config, table, interrupts)

    return run_it


def answers(vstar: Path) -> list[str]:
    with vstar.open(newline="") as file:
        return [row["answer"] for row in csv.DictReader(file, delimiter="\t")]


def test_right_answers_score_and_calls_are_counted(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    truth = answers(vstar)
    scripts = [[f"<answer>{letter}</answer><|im_end|>"] for letter in truth]
    scripts[0].insert(0, CALL)
    scripts[1] = [f"<answer>{'A' if truth[1] != 'A' else 'B'}</answer><|im_end|>"]
    result = play(config(), scripts)
    assert result["complete"] and result["replies"] == N and not result["infrastructure_failures"]["num"]
    for scorer in ("rule", "vlmeval"):
        assert result["scorers"][scorer]["figures"][0]["value"] == 0.75, scorer
    assert result["tool_rate"]["value"] == 0.25 and result["tool_calls"]["by_tool"] == {"python": 1}
    assert result["weight_versions"] == [0] and result["tokens"]["sampled"] > 0 and result["tokens"]["observation"] > 0
    assert result["files"][0]["rows"] == N and len(result["files"][0]["md5"]) == 32
    assert any("a part is no score of the whole" in warning for warning in result["warnings"])


def test_without_tools_a_call_is_refused_whatever_the_run_offers(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    tools = FakeToolbox([Observation("ok")])
    scripts = [[CALL, f"<answer>{letter}</answer><|im_end|>"] for letter in answers(vstar)]
    result = play(config(tools="off"), scripts, tools)
    assert tools.calls == [] and result["tool_calls"]["errors"] == N
    assert "# Tools" not in result["settings"]["system"]


def test_a_failure_of_ours_is_no_reply_and_is_tried_again(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    scripts = [[f"<answer>{letter}</answer><|im_end|>"] for letter in answers(vstar)]
    scripts[2] = [CALL, *scripts[2]]
    broken = play(config(), scripts, FakeToolbox([InfrastructureError("the sandbox is gone")]))
    assert not broken["complete"] and broken["replies"] == N - 1
    assert broken["infrastructure_failures"] == {"num": 1, "reasons": {"the sandbox is gone": 1}}
    for scored in broken["scorers"].values():
        assert scored["figures"][0]["value"] == 1.0 and scored["figures"][0]["missing"] == 1
        assert scored["reasons"] == {"no reply: tools or engines failed": 1}
    whole = play(config(), scripts)
    assert whole["complete"] and whole["infrastructure_failures"] == {"num": 0, "reasons": {}}
    fresh = play(config("other"), scripts)
    files = [config(name).run.dir / "benchmarks" / "vstar" for name in ("run", "other")]
    for name in ("replies.jsonl", "marks.jsonl", "settings.json"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes(), name
    assert whole | {"seconds": 0} == fresh | {"seconds": 0}


def test_rollouts_are_side_by_side_where_no_batch_decides(config: Callable[..., Config], play: Callable[..., Json]) -> None:
    scripts = [["<answer>A</answer><|im_end|>"], ["<answer>B</answer><|im_end|>"]] * N
    result = play(config(rollouts=2, rollout={"deterministic": False, "max_concurrent": 3}), scripts)
    assert result["replies"] == 2 * N
    replies = read_lines(config().run.dir / "benchmarks" / "vstar" / "replies.jsonl")
    places = [(reply["index"], reply["rollout"], reply["prediction"]) for reply in replies]
    assert places == [(str(i), j, "AB"[j]) for i in range(N) for j in range(2)]


def test_prompts_are_written_once_and_again_when_they_would_differ(config: Callable[..., Config], vstar: Path) -> None:
    made = prepare(config(), "vstar", progress=False)
    stamp = made.parquet.stat().st_mtime_ns
    again = prepare(config(), "vstar", progress=False)
    assert again.parquet.stat().st_mtime_ns == stamp and [q.answer for q in again.questions] == answers(vstar)
    prompts = PromptFiles([made.parquet], any_style=True)
    assert [len(prompts.read(row).images) for row in range(N)] == [1] * N and prompts.read(0).tools is None
    assert prompts.read(0).messages[0].role == "system" and "# Tools" in prompts.read(0).messages[0].content
    forced = prepare(config(tools="forced"), "vstar", progress=False)
    assert PromptFiles([forced.parquet]).read(1).messages[-1].content.endswith(f"\n{FORCED}")
    plain = prepare(config(tools="off", system="none"), "vstar", progress=False)
    prompt = PromptFiles([plain.parquet]).read(1)
    assert [message.role for message in prompt.messages] == ["user"] and prompt.tools == ()
    with made.parquet.open("ab") as file:
        file.write(b"torn")
    assert prepare(config(), "vstar", progress=False).parquet.stat().st_size == made.parquet.stat().st_size
    with pytest.raises(ConfigError, match=r"benchmark\.prompt='other': vstar has vlmeval"):
        prepare(config(prompt="other"), "vstar", progress=False)


def test_the_published_system_text_stands_before_each_question(config: Callable[..., Config], tmp_path: Path) -> None:
    """As training has it, whatever the protocol; `system: none` leaves it out."""
    published = write_standin(tmp_path / "standin", 2, (32, 32)).rl / "data" / "train-00000-of-00002.parquet"
    text = PromptFiles([published], any_style=True).read(0).messages[0].content
    own = config(rollout={"protocol": "metis"})
    own = own.model_copy(update={"serve": own.serve.model_copy(update={"system": published})})
    prompts = PromptFiles([prepare(own, "vstar", progress=False).parquet], any_style=True)
    assert len(text) > 500 and [prompts.read(row).messages[0].content for row in range(N)] == [text] * N
    none = own.model_copy(update={"benchmark": own.benchmark.model_copy(update={"system": "none"})})
    plain = PromptFiles([prepare(none, "vstar", progress=False).parquet], any_style=True)
    assert [message.role for message in plain.read(0).messages] == ["user"]


def test_image_marks_in_a_question_are_text(config: Callable[..., Config], vstar: Path, tmp_path: Path) -> None:
    changed = tmp_path / "VStarBench.tsv"
    changed.write_text(vstar.read_text().replace("Question", "Q").replace("\tA\t", "\tA\t").replace("What", "<image> What"))
    own = config().model_copy(update={"benchmark": config(files={"vstar": [changed]}).benchmark})
    made = prepare(own, "vstar", progress=False)
    prompts = [PromptFiles([made.parquet]).read(row) for row in range(N)]
    assert any("<image> What" in prompt.messages[-1].around_images[-1] for prompt in prompts)
    assert {len(prompt.images) for prompt in prompts} == {1}


def test_a_torn_last_line_goes_and_a_foreign_one_is_an_error(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    scripts = [[f"<answer>{letter}</answer><|im_end|>"] for letter in answers(vstar)]
    play(config(), scripts)
    path = config().run.dir / "benchmarks" / "vstar" / "replies.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    indices = [str(i) for i in range(N)]
    assert ReplyFile(path.parent, indices, 1).missing() == [N - 1]
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])
    play(config(), scripts)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"index": "1"', b'"index": "zebra"'))
    with pytest.raises(DataError, match="line 2: expected a reply to a question of this benchmark, got 'zebra'"):
        ReplyFile(path.parent, indices, 1)


def test_replies_of_other_settings_are_not_mixed(config: Callable[..., Config], play: Callable[..., Json]) -> None:
    play(config(), [["<answer>A</answer><|im_end|>"]] * N)
    other = config(temperature=0.5, rollout={"max_turns": 2})
    with pytest.raises(ConfigError, match=r"made with another decoding\.max_turns, decoding\.temperature; move the folder"):
        run.open_tables(other, [prepare(other, "vstar", progress=False)])


def test_replies_with_another_corpus_at_the_same_path_are_not_mixed(config: Callable[..., Config], tmp_path: Path) -> None:
    pages = tmp_path / "pages.parquet"

    def opened(text: str) -> Path:
        pq.write_table(pa.table({"title": ["a"], "link": [""], "text": [text]}), pages)
        own = config(tools="on")
        tools = {"enabled": ["text_search"], "text_search": {"corpus": pages}}
        own = Config.model_validate(own.model_dump() | {"tools": tools})
        (table,) = run.open_tables(own, [prepare(own, "vstar", progress=False)])
        return table.folder

    (opened("b") / "replies.jsonl").touch()
    opened("b")
    with pytest.raises(ConfigError, match=r"made with another tool_files\.tools\.text_search\.corpus"):
        opened("c")


def test_what_cannot_be_scored_is_said_before_anything_is_played(config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"score\.llm\.base_url is empty"):
        run.run_benchmarks(config(judge=True))
    with pytest.raises(ConfigError, match="for logicvista there is no rule of that kind"):
        run.run_benchmarks(config(files={"logicvista": ["x.tsv"]}, scorer="vlmeval"))
    with pytest.raises(ConfigError, match=r"set rollout\.strict=false"):
        run.run_benchmarks(config(rollout={"protocol": "metis", "strict": True}))
    with pytest.raises(ConfigError, match=r"benchmark\.files is empty"):
        run.run_benchmarks(config(files={}))
    with pytest.raises(ConfigError, match="has no file of 'wemath'"):
        run.run_benchmarks(config(), ["wemath"])


def _letter(body: Json) -> Reply:
    """VLMEvalKit's role gets the letter that the answer begins with; ours is told CORRECT."""
    text = body["messages"][-1]["content"]
    return completion(text.split("Answer: ")[1][0] if "Find the option" in text else "CORRECT")


def test_judges_stand_beside_the_rules_and_their_failures_are_no_answers(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    scripts = [[f"{letter}, I think, for more than one reason, is what it is all about<|im_end|>"] for letter in answers(vstar)]
    judge = JudgeServer(refuse=lambda body: None if "1 + 1" in str(body) else _letter(body), models=["m"])
    with serving(judge) as url:
        llm = {"llm": {"base_url": url, "retries": 0, "timeout_s": 30}}
        result = play(config(score=llm, judge=True), scripts)
        scorers = result["scorers"]
        assert scorers["judge:vlmeval"]["figures"][0]["value"] == 1.0 and scorers["judge:llm"]["figures"][0]["value"] == 1.0
        assert scorers["vlmeval"]["figures"][0]["value"] == 0.0 and scorers["rule"]["no_verdict"] == N
        assert result["judge"]["model"] == "m" and result["judge_cost"]["requests"] > 0
        asked = len(judge.bodies)
        play(config(score=llm, judge=True), scripts)
        assert len(judge.bodies) == asked + 4  # two checks of two judges; no verdict is asked for again
        judge.refuse = lambda body: None if "1 + 1" in str(body) else completion("perhaps")
        failed = play(config("failing", score=llm, judge=True), scripts)
    for name in ("judge:vlmeval", "judge:llm"):
        own = failed["scorers"][name]
        assert own["no_verdict"] == N and own["figures"][0]["value"] is None and own["figures"][0]["missing"] == N, name
    kept = config("failing").run.dir / "benchmarks" / "vstar" / "judged.jsonl"
    assert read_lines(kept) == []


def test_judged_verdicts_are_kept_by_what_was_judged(config: Callable[..., Config], tmp_path: Path) -> None:
    own = config(score={"llm": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}}, judge=True)
    benchmark = prepare(own, "vstar", progress=False).benchmark
    (tmp_path / "judged.jsonl").write_text(
        '{"key": "k", "index": "0", "rollout": 0, "scorer": "judge:llm", "value": 1.0}\n{"ke'
    )
    with closing(LlmJudges(own, benchmark, tmp_path)) as judges:
        assert judges.model == "m"
    assert (tmp_path / "judged.jsonl").read_bytes().endswith(b"1.0}\n")


def test_two_runs_are_compared_on_common_questions(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    truth = answers(vstar)
    right = [[f"<answer>{letter}</answer><|im_end|>"] for letter in truth]
    wrong = [[f"<answer>{'A' if letter != 'A' else 'B'}</answer><|im_end|>"] for letter in truth]
    play(config("one", tools="on"), wrong[:2] + right[2:])
    play(config("two", tools="forced"), right)
    found = {one.scorer: one for one in compare_runs(config("one").run.dir, config("two").run.dir)}
    test = found["rule"].test
    assert (test.difference, test.better, test.worse, test.n) == (0.5, 2, 0, N) and test.sign_p == 0.5
    assert "tools: on and forced" in found["rule"].notes
    with pytest.raises(DataError, match=r"expected result\.json here"):
        compare_runs(config("one").run.dir, config("none").run.dir)


def test_tables_stand_beside_the_published_numbers(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path
) -> None:
    play(config("mine"), [[f"<answer>{letter}</answer><|im_end|>"] for letter in answers(vstar)])
    table = make_table([config("mine").run.dir], paper=True)
    (line,) = table.lines
    assert line.cells["mine, rule"].value == 100.0 and line.cells[METIS].value == 91.1
    assert any("a part is no score of the whole" in note for note in table.notes)
    assert any("which judge model" in note for note in table.notes)
    text = as_markdown(table)
    assert "| V*Bench | overall | 100.0 ± 0.0 [1]" in text and all(f"[{i}] " in text for i in range(1, len(table.notes) + 1))
    assert json.loads(as_json(table))["lines"][0]["benchmark"] == "vstar"
    assert as_html(table).count("<li>") == len(table.notes) and "<script" not in as_html(table)
    assert as_latex(table).count(r"\\") == 2 and r"100.0 $\pm$ 0.0" in as_latex(table)


def test_exports_have_every_column_but_the_image(
    config: Callable[..., Config], play: Callable[..., Json], vstar: Path, tmp_path: Path
) -> None:
    scripts = [[f"So\n<answer>{letter}</answer><|im_end|>"] for letter in answers(vstar)]
    scripts[1].insert(0, CALL)
    scripts[2].insert(0, CALL)
    play(config(), scripts, FakeToolbox([Observation("ok"), InfrastructureError("gone")]))
    path = config().run.dir
    (broken,) = [row for row in read_lines(path / "benchmarks" / "vstar" / "failures.jsonl")] or [None]
    stored = read_results(path)
    (tsv,) = export_vlmeval(stored, tmp_path / "kit", "mine")
    assert tsv.name == "mine_VStarBench.tsv" and tsv.parents[1].name == "mine"
    with tsv.open(newline="") as file, vstar.open(newline="") as source:
        rows = list(csv.DictReader(file, delimiter="\t"))
        asked = list(csv.DictReader(source, delimiter="\t"))
    assert len(rows) == N and set(rows[0]) == (set(asked[0]) - {"image"}) | {
        *("prediction", "num_tool_calls", "tool_calls", "outcome")
    }
    for row, question in zip(rows, asked, strict=True):
        lost = broken is not None and row["index"] == broken["index"]
        assert row["prediction"] == (FAILED if lost else question["answer"]) and row["question"] == question["question"]
    assert rows[1]["num_tool_calls"] == "1"
    results, samples = export_lmms_eval(stored, tmp_path / "lmms", "mine")
    assert json.loads(results.read_text())["results"]["vstar"]["rule,none"] == 1.0
    logged = read_lines(samples)
    assert [sample["filtered_resps"] for sample in logged][:2] == answers(vstar)[:2] and logged[0]["rule"] == 1.0
    assert logged[0]["score"] == 1.0 and logged[0]["target"] == answers(vstar)[0] and asked[0]["question"] in logged[0]["input"]


def test_treebench_is_exported_as_xlsx(config: Callable[..., Config], policy: Policy, chat: Chat, tmp_path: Path) -> None:
    files = write_standins(tmp_path / "files", ["treebench"], count=3, pixels=(32, 32))["treebench"].tsv
    own = config(files={"treebench": files}, tools="off", system="none")
    prompts = prepare(own, "treebench", progress=False)
    engine = Engine(policy.tokenizer, [[f"<answer>{said}</answer><|im_end|>"] for said in ("A\x07", "=B", "")])
    parts = {"benchmark": PromptFiles([prompts.parquet], any_style=True)}
    judge = open_judge(own.score, ())
    node = Node(0, own, chat, engine, FakeToolbox(), judge, parts, policy.images.broken, InMemory())  # type: ignore[arg-type]
    (table,) = run.open_tables(own, [prompts])
    with Interrupts() as interrupts:
        run.play(own, Fleet([node], own), table, interrupts)
        result = run.score(own, table, interrupts)
    assert set(result["scorers"]) == {"rule", "vlmeval", "iou"}
    stored = read_results(own.run.dir)
    if find_spec("openpyxl") is None:
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[benchmark\]'"):
            export_vlmeval(stored, tmp_path / "kit", "mine")
        return
    from openpyxl import load_workbook

    (path,) = export_vlmeval(stored, tmp_path / "kit", "mine")
    head, *rows = load_workbook(path, data_only=True).worksheets[0].iter_rows(values_only=True)
    assert path.name == "mine_TreeBench.xlsx" and "image" not in head
    assert [dict(zip(head, row, strict=True))["prediction"] for row in rows] == ["A", "=B", " "]
