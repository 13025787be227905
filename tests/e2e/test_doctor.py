"""What `metis-fast doctor` finds: nothing in a job that would run, and each thing that would stop one, with what to do."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import AGENT

from metis_fast import cli
from metis_fast.config import load
from metis_fast.standin import StandinPaths, write_standin
from metis_fast.testing.judge import JudgeServer, serving
from metis_fast.testing.search import SearchServer
from metis_fast.testing.search import serving as serving_search
from metis_fast.tools.search import open_text_source

_JSON = tuple[int, list[dict[str, str]]]


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> StandinPaths:
    return write_standin(tmp_path_factory.mktemp("standin"), rows=8, pixels=(320, 256))


@pytest.fixture
def config(standin: StandinPaths, tmp_path: Path) -> Path:
    """A job that would run: the agent of these tests, stand-ins for prompts."""
    path = tmp_path / "job.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\nmodel: {{path: {AGENT}, dtype: float32}}\ndata: {{train: [{standin.rl}]}}\n"
        "tools: {enabled: [python]}\nscore: {judge: rule}\n"
    )
    return path


def _doctor(capsys: pytest.CaptureFixture[str], *words: object) -> _JSON:
    code = cli.main(["doctor", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)["findings"]


def _wrong(found: list[dict[str, str]], state: str = "error") -> list[str]:
    return [f"{one['area']}: {one['found']} -> {one['advice']}" for one in found if one["state"] == state]


def test_a_job_that_would_run_has_no_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _doctor(capsys, config)
    assert (code, _wrong(found)) == (0, []), found
    areas = list(dict.fromkeys(one["area"] for one in found))
    assert areas == ["settings", "machine", "packages", "model", "data.train", "tools", "judges"]
    assert cli.main(["doctor", str(config)]) == 0
    assert "0 errors" in capsys.readouterr().out


def test_of_a_demo_that_is_not_made_yet_the_stages_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, run = Path(__file__).parents[2] / "configs" / "demo.yaml", tmp_path / "a run"
    code, found = _doctor(capsys, demo, f"run.dir={run}")
    assert (code, _wrong(found)) == (0, [])
    assert {one["area"] for one in found} == {"settings", "machine", "packages"}
    (said,) = [text for text in _wrong(found, "warning") if text.startswith("settings")]
    assert said == (
        f"settings: not made yet in {run}: data, model, play base, play cold_start, sft -> "
        f"metis-fast demo {demo} 'run.dir={run}' makes them; ask again then"
    )
    (run / "cold_start").mkdir(parents=True)  # half made, and doctor asked in it
    (run / "stages.json").write_text('{"data": 1.5, "model": 2}')
    monkeypatch.chdir(run)
    code, found = _doctor(capsys, demo, "run.dir=.")
    assert code == 0 and "not made yet in .: play base, play cold_start, sft -> " in "".join(_wrong(found, "warning"))
    (run / "stages.json").write_text('["data"')
    code, found = _doctor(capsys, demo, "run.dir=.")
    assert code == 1 and "remove it to make all stages again" in "".join(_wrong(found))


@pytest.mark.parametrize(
    "own",
    [
        "sft.phases=[{trajectories: base, steps: 1}]",
        "model.path=no/model",
        "data.train=[no.parquet]",
        "data.heldout=[no.parquet]",
        "tools.text_search.corpus=no.parquet",
    ],
)
def test_what_only_looks_like_a_demo_is_looked_at_whole(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    code, found = _doctor(capsys, demo, f"run.dir={tmp_path / 'run'}", own)
    assert code == 1 and {"model", "sft"} <= {one["area"] for one in found if one["state"] == "error"}


def _lacks_weights(folder: Path) -> list[str]:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    return []


def _cut_off(folder: Path) -> list[str]:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return []


def _index(text: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)
        return []

    return write


_BROKEN: list[tuple[str, Callable[[Path], list[str]] | list[str], str]] = [
    ("unknown setting", ["rollout.temprature=1"], "settings: "),
    ("weights missing", _lacks_weights, "model: .* lacks model.language_model.norm.weight -> download"),
    ("weights cut off", _cut_off, "model: .*model.safetensors cannot be read .* -> download it again"),
    ("index cut off", _index("{"), "model: .*index.json is not valid JSON .* -> restore"),
    ("index of nothing", _index("{}"), "model: .*index.json has no weight_map .* -> restore"),
    ("index of numbers", _index('{"weight_map": {"a": 1}}'), "model: .*index.json has no weight_map .* -> restore"),
    ("no model", ["model.path=nowhere"], "model: .*nowhere is not a folder -> give one"),
    ("no data", ["data.train=nowhere.parquet"], "data.train: .*no such file -> give the path"),
    ("long prompts", ["rollout.max_prompt_tokens=100"], "data.train: a prompt has .* -> raise that"),
    ("no corpus", ["tools.enabled=[text_search]"], "tools: text_search has no corpus -> set tools.text_search.corpus"),
    ("no key", ["tools.enabled=[text_search]", "tools.text_search.provider=serper"], "tools: .*SERPER_API_KEY"),
    ("no judge", ["score.judge=llm"], "judges: .* -> "),
    ("dead judge", ["score.judge=llm", "score.llm.base_url=http://127.0.0.1:9/v1", "score.llm.retries=0"], "judges: .*9/v1"),
    ("no Ray", ["workers.launcher=ray", "workers.ray_address=127.0.0.1:9"], "Ray: no Ray cluster at .* -> see that it runs"),
    ("bad layout", ["train.backend=megatron", "train.megatron.tensor_parallel=7"], "layout: .* -> "),
]


@pytest.mark.parametrize(("broken", "expected"), [one[1:] for one in _BROKEN], ids=[one[0] for one in _BROKEN])
def test_what_would_stop_the_job_is_named_with_what_to_do(
    broken: Callable[[Path], list[str]] | list[str],
    expected: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    if callable(broken):
        folder = tmp_path / "model"
        shutil.copytree(AGENT, folder)
        broken = [*broken(folder), f"model.path={folder}"]
    code, found = _doctor(capsys, config, *broken)
    assert code == 1
    assert any(re.search(expected, line) for line in _wrong(found)), _wrong(found)
    assert all(one["advice"] for one in found if one["state"] != "ok")


def test_a_judge_that_answers_is_asked_for_two_verdicts_and_offline_it_is_not(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = JudgeServer(models=("grader",))
    with serving(server) as url:
        own = ["score.judge=llm", f"score.llm.base_url={url}"]
        assert _doctor(capsys, config, *own)[0] == 0
        assert len(server.tasks) == 2
        assert _doctor(capsys, config, *own, "--offline")[0] == 0
        assert len(server.tasks) == 2


def test_a_search_provider_is_asked_whatever_the_cache_has(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "serper-key-12345678")
    server = SearchServer(key="serper-key-12345678")
    with serving_search(server) as url:
        search = {"provider": "serper", "url": f"{url}/serper", "cache": tmp_path / "searches.sqlite", "retries": 0}
        own = ["tools.enabled=[text_search]", *(f"tools.text_search.{name}={value}" for name, value in search.items())]
        source = open_text_source(load(config, own).tools.text_search)
        for query in ("capital of France", "weather"):  # what the doctor might ask is known
            asyncio.run(source.search(query))
        source.close()
        assert _doctor(capsys, config, *own)[0] == 0
        assert _doctor(capsys, config, *own, "tools.text_search.offline=true")[0] == 0
        server.key = "another-key-87654321"
        code, found = _doctor(capsys, config, *own)
        assert code == 1 and any("HTTP status 403" in line for line in _wrong(found)), found
        server.key, server.find = "serper-key-12345678", lambda query: []
        code, found = _doctor(capsys, config, *own)
        assert code == 1 and any("serper finds nothing" in line for line in _wrong(found)), found


def test_a_bad_row_is_an_error_and_a_warning_where_it_would_be_skipped(
    config: Path, standin: StandinPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    source = next((standin.rl_binary / "data").glob("*.parquet"))
    rows = pq.read_table(source).to_pylist()
    rows[0]["images"] = []
    pq.write_table(pq.read_table(source).from_pylist(rows, pq.read_schema(source)), tmp_path / "bad.parquet")
    own = [f"data.train={tmp_path / 'bad.parquet'}"]
    code, found = _doctor(capsys, config, *own)
    assert code == 1 and any("row 0, column images" in line for line in _wrong(found))
    code, found = _doctor(capsys, config, *own, "data.on_bad_row=skip")
    assert code == 0 and any("row 0, column images" in line for line in _wrong(found, "warning"))
