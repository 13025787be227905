"""Parts of the agent's server: its system text, what of an episode is the answer, its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast.config import Config, ServeConfig
from metis_fast.errors import ConfigError
from metis_fast.prompt_tools import offered_tools
from metis_fast.rollout.protocols import Metis
from metis_fast.serve.reply import answered_in_tags, content_of
from metis_fast.serve.serving import agent_config, serve
from metis_fast.serve.system import SystemText
from metis_fast.types import Message, Prompt, Rollout, ToolName

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
SAYS_A = CALL.replace('"1"', '"' + "'<answer>A</answer>'" + '"')


def offered(text: str) -> tuple[str, ...]:
    return offered_tools(Prompt("p", "", (Message("system", text),), (), "", (), "", ""))


def test_the_system_text_offers_the_tools_that_there_are_in_the_published_form() -> None:
    system = SystemText(None)
    for tools in (["python"], ["python", "text_search"], [str(tool) for tool in ToolName]):
        text = system.of(tools)
        assert list(offered(text)) == tools
        order = [text.index(part) for part in ("# Tools", "# Decision Guidelines", "# Output Format", "<reason>", "<answer>")]
        assert order == sorted(order)
    example = system.of(["python"]).split("Format: ")[1].split("\n")[0]
    parsed = Metis().parse(example)
    assert parsed.call is not None and parsed.call.name == "python" and parsed.arguments
    none = system.of([])
    assert not offered(none) and "tool" not in none and "<answer>" in none
    assert not offered(system.of(["own"]))  # it describes itself


def test_a_system_text_of_ones_own_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Look.\n\n{tools}\n\nSay {x}.\n")
    assert SystemText(path).of([]) == "Look.\n\n\n\nSay {x}."
    assert offered(SystemText(path).of(["python"])) == ("python",)
    path.write_text("\n")
    assert SystemText(path).of(["python"]) == ""
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"serve.system: cannot read .*: it is no UTF-8; name a text file"):
        SystemText(path)
    with pytest.raises(ConfigError, match=r"serve.system: cannot read .*; name a text file"):
        SystemText(tmp_path)


def test_the_published_system_text_is_that_of_a_published_row(tmp_path: Path) -> None:
    """To the letter, marks and blanks included."""
    text = "Look {tools}.\n\n## python\n"
    rows = [[{"role": "system", "content": text}, {"role": "user", "content": "How many?"}]] * 2
    rest = {"data_source": ["x"] * 2, "ability": ["math"] * 2, "reward_model": [{"ground_truth": "1", "style": "rule"}] * 2}
    path = tmp_path / "rl.parquet"
    pq.write_table(pa.table(rest | {"prompt": rows, "extra_info": [{"index": "0"}] * 2}), path)
    for tools in ([], ["python"]):
        assert SystemText(path).of(tools) == text
    pq.write_table(pa.table(rest | {"prompt": [row[1:] for row in rows], "extra_info": [{"index": "0"}] * 2}), path)
    with pytest.raises(ConfigError, match=r"serve.system: expected a first row of .*rl.parquet that begins with a system"):
        SystemText(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"serve.system: .*rl.parquet"):
        SystemText(path)


@pytest.mark.parametrize(
    ("messages", "content", "tags"),
    [
        (["<reason>B?</reason><answer> A </answer><|im_end|>"], "A", True),
        (["<answer>A</answer> or <answer>B</answer><|im_end|>"], "B", True),
        ([f"<answer>A</answer>{CALL}", "It is B.<|im_end|>"], "A", True),
        ([CALL, "It is B.<|im_end|>"], "It is B.", False),
        (["<reason>Not A.</reason>\nIt is B.<|im_end|>"], "Not A.\nIt is B.", False),
        (["<reason>A</reason><answer></answer><|im_end|>"], "", True),  # and not its thoughts
        (["</answer>A<answer><|im_end|>"], "A", False),
        ([SAYS_A, "It is B.<|im_end|>"], "It is B.", False),  # what a tool is called with is no answer
        (["<answer>B</answer><reason>Not <answer>A</answer>.</reason><|im_end|>"], "B", True),
        (["<reason>So <answer>A</answer>.</reason><|im_end|>"], "A", True),
        (["<|im_end|>"], "", False),
    ],
)
def test_the_content_is_the_last_answer_else_the_last_message_without_tags(
    play: Callable[..., Rollout], make_prompt: Callable[..., Prompt], messages: list[str], content: str, tags: bool
) -> None:
    rollout = play(make_prompt(), messages)
    assert content_of(rollout, False, ()) == content and answered_in_tags(rollout) == tags
    assert content_of(rollout, True, ()) == "".join(messages).replace("<|im_end|>", "")


def test_the_agent_has_as_much_at_once_as_is_served_and_no_tools_where_they_are_off() -> None:
    tree = {
        "serve": {"max_concurrent": 3, "tools": False},
        "workers": {"tools": 2, "judges": 2, "nodes": 2},
        "rollout": {"engine": "vllm", "vllm": {"replicas": 2}},
        "tools": {"server": {"url": "http://tools.example:8400"}},
    }
    off = agent_config(Config.model_validate(tree))
    assert (off.tools.enabled, off.tools.server.url, off.workers.tools, off.workers.judges) == ((), "", 0, 0)
    assert off.rollout.max_concurrent == 3 and off.rollout.vllm.replicas == 2 and off.workers.nodes == 1
    on = agent_config(Config.model_validate(tree | {"serve": {}}))
    assert on.tools.server.url and on.workers.tools == 2 and on.tools.offer == "row" and len(on.tools.enabled) == 3


def test_a_failure_of_tools_may_not_become_text() -> None:
    with pytest.raises(ConfigError, match=r"serve with rollout\.strict=false"):
        agent_config(Config.model_validate({"rollout": {"protocol": "metis", "strict": True}}))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"token_env": "Bearer abc"}, "serve.token_env: expected the name of an environment variable"),
        ({"port": 70000}, "less than or equal to 65535"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"client_system": "drop"}, "'before' or 'refuse'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        ServeConfig.model_validate(settings)
    assert says in str(caught.value)


def test_an_address_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METIS_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"serve.host=0.0.0.0 can be reached by others, and no token is set"):
        serve(Config.model_validate({"serve": {"host": "0.0.0.0"}}), lambda url: None)
    monkeypatch.setenv("METIS_SERVE_TOKEN", "short")
    with pytest.raises(ConfigError, match="METIS_SERVE_TOKEN holds no token"):
        serve(Config.model_validate({"serve": {}}), lambda url: None)
