"""The paper's configs, rehearsed: real vLLM, real ranks, the published formats and protocol, on stand-ins."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from metis_fast import cli
from metis_fast.config import HttpSearchConfig, TextSearchConfig, load
from metis_fast.plan.shape import read_model_config
from metis_fast.rehearse import endpoints
from metis_fast.rehearse.model import write_model
from metis_fast.rehearse.settings import KEY_VALUE, Places, small
from metis_fast.score.llm_prompt import read_prompt
from metis_fast.tools.search.keys import NO_KEY
from metis_fast.tools.search.providers import Template
from metis_fast.train.megatron import layout

_CONFIGS = Path(__file__).parents[2] / "configs"
_SMALL = ["--pixels", "512x384", "--json"]


def _rehearse(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, str], list[str]]:
    """Exit code, what each stage said, what was left out."""
    code = cli.main(["rehearse", *map(str, words)])
    tree = json.loads(capsys.readouterr().out.splitlines()[-1])
    return code, {stage["name"]: f"{stage['state']}: {stage['said']}" for stage in tree["stages"]}, tree["left_out"]


@pytest.mark.slow  # the next one goes the same way, with all that a real job has
def test_the_papers_hdpo_config_rehearses_with_the_native_engine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    here = ["rollout.engine=native", "rollout.vllm.sleep=0", "train.backend=torch", f"--out={out}"]
    code, said, _ = _rehearse(capsys, _CONFIGS / "qwen3vl_8b_hdpo.yaml", *here, *_SMALL)
    assert code == 0, said
    assert list(said) == ["stand-ins", "tools and judge", "train", "eval"]
    steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [update["grad_norm"] for step in steps for update in step.get("updates", [])]
    assert len(norms) == 4 and all(norm > 0 for norm in norms)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 40 and not [path for path in files if KEY_VALUE.encode() in path.read_bytes()]


@pytest.mark.skipif(find_spec("vllm") is None or find_spec("megatron") is None, reason="needs vLLM and Megatron-core")
def test_the_papers_hdpo_config_rehearses_with_vllm_and_two_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    two = ["train.megatron.pipeline_parallel=1", f"--out={out}"]
    code, said, left = _rehearse(capsys, _CONFIGS / "qwen3vl_8b_hdpo.yaml", *two, *_SMALL)
    assert code == 0, said
    assert list(said) == ["stand-ins", "tools and judge", "train", "eval"]
    assert "24 calls (python, text_search, image_search), 4 of 8 answers right" in said["tools and judge"]
    assert any("2 of the 4 ranks" in line for line in left)
    steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [update["grad_norm"] for step in steps for update in step.get("updates", [])]
    assert len(norms) == 4 and all(norm > 0 for norm in norms)  # a rehearsal without gradients would show nothing
    # nothing that a run writes has a key: logs, rollouts, records, checkpoints, report
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if KEY_VALUE.encode() in path.read_bytes()]


@pytest.mark.skipif(find_spec("megatron") is None, reason="needs Megatron-core")
def test_the_papers_sft_config_rehearses_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = _rehearse(capsys, _CONFIGS / "qwen3vl_8b_sft.yaml", *_SMALL)
    assert code == 0, said
    assert list(said) == ["stand-ins", "sft"] and "2 steps" in said["sft"]


def test_a_stage_that_fails_says_why_and_ends_the_rehearsal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "grader"
    model.write_text("Is {answer} right? The truth is {truth}, the question {question}. Say YES or NO.")
    own = ["score.judge=llm", f"score.llm.prompt={model}", "tools.enabled=[python]", "score.llm.timeout_s=0.0001"]
    code, said, _ = _rehearse(capsys, _CONFIGS / "qwen3vl_8b_hdpo.yaml", *own, *_SMALL)
    assert code == 1
    assert list(said) == ["stand-ins", "tools and judge"]
    assert said["tools and judge"].startswith("failed: LLM judge ")


def test_what_is_not_there_to_rehearse_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "empty.yaml"
    config.write_text("run: {seed: 1}\n")
    assert cli.main(["rehearse", str(config)]) == 2
    assert "names neither sft.phases nor data.train" in capsys.readouterr().err
    config.write_text("data: {train: [x]}\n")
    assert cli.main(["rehearse", str(config), "--pixels", "10"]) == 2
    assert "expected --pixels like 2048x1536" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert cli.main(["rehearse", str(config), "--out", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(_CONFIGS.glob("qwen3vl_*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "provider", ["local", "serper", "brightdata", "serpapi", "http"], ids=lambda provider: f"search-{provider}"
)
def test_every_shipped_config_and_provider_can_be_made_small(path: Path, provider: str, tmp_path: Path) -> None:
    more = ["tools.text_search.url=http://example.org"] if provider == "http" else []
    asked = load(path, [f"tools.text_search.provider={provider}", *more])
    places = Places(*(tmp_path / name for name in "abcde"), judge="http://127.0.0.1:1/v1", search="http://127.0.0.1:2")
    made, left = small(asked, tmp_path, places, image_tokens=300)
    assert made.rollout.protocol == asked.rollout.protocol and made.train.backend == asked.train.backend
    assert made.workers.launcher == asked.workers.launcher and made.rollout.engine == asked.rollout.engine
    assert made.train.megatron.num_ranks <= 4 and any("ranks" in line for line in left)
    assert made.tools.text_search.url.startswith("" if provider == "local" else "http://127.0.0.1")


@pytest.mark.parametrize("path", sorted(_CONFIGS.glob("qwen3vl_*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("virtual", [1, 3])
def test_the_small_model_can_be_cut_as_the_small_layout_says(
    path: Path, virtual: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_CONFIGS.parent)
    asked = load(path, [f"train.megatron.virtual_pipeline={virtual}", "train.megatron.pipeline_parallel=4"])
    write_model(asked, tmp_path / "model", ["some words"])
    places = Places(tmp_path / "model", *(tmp_path / name for name in "bcde"), judge="http://127.0.0.1:1/v1", search="")
    made, _ = small(asked, tmp_path, places, image_tokens=300)
    assert made.train.megatron.pipeline_parallel == 2 and made.train.megatron.virtual_pipeline == min(virtual, 2)
    layout.check(made.train.megatron, read_model_config(made, None))  # raises


def test_the_stand_in_judge_reads_any_prompt_of_a_users_own(tmp_path: Path) -> None:
    own = tmp_path / "prompt.txt"
    own.write_text("[system]\nGrade (strictly).\n[user]\nA? {answer} B: {truth} [C] {question} again {answer}.")
    for prompt in (read_prompt(None), read_prompt(own)):
        server = endpoints.judge(prompt)
        for truth, answer, word in (("3/8", "3/8", "CORRECT"), ('a "b" {c}', 'A "B" {c}', "CORRECT"), ("3", "8", "INCORRECT")):
            body = {"messages": prompt.messages("What?\nNow?", truth, answer)}
            reply = json.loads(server.answer("/v1/chat/completions", body, {}).payload)
            assert reply["choices"][0]["message"]["content"] == word


def test_a_template_finds_its_pages_where_it_looks_for_them() -> None:
    template = HttpSearchConfig(results="data.0.items", title="name", link="about.url", snippet="about.text")
    server = endpoints.TemplateServer(template, "key")
    reply = server.answer(endpoints.Received("GET", endpoints.FIND, {}, {}, b"", 0.0))
    first = json.loads(reply.body)["data"][0]["items"][0]
    assert first["name"] and first["about"]["url"].startswith("https://") and first["about"]["text"]
    for template in (
        HttpSearchConfig(results="data.1.items", title="name", link="about.url", snippet="about.text"),
        HttpSearchConfig(results="2", title="texts.0", link="texts.1", snippet="texts.2"),
        HttpSearchConfig(results="", title="", link="", snippet=""),
    ):
        search = TextSearchConfig(provider="http", url="http://example.org", http=template)
        server = endpoints.TemplateServer(template, "")
        reply = server.answer(endpoints.Received("GET", endpoints.FIND, {}, {}, b"", 0.0))
        assert Template(search, NO_KEY).read(json.loads(reply.body))[0].title == "it: page 1"
