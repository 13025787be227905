"""A scripted policy for the demo set: it plays cold-start trajectories through the real tools, as an `Engine`.

It is a fallible demonstrator. How often it calls a tool, and where it errs, is a `ScriptStyle`; what it answers after a call is
what the observation supports, so that a wrong crop or a useless search leads to a wrong answer as it would for a real policy.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from metis_fast.demo.files import PRIOR_NO, Ability, Kind, kind_of
from metis_fast.demo.images import FABRICS, PANEL_BOXES, PLAIN
from metis_fast.demo.world import COUNTRY_NAMES, City, Country, city_document, country_document, find_city
from metis_fast.errors import ModelError
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.types import ImageBlob, ImageSpan, Prompt, ToolName

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_END_OF_CALL, _END_OF_MESSAGE = "</tool_call>", "<|im_end|>"
_ASSISTANT = "<|im_start|>assistant\n"
_USER = "<|im_start|>user\n"
_IMAGE_PAD = "<|image_pad|>"
_NUMBER_LINE = re.compile(r"^\s*(-?\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ScriptStyle:
    """How a demonstrator behaves; all fields are probabilities.

    tool_direct, tool_uncertain, tool_needed: of using the tool on a prompt of that kind. extra_call: of a useless
    `image_search` before the call. error: of a wrong call. poor_error: the same on the "poor half" of the tool_needed prompts
    (`is_poor`), where errors are so common that greedy decoding makes them too: only exploration unlearns those.
    """

    tool_direct: float
    tool_uncertain: float
    tool_needed: float
    extra_call: float
    error: float
    poor_error: float

    def p_tool(self, kind: Kind) -> float:
        """Probability of using the tool on a prompt of `kind`."""
        return {Kind.DIRECT: self.tool_direct, Kind.UNCERTAIN: self.tool_uncertain, Kind.TOOL_NEEDED: self.tool_needed}[kind]


# Teaches the skills: direct answers, and what each tool is for.
BASE = ScriptStyle(tool_direct=0.25, tool_uncertain=0.9, tool_needed=0.85, extra_call=0.0, error=0.03, poor_error=0.03)
# Teaches the habit that HDPO has to undo: a tool for everything, often the wrong way.
COLD_START = ScriptStyle(tool_direct=0.97, tool_uncertain=0.97, tool_needed=1.0, extra_call=0.15, error=0.05, poor_error=0.6)
# The same where uncertain questions say their odds: half are answered directly, so that training may move them either way.
COLD_START_BY_ODDS = replace(COLD_START, tool_uncertain=0.5)


@dataclass(frozen=True, slots=True)
class Script:
    """One planned trajectory: tool-call messages in order, and what the last message is based on.

    shown_panel: the panel whose crop the last call shows. fallback: the answer where no observation supports one. trusts_tool:
    the answer is read from the last observation; otherwise it is `fallback`.
    """

    calls: tuple[str, ...]
    fallback: str
    shown_panel: int | None = None
    trusts_tool: bool = False


def is_poor(prompt: Prompt) -> bool:
    """Whether a prompt is in the half that COLD_START handles badly: bottom panels, cities from A to K, odd first operands."""
    extra = prompt.extra
    if kind_of(prompt) is not Kind.TOOL_NEEDED:
        return False
    if prompt.ability == Ability.PERCEPTION:
        return int(str(extra["panel"])) >= 2
    if prompt.ability == Ability.SEARCH:
        return str(extra["city"])[0] <= "K"
    return int(str(extra["a"])) % 2 == 1


def _call_message(name: ToolName, arguments: dict[str, str]) -> str:
    body = json.dumps({"name": name.value, "arguments": arguments})
    return f"<reason>look</reason><tool_call>{body}{_END_OF_CALL}"


def _answer_message(reason: str, answer: str) -> str:
    return f"<reason>{reason}</reason><answer>{answer}</answer>{_END_OF_MESSAGE}"


_USELESS_CALL = _call_message(ToolName.IMAGE_SEARCH, {})
# What that call gives without an image; only the tokenizer's merges hang on the wording being the tool's.
_NO_IMAGE = "image_search needs an image in the prompt; there is none."


def _main_call(prompt: Prompt, wrong: bool) -> tuple[str, int | None]:
    """The call that should tell the answer (or the wrong one in its place), and the panel that it shows."""
    extra = prompt.extra
    if prompt.ability == Ability.PERCEPTION:
        panel = int(str(extra["panel"])) ^ wrong  # the neighbour to the left or right
        return _call_message(ToolName.PYTHON, {"code": f"image_1.crop({PANEL_BOXES[panel]})"}), panel
    if prompt.ability == Ability.SEARCH:
        query = str(extra["city"]) if "city" in extra else f"capital of {extra['country']}"
        return (_USELESS_CALL if wrong else _call_message(ToolName.TEXT_SEARCH, {"query": query})), None
    operator = {"+": "*", "*": "+"}[str(extra["op"])] if wrong else str(extra["op"])
    return _call_message(ToolName.PYTHON, {"code": f"print({extra['a']} {operator} {extra['b']})"}), None


def _guess(prompt: Prompt, kind: Kind, rng: random.Random) -> str:
    """What is answered without the tool."""
    if kind is Kind.DIRECT:
        return prompt.answers[0]
    if kind is Kind.UNCERTAIN:
        if (
            "p" in prompt.extra
        ):  # the question says the odds: the likelier answer, so that a direct one is right as often as that
            return "no"
        return "no" if rng.random() < PRIOR_NO else "yes"
    if prompt.ability == Ability.PERCEPTION:
        return rng.choice(FABRICS)
    if prompt.ability == Ability.SEARCH:
        return rng.choice(COUNTRY_NAMES)
    return str(rng.randint(11, 99) * rng.randint(11, 99))


def plan(prompt: Prompt, style: ScriptStyle, rng: random.Random) -> Script:
    """Decide a trajectory.

    Raises:
        DataError: the prompt is not one of the demo set.
    """
    kind = kind_of(prompt)
    fallback = _guess(prompt, kind, rng)
    if rng.random() >= style.p_tool(kind):
        return Script((), fallback)
    wrong = rng.random() < (style.poor_error if is_poor(prompt) else style.error)
    call, panel = _main_call(prompt, wrong)
    extra_call = rng.random() < style.extra_call and call != _USELESS_CALL  # the tool answers it only once
    # On a direct prompt the policy knows the answer, whatever a wrong call shows.
    return Script((_USELESS_CALL, call) if extra_call else (call,), fallback, panel, trusts_tool=kind is not Kind.DIRECT)


def answer_from(prompt: Prompt, script: Script, observation: str) -> str:
    """The answer that a trajectory ends in.

    observation: the last user turn, control tokens and image placeholders left in; "" where no tool was called.
    """
    if not script.trusts_tool:
        return script.fallback
    uncertain = kind_of(prompt) is Kind.UNCERTAIN
    if prompt.ability == Ability.PERCEPTION:
        if script.shown_panel is None or _IMAGE_PAD not in observation:
            return script.fallback
        fabric = str(prompt.extra["fabrics"]).split()[script.shown_panel]
        return ("yes" if fabric == PLAIN else "no") if uncertain else fabric
    if prompt.ability == Ability.SEARCH:
        city = find_city(observation, str(prompt.extra["city"]))
        if city is None:
            return script.fallback
        return ("yes" if city.south else "no") if uncertain else city.country
    numbers = _NUMBER_LINE.findall(re.sub(r"<[^<>]*>", "\n", observation))
    return numbers[-1] if numbers else script.fallback


class _ScriptedSession:
    """Plays one trajectory. Which message is due is read from the tokens, so that a repeated call gives the same message."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, script: Script) -> None:
        self._tokenizer, self._prompt, self._script = tokenizer, prompt, script

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """The next message of the script; log-probs and weight versions are 0."""
        text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        turn = text.count(_ASSISTANT) - 1
        calls = self._script.calls
        if turn < len(calls):
            message = calls[turn]
        else:
            observation = text.rpartition(_USER)[2] if calls else ""
            answer = answer_from(self._prompt, self._script, observation)
            message = _answer_message("done" if calls else "known", answer)
        ids = np.asarray(self._tokenizer.encode(message, add_special_tokens=False)[: sampling.max_tokens], np.int32)
        zeros = np.zeros(len(ids), np.int32)
        return Completion(ids, zeros.astype(np.float32), zeros, stopped=bool(ids[-1] in sampling.stop_ids))

    def close(self) -> None:
        """Nothing is kept."""


class ScriptedEngine:
    """An `Engine` whose policy is a script: `session(order)` plays `prompts[order]`, a function of (seed, order) alone.

    Raises:
        ModelError: the tokenizer lacks a token of the agent protocol.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], style: ScriptStyle, seed: int) -> None:
        for token in (_END_OF_CALL, _END_OF_MESSAGE):
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1:
                raise ModelError(f"the tokenizer must make one token of {token}, it makes {len(ids)}; use a Qwen3-VL tokenizer")
        self._tokenizer, self._prompts, self._style, self._seed = tokenizer, prompts, style, seed

    def script(self, order: int) -> Script:
        """What `session(order)` plays."""
        return plan(self._prompts[order], self._style, random.Random(f"{self._seed}/{order}"))

    def session(self, order: int, prompt: str = "") -> _ScriptedSession:
        """A place for one rollout, that of `prompts[order]`."""
        return _ScriptedSession(self._tokenizer, self._prompts[order], self.script(order))

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """A script has no weights."""
        return SyncReport(version, "shared")

    def close(self) -> None:
        """Nothing is kept."""


def script_texts(prompts: Iterable[Prompt]) -> Iterator[str]:
    """What good trajectories of these prompts are made of, as plain text without tags, to train a small tokenizer on.

    For each prompt: the question, the words around it, the JSON of its calls, what the tools find, and the answer.
    """
    for prompt in prompts:
        # The role stands before a text question in one piece, but an image comes between them.
        yield from ("user\n", prompt.question) if prompt.images else (f"user\n{prompt.question}",)
        yield from ("\n", "assistant\n", "look", "done", "known")
        for message in (_USELESS_CALL, _main_call(prompt, wrong=False)[0]):
            yield message.partition("<tool_call>")[2].removesuffix(_END_OF_CALL)
        yield _found(prompt)
        if not prompt.images:
            yield _NO_IMAGE
        yield prompt.answers[0]


def _found(prompt: Prompt) -> str:
    """The text of the useful observation: a page, a number; for a picture, the title under a similar one."""
    extra = prompt.extra
    if prompt.ability == Ability.PERCEPTION:
        return f"{', '.join(str(extra['colors']).split())} panels"
    if prompt.ability == Ability.MATH:
        return f"{prompt.answers[0]}\n"
    if kind_of(prompt) is Kind.DIRECT:
        page = country_document(Country(str(extra["country"]), prompt.answers[0]))
    else:
        page = city_document(City(str(extra["city"]), str(extra["country"]), extra["south"] is True))
    return f"{page.title}\n{page.text.rstrip('.')}"  # a snippet ends before the full stop
