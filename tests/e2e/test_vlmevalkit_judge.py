"""VLMEvalKit scores what we export with a judge, and we score the same replies with the same one: the same verdict of each.

See test_vlmevalkit.py for the environment that it needs.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import answering
import kit_judge
import pytest
from harness import HERE, Command
from kit_judge import answer_in, odd_one
from kit_judge import kit_judge as judge_server
from test_vlmevalkit import KIT, MODEL, kit, play, settings, table

from metis_fast.evaluate.benchmarks import find
from metis_fast.evaluate.files.reading import read
from metis_fast.evaluate.question import Question
from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.standin import Files, write_standins
from metis_fast.node import opening
from metis_fast.testing.judge import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KIT, reason="METIS_VLMEVALKIT is not set: the Python of an environment that has VLMEvalKit"),
]
JUDGED = {  # name there -> ours, and how many problems make 60 questions or more
    "VStarBench": ("vstar", 64),
    "HRBench4K": ("hrbench4k", 16),
    "SEEDBench2_Plus": ("seedbench2plus", 64),
    "WeMath": ("wemath", 20),
    "MathVista_MINI": ("mathvista", 80),
    "MathVerse_MINI": ("mathverse", 16),
    "DynaMath": ("dynamath", 9),
    "LogicVista": ("logicvista", 64),
    "CharXiv_descriptive_val": ("charxiv-dq", 20),
    "CharXiv_reasoning_val": ("charxiv-rq", 80),
}
OWN_NAME = ("CharXiv_descriptive_val", "CharXiv_reasoning_val")  # VLMEvalKit stops where --judge names one
CHARXIVS_JUDGE = "gpt-4o-mini-2024-07-18"
_LONG = "I have looked at every part of the picture for long, and compared it with all that is offered: what fits is "
LETTERED = (
    *("<answer>{L}</answer>", "<answer>{T}</answer>", "{L}", "<answer></answer>", "<answer>I cannot tell</answer>"),
    *(f"<answer>{_LONG}{{T}}</answer>", f"<answer>{_LONG}something else</answer>", "<answer>Of A and B, it is {L}</answer>"),
)
FREE = (
    *("<answer>{V}</answer>", "<answer>The answer is {V}.</answer>", "<reason>So.</reason><answer>What I see is {V}</answer>"),
    *("<answer></answer>", "<answer>None</answer>", "<answer>I cannot tell</answer>", "{V}", "<answer>It is {V} cm</answer>"),
    '<answer>as "it" says\r\nthe answer is ={V}</answer>',
)
SHORT = (
    '<answer>{"solution": "It is seen.", "short answer": "{V}"}</answer>',
    '<answer>```json\n{"solution": "\\\\pi", "short answer": "{V}"}\n```</answer>',
)
_WRONG = {"1.5": "2.5", "[2007, 2008]": "[2008, 2009]", "B": "A", "A, C": "D"}
Truth = tuple[str, list[str], dict[str, str]]  # forms of replies, their values (the right one first), options by letter


class Agent:
    """Answers each question in another dress every time, and rightly two times of three."""

    def __init__(self, path: Path) -> None:
        self._known: list[tuple[str, list[str], str, dict[str, str]]] = json.loads(path.read_text())
        self._seen = Counter[str]()

    def __call__(self, text: str) -> str:
        """The next message."""
        asked = text.rpartition("<|im_start|>user")[2].partition("<|im_end|>")[0]
        question, forms, answer, options = next(one for one in self._known if one[0] in asked)
        self._seen[question] += 1
        number = zlib.crc32(asked.encode()) + self._seen[question]
        letter = answer if number % 3 else "ABCD"[number // 3 % 4]
        value = answer if number % 3 else _WRONG.get(answer, "12")
        reply = forms[number % len(forms)].replace("{V}", value).replace("{L}", letter)
        return reply.replace("{T}", options.get(letter, "")) + "<|im_end|>"


def use_agent(path: Path) -> None:
    """Let whole runs of this process have such an agent."""
    opening.NativeEngine = partial(  # pyright: ignore[reportAttributeAccessIssue]
        answering.AnsweringEngine, answer=Agent(path)
    )


def forms_of(benchmark: str, question: Question) -> tuple[str, ...]:
    """How a question may be answered."""
    if question.options and benchmark != "mathverse":
        return LETTERED
    return (*FREE, *SHORT, *SHORT) if benchmark == "dynamath" else FREE


def write_truths(path: Path, files: Mapping[str, Files]) -> dict[str, dict[str, Question]]:
    """For `Agent`; the longest texts first. Returns the questions of each benchmark by their index."""
    known: list[tuple[str, tuple[str, ...], str, dict[str, str]]] = []
    found = {}
    for name, one in files.items():
        questions = read(find(name), list(one.tsv), any_md5=True).questions
        found[name] = {question.index: question for question in questions}
        known += [(q.question, forms_of(name, q), q.answer, dict(q.options)) for q in questions]
    known.sort(key=lambda one: -len(one[0]))
    path.write_text(json.dumps(known))
    return found


MATHVISTA = """
import json, sys
from pathlib import Path
from vlmeval.dataset.utils.mathvista import post_check
from vlmeval.smp import load

verdicts = {str(row["index"]): float(post_check(row)) for _, row in load(sys.argv[1]).iterrows()}
Path(sys.argv[2]).write_text(json.dumps(verdicts))
"""


def theirs_of(name: str, out: Path, folder: Path) -> dict[str, float]:
    """What VLMEvalKit says of each row."""
    stem = f"{MODEL}_{name}_{CHARXIVS_JUDGE if name in OWN_NAME else kit_judge.MODEL}"
    if name == "MathVista_MINI":  # which keeps what was extracted, and compares it once more for its score
        kit(["-c", MATHVISTA, out / f"{stem}.tsv", folder / "mathvista.json"], folder, folder)
        return json.loads((folder / "mathvista.json").read_text())
    ending, column = {
        "MathVerse_MINI": ("_score", "score"),
        "WeMath": ("", "hit"),
        "DynaMath": ("", "correct"),
        "LogicVista": ("", "hit"),
        **dict.fromkeys(OWN_NAME, ("", "score")),
    }.get(name, ("_result", "hit"))
    words = {"True": 1.0, "False": 0.0}
    rows = table(out / f"{stem}{ending}.tsv")
    return {row["index"]: words[row[column]] if row[column] in words else float(row[column]) for row in rows}


def unread(name: str, question: Question, reply: str) -> bool:
    """Whether the judge answers it in a form that nobody can read, which VLMEvalKit counts as wrong."""
    match name:
        case "MathVista_MINI":
            numeric = not question.options and question.extra["answer_type"] in ("integer", "float")
            return numeric and re.fullmatch(r"null|-?[0-9.]+", answer_in(reply)) is None
        case "LogicVista":
            return odd_one(reply, 8) == 0
        case "MathVerse_MINI":
            return odd_one(answer_in(reply), 8) == 0
        case "CharXiv_descriptive_val" | "CharXiv_reasoning_val":
            return odd_one(reply, 8) == 2
    return False


def test_a_judge_that_both_ask_gives_each_reply_the_same_verdict(tmp_path: Path) -> None:
    """Where the verdicts differ, it is for the reasons that docs/other-kits.md gives."""
    files = {name: write_standins(tmp_path / "files", [name], count, (64, 48))[name] for name, count in JUDGED.values()}
    questions = write_truths(tmp_path / "truths.json", files)
    agent: Callable[[], None] = partial(use_agent, tmp_path / "truths.json")
    server = judge_server()
    data, work = tmp_path / "LMUData", tmp_path / "out"
    data.mkdir()
    for one in files.values():
        (data / one.tsv[0].name).write_bytes(one.tsv[0].read_bytes())
    with serving(server) as url:
        judged = {"any_md5": True, "judge": True, "scorer": "vlmeval", "files": {n: [str(f.tsv[0])] for n, f in files.items()}}
        llm = {"llm": {"base_url": url}}
        config = settings(tmp_path, {}, tools={"enabled": []}, score=llm, benchmark=judged)
        ours = play([config], tmp_path / "playing", agent)
        num_ours = len(server.bodies)
        ended = Command(["benchmark", "export", tmp_path / "run", "--vlmeval", work], tmp_path / "exporting").wait()
        assert ended.code == 0, ended
        main = [HERE / "vlmevalkit_main.py", "--mode", "eval", "--model", MODEL, "--work-dir", work, "--api-nproc", "16"]
        main += ["--judge-base-url", url, "--judge-key", "unused"]
        named = ["--judge", kit_judge.MODEL, "--data", *(name for name in JUDGED if name not in OWN_NAME)]
        for more in (named, ["--data", *OWN_NAME]):
            kit([*main, *more], tmp_path / "kit", data, HF_HUB_CACHE=str(tmp_path / "kit"), PRED_FORMAT="tsv")
    assert 0 < num_ours < len(server.bodies)
    counted: dict[str, Counter[tuple[float | None, float]]] = {}
    for name, (benchmark, _) in JUDGED.items():
        folder = tmp_path / "run" / "benchmarks" / benchmark
        values = {m["index"]: m["value"] for m in read_lines(folder / "marks.jsonl") if m["scorer"] == "judge:vlmeval"}
        replies = {reply["index"]: reply["prediction"] for reply in read_lines(folder / "replies.jsonl")}
        theirs = theirs_of(name, work / MODEL, tmp_path / "kit")
        assert len(replies) >= 60 and values.keys() == theirs.keys() == replies.keys() == questions[benchmark].keys(), name
        counted[name] = Counter((values[index], theirs[index]) for index in values)
        assert min(counted[name][1.0, 1.0], counted[name][0.0, 0.0]) >= 4, (name, counted[name])
        for index, value in values.items():
            reply, told = replies[index], (name, index, replies[index], values[index], theirs[index])
            if value is None:  # no verdict of ours is their wrong answer
                assert unread(name, questions[benchmark][index], reply) and theirs[index] == 0.0, told
            elif value != theirs[index]:  # what we read and they do not
                assert name in OWN_NAME and odd_one(reply, 8) in (0, 1) and value == 1.0, told
        scored = ours[benchmark]["scorers"]["judge:vlmeval"]
        assert scored["no_verdict"] == list(values.values()).count(None) and scored["judge_failures"] == 0, name
    print(json.dumps({name: {str(key): num for key, num in sorted(one.items(), key=str)} for name, one in counted.items()}))
