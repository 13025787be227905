"""The second stage: marks of stored replies, by rules and by LLM judges, side by side.

Rules of ours read all that the agent wrote; what is VLMEvalKit's reads the final answer, which is what VLMEvalKit gets from
`metis-fast serve`. Where no reply or no verdict came, a mark has no value and a reason: that is never a wrong answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from metis_fast.config import Config
from metis_fast.errors import ConfigError
from metis_fast.evaluate.benchmark import Benchmark, JudgeForm
from metis_fast.evaluate.benchmarks import find
from metis_fast.evaluate.question import JUDGE_FAILED, Mark, Question, Verdict
from metis_fast.evaluate.replies import Reply, line, read_lines
from metis_fast.evaluate.scorers.reply import final_answer
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.llm import LlmMatcher
from metis_fast.score.llm_prompt import read_prompt
from metis_fast.score.protocol import Cost, JudgeUnavailable
from metis_fast.types import Prompt

NO_REPLY = Verdict(None, "no reply: tools or engines failed")
_VLMEVAL = "vlmeval"
OURS = "judge:llm"
UNASKED = "wrong without asking the judge: no answer, or one too long to be one"
_AT_ONCE = 256  # replies whose judges are asked; how many requests there are at once, score.llm.concurrency says


def rules_of(config: Config, benchmark: Benchmark) -> list[str]:
    """Names of the rules that score."""
    wanted = config.benchmark.scorer
    return [name for name in benchmark.scorers if wanted == "both" or name.startswith(_VLMEVAL) == (wanted == "vlmeval")]


def judges_of(config: Config, benchmark: Benchmark) -> list[str]:
    """Names of the judges that score: ours, and the roles of VLMEvalKit's."""
    wanted = config.benchmark.scorer
    if not config.benchmark.judge:
        return []
    theirs = [f"judge:{name}" for name in benchmark.judges] if wanted != "ours" else []
    return ([OURS] if wanted != "vlmeval" else []) + theirs


def check_settings(config: Config, keys: Sequence[str]) -> None:
    """What can be said before a file is read.

    Raises:
        ConfigError: no benchmark, one twice, a failure of ours would pass for an answer, or nothing would score.
    """
    if not keys:
        raise ConfigError("no benchmark: benchmark.files is empty; set benchmark.files.NAME=PATH (metis-fast benchmark list)")
    if config.rollout.strict:
        raise ConfigError(
            "rollout.strict lets an episode end with a sentence where tools fail, which would be scored as the agent's answer; "
            "set rollout.strict=false"
        )
    names = [find(key).name for key in keys]
    for key, name in zip(keys, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"{key}: {name} is named twice; name each benchmark once")
        _check_scorers(config, find(key))


def _check_scorers(config: Config, benchmark: Benchmark) -> None:
    """Raises ConfigError: nothing would score, or a judge is asked for and there is none."""
    if config.benchmark.judge and not config.score.llm.base_url and not config.score.llm.judges:
        raise ConfigError("benchmark.judge=true asks the model of score.llm, and score.llm.base_url is empty; set it")
    if not rules_of(config, benchmark) and not judges_of(config, benchmark):
        raise ConfigError(
            f"benchmark.scorer={config.benchmark.scorer}: for {benchmark.name} there is no rule of that kind; set "
            "benchmark.judge=true, or benchmark.scorer=both"
        )


def read_by(scorer: str, reply: Reply) -> str:
    """What of a reply a scorer reads."""
    if scorer == OURS:
        return final_answer(reply.text).text
    return reply.prediction if _VLMEVAL in scorer else reply.text


def rule_marks(
    benchmark: Benchmark, scorer: str, questions: Sequence[Question], replies: Sequence[Reply], tick: Callable[[], object]
) -> list[Mark]:
    """What a rule says. Some take milliseconds, and run helper processes: call it outside of an event loop."""
    by_index, rule = {question.index: question for question in questions}, benchmark.scorers[scorer]
    marks = []
    for reply in replies:
        question = by_index[reply.index]
        marks.append(Mark.of(question, reply.rollout, scorer, rule(question, read_by(scorer, reply))))
        tick()
    return marks


def without_reply(scorer: str, questions: Sequence[Question], replies: Sequence[Reply], rollouts: int) -> list[Mark]:
    """Marks of rollouts that our machinery broke off."""
    there = {(reply.index, reply.rollout) for reply in replies}
    return [
        Mark.of(question, rollout, scorer, NO_REPLY)
        for question in questions
        for rollout in range(rollouts)
        if (question.index, rollout) not in there
    ]


class LlmJudges:
    """The judges of a benchmark, over one endpoint. Close it.

    folder: where verdicts are kept as they come; those of the same model on the same answer are not asked for again. That there
    is none is not kept. cost: of what was asked.

    Raises:
        JudgeError: no endpoint that can be used.
    """

    def __init__(self, config: Config, benchmark: Benchmark, folder: Path) -> None:
        self._benchmark, self._path = benchmark, folder / "judged.jsonl"
        self._names = judges_of(config, benchmark)
        llm = config.score.model_copy(update={"judge": "llm"})
        self._ours: StyleJudge | None = open_judge(llm, {"llm"}) if OURS in self._names else None
        self._model = LlmMatcher(config.score.llm.each()[0])  # of a quorum, the first: roles are not votes
        self._settings = _settings(config)
        self._known: dict[str, Mark] = {}
        for record in read_lines(self._path, mend=True):
            key = str(record.pop("key"))
            self._known[key] = Mark(**record)

    async def check(self) -> None:
        """Raises JudgeError: the endpoint does not answer as a judge."""
        await self._model.check()
        if self._ours is not None:
            await self._ours.check()

    @property
    def model(self) -> str:
        """Which one is asked, or the first of several; "" before `check` where the settings name none."""
        return self._model.model

    @property
    def cost(self) -> Cost:
        """Of all that was asked."""
        return sum((judge.cost for judge in (self._ours, self._model) if judge is not None), Cost())

    def close(self) -> None:
        """Close what was opened."""
        for judge in (self._ours, self._model):
            if judge is not None:
                judge.close()

    async def marks(
        self, questions: Sequence[Question], replies: Sequence[Reply], tick: Callable[[], object]
    ) -> dict[str, list[Mark]]:
        """What every judge says of every reply, in the order of the replies."""
        by_index = {question.index: question for question in questions}
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str, reply: Reply) -> Mark:
            async with places:
                mark = await self._mark(name, by_index[reply.index], reply)
            tick()
            return mark

        try:
            async with asyncio.TaskGroup() as tasks:
                asked = {name: [tasks.create_task(one(name, reply)) for reply in replies] for name in self._names}
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of the first
        return {name: [task.result() for task in running] for name, running in asked.items()}

    async def _mark(self, name: str, question: Question, reply: Reply) -> Mark:
        text = read_by(name, reply)
        told = json.dumps([self._settings, self.model, name, question.asked, question.truth, reply.index, reply.rollout, text])
        key = hashlib.sha256(told.encode()).hexdigest()[:32]
        if key in self._known:
            return self._known[key]
        try:
            if name == OURS:
                assert self._ours is not None
                match = await self._ours.compare(_as_asked(question), text)
                verdict = Verdict(float(match.correct), "" if match.judge else UNASKED)
            else:
                form = self._benchmark.judges[name.removeprefix("judge:")]
                verdict = await _by_form(form, self._model, question, text)
        except JudgeUnavailable as error:
            verdict = Verdict(None, f"{JUDGE_FAILED}: {error.reason}")
        mark = Mark.of(question, reply.rollout, name, verdict)
        if mark.value is not None:
            with self._path.open("a", encoding="utf-8") as file:
                record = {name: getattr(mark, name) for name in ("index", "rollout", "scorer", "value", "reason")}
                file.write(line({"key": key, **record}))
        return mark


def _settings(config: Config) -> str:
    """What verdicts follow from, beside the model that answers."""
    llm = config.score.llm
    prompt = dataclasses.asdict(read_prompt(llm.prompt))
    judges = [[one.model or one.base_url, one.extra_body] for one in llm.each()]  # a named one may move to another address
    return json.dumps([judges, llm.quorum, prompt], sort_keys=True)


def judged_by(config: Config) -> str:
    """A digest of what verdicts follow from: models, prompt, quorum."""
    return hashlib.sha256(_settings(config).encode()).hexdigest()[:8]


def _as_asked(question: Question) -> Prompt:
    return Prompt(question.index, "", (), (), "", (question.truth,), "llm", question.asked)


async def _by_form(form: JudgeForm, model: LlmMatcher, question: Question, text: str) -> Verdict:
    """Ask as a form says. An answer that cannot be read is asked for again, and in the end is no verdict."""
    system = [{"role": "system", "content": form.system}] if form.system else []
    verdict = Verdict(None, "the judge was not asked")
    for attempt in range(form.tries):
        answers: list[str] = []
        asked = False
        for call in form.calls:
            content = call(question, text, answers)
            if content is None:
                answers.append("")
                continue
            asked = True
            messages: list[Mapping[str, str]] = [*system, {"role": "user", "content": content}]
            answers.append(await model.say(messages, form.heat * attempt))
        verdict = form.read(question, text, answers)
        if verdict.value is not None or not asked:
            break
    return verdict
