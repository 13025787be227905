"""The scripted policy: protocol, rates, and answers that follow from what the tools showed."""

import ast
import asyncio
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_fast.config import RolloutConfig, TextSearchConfig
from metis_fast.demo.files import Ability, DemoSizes, Kind, SplitSize, demo_prompts, write_demo
from metis_fast.demo.images import FABRICS, PLAIN, render
from metis_fast.demo.policy import (
    BASE,
    COLD_START,
    COLD_START_BY_ODDS,
    Script,
    ScriptedEngine,
    ScriptStyle,
    answer_from,
    is_poor,
    plan,
    script_texts,
)
from metis_fast.demo.world import COUNTRY_NAMES, City, city_document, find_city, load_world
from metis_fast.errors import DataError, ModelError
from metis_fast.pictures import ImagePreparer
from metis_fast.rollout.calls import parse_turn
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Sampling
from metis_fast.rollout.episode import collect
from metis_fast.testing.tiny import build_tokenizer
from metis_fast.tools.search.wording import compact_text
from metis_fast.tools.text_search import TextSearch
from metis_fast.types import ImageBlob, Message, Observation, Outcome, Prompt, ToolName

ALWAYS = ScriptStyle(tool_direct=1, tool_uncertain=1, tool_needed=1, extra_call=0, error=0, poor_error=0)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    one = SplitSize(1)
    return list(demo_prompts(0, DemoSizes(one, SplitSize(1000), one, one))["cold_start"])


@pytest.fixture(scope="module")
def tokenizer(prompts: list[Prompt]) -> PreTrainedTokenizerFast:
    return build_tokenizer(script_texts(prompts), 640)


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerFast) -> Chat:
    size = {"shortest_edge": 4096, "longest_edge": 4096}
    return Chat(tokenizer, ImagePreparer(Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size)))


class FakeSession:
    """The three tools in process, for what a scripted policy writes and nothing else."""

    def __init__(self, cities: Mapping[str, City], images: Sequence[ImageBlob]) -> None:
        self._cities, self._images = cities, images

    async def call(self, name: str, arguments: Mapping[str, object]) -> Observation:
        if name == ToolName.IMAGE_SEARCH:
            return Observation("No results.")
        if name == ToolName.TEXT_SEARCH:
            city = self._cities.get(str(arguments["query"]))
            return Observation(city_document(city).text if city else "No results.")
        code = str(arguments["code"])
        if match := re.fullmatch(r"image_1\.crop\((.+)\)", code):
            out = BytesIO()
            with Image.open(BytesIO(self._images[0].data)) as picture:
                picture.crop(ast.literal_eval(match[1])).save(out, "PNG")
            return Observation("<image>", (ImageBlob.of(out.getvalue()),))
        match = re.fullmatch(r"print\((\d+) ([+*]) (\d+)\)", code)
        assert match, code
        a, b = int(match[1]), int(match[3])
        return Observation(str(a * b if match[2] == "*" else a + b))

    async def close(self) -> None:
        pass


class FakeToolbox:
    names = tuple(ToolName)
    tools = ()

    def __init__(self) -> None:
        self._cities = {city.name: city for city in load_world().cities}

    def session(self, images: Sequence[ImageBlob], extra: object = None, seen: object = None) -> FakeSession:
        return FakeSession(self._cities, images)

    def close(self) -> None:
        pass


def play(prompts: Sequence[Prompt], style: ScriptStyle, tokenizer, chat, seed: int = 0):
    engine = ScriptedEngine(tokenizer, prompts, style, seed)
    groups = asyncio.run(collect(prompts, 1, chat, engine, FakeToolbox(), RolloutConfig(), seed=0, stream="cold"))
    return [group.rollouts[0] for group in groups]


def answer_of(text: str) -> str:
    match = re.fullmatch(r"<reason>\w+</reason><answer>(.+)</answer>", text)
    assert match, text
    return match[1]


def shown_fabric(rollout, prompt: Prompt) -> str:
    """Which fabric the crop in a rollout shows, by its pixels."""
    blob = next(image for image in rollout.images if image.sha256 != prompt.images[0].sha256)
    crop = np.asarray(Image.open(BytesIO(blob.data))).astype(int)
    for fabric in (*FABRICS, PLAIN):
        pure = render(["white"] * 4, [fabric] * 4, [0] * 4)[:64, :64].astype(int)
        if ((crop - crop[0, 0]) == (pure - pure[0, 0])).all():
            return fabric
    raise AssertionError("the crop is not a whole panel")


def test_every_played_message_is_protocol_and_the_answer_is_what_the_tool_showed(prompts, tokenizer, chat) -> None:
    world = {city.name: city for city in load_world().cities}
    prompts = prompts[:300]
    num_wrong = 0
    for prompt, rollout in zip(prompts, play(prompts, COLD_START, tokenizer, chat), strict=True):
        assert rollout.outcome is Outcome.ANSWERED
        assert not rollout.logp.any() and set(rollout.weight_version.tolist()) == {-1, 0}
        for turn in rollout.turns[:-1]:
            assert re.fullmatch(r"<reason>\w+</reason><tool_call>\{.*\}</tool_call>", turn.text)
            assert turn.outcome is Outcome.TOOL_RESULT
        answer = answer_of(rollout.turns[-1].text)
        kind, uncertain = prompt.extra["kind"], prompt.extra["kind"] == Kind.UNCERTAIN
        num_wrong += answer not in prompt.answers
        if kind == Kind.DIRECT:
            assert answer == prompt.answers[0]
            continue
        if rollout.num_tool_calls == 0:
            continue
        last = rollout.turns[-2]
        if prompt.ability == Ability.PERCEPTION:
            fabric = shown_fabric(rollout, prompt)
            assert answer == (("yes" if fabric == PLAIN else "no") if uncertain else fabric)
        elif prompt.ability == Ability.MATH:
            assert answer == last.observation
        elif found := find_city(last.observation, str(prompt.extra["city"])):
            assert found == world[found.name]
            assert answer == (("yes" if found.south else "no") if uncertain else found.country)
        else:
            assert answer in (("yes", "no") if uncertain else COUNTRY_NAMES)
    assert num_wrong > 20  # the errors are there to be unlearnt


def test_a_faultless_script_is_always_right(prompts, tokenizer, chat) -> None:
    for prompt, rollout in zip(prompts[:150], play(prompts[:150], ALWAYS, tokenizer, chat), strict=True):
        assert (answer_of(rollout.turns[-1].text),) == prompt.answers
        assert rollout.num_tool_calls == 1


def test_a_trajectory_is_a_function_of_seed_and_order(prompts, tokenizer, chat) -> None:
    first, again = (play(prompts[:60], COLD_START, tokenizer, chat) for _ in range(2))
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    backwards = ScriptedEngine(tokenizer, prompts, COLD_START, 0)
    scripts = {order: backwards.script(order) for order in reversed(range(60))}
    forwards = ScriptedEngine(tokenizer, prompts, COLD_START, 0)
    assert [forwards.script(order) for order in range(60)] == [scripts[order] for order in range(60)]
    assert [ScriptedEngine(tokenizer, prompts, COLD_START, 1).script(order) for order in range(60)] != list(scripts.values())[
        ::-1
    ]


def check_rate(hits: int, total: int, p: float) -> None:
    """Within four standard deviations of a binomial, which another seed would leave once in 16,000 times."""
    assert total > 20
    assert abs(hits - total * p) <= 4 * sqrt(total * p * (1 - p)) + 1e-9, (hits, total, p)


def is_wrong(prompt: Prompt, script: Script) -> bool:
    body = json.loads(script.calls[-1].partition("<tool_call>")[2].removesuffix("</tool_call>"))
    if prompt.ability == Ability.SEARCH:
        return body["name"] == "image_search"
    if prompt.ability == Ability.MATH:
        return f" {prompt.extra['op']} " not in body["arguments"]["code"]
    return script.shown_panel != prompt.extra["panel"]


@pytest.mark.parametrize("style", [BASE, COLD_START], ids=["base", "cold_start"])
def test_tool_use_errors_and_useless_calls_happen_at_the_rates_of_the_style(prompts: list[Prompt], style: ScriptStyle) -> None:
    scripts = [(prompt, plan(prompt, style, random.Random(order))) for order, prompt in enumerate(prompts)]
    for kind in Kind:
        used = [bool(script.calls) for prompt, script in scripts if prompt.extra["kind"] == kind]
        check_rate(sum(used), len(used), style.p_tool(kind))
    called = [(prompt, script) for prompt, script in scripts if script.calls]
    for ability in Ability:
        poor = [is_wrong(*item) for item in called if item[0].ability == ability and is_poor(item[0])]
        check_rate(sum(poor), len(poor), style.poor_error)
    rest = [is_wrong(*item) for item in called if not is_poor(item[0])]
    check_rate(sum(rest), len(rest), style.error)
    # A wrong search is itself the useless call, which a tool answers only once.
    extra = [
        len(script.calls) == 2 for prompt, script in called if prompt.ability != Ability.SEARCH or not is_wrong(prompt, script)
    ]
    check_rate(sum(extra), len(extra), style.extra_call)


def test_poor_halves_are_about_half_of_each_tool_needed_ability(prompts: list[Prompt]) -> None:
    for ability in Ability:
        poor = [is_poor(p) for p in prompts if p.ability == ability and p.extra["kind"] == Kind.TOOL_NEEDED]
        assert 0.35 < sum(poor) / len(poor) < 0.65
    assert not any(is_poor(p) for p in prompts if p.extra["kind"] != Kind.TOOL_NEEDED)


def test_without_the_tool_direct_is_right_and_uncertain_follows_the_prior(prompts: list[Prompt]) -> None:
    never = ScriptStyle(tool_direct=0, tool_uncertain=0, tool_needed=0, extra_call=0, error=0, poor_error=0)
    answers = [(p, plan(p, never, random.Random(order)).fallback) for order, p in enumerate(prompts)]
    assert all(answer == p.answers[0] for p, answer in answers if p.extra["kind"] == Kind.DIRECT)
    unsure = [answer for p, answer in answers if p.extra["kind"] == Kind.UNCERTAIN]
    check_rate(unsure.count("no"), len(unsure), 0.7)
    guesses = [answer == p.answers[0] for p, answer in answers if p.extra["kind"] == Kind.TOOL_NEEDED]
    assert sum(guesses) / len(guesses) < 0.15  # plausible, but guessed


def test_a_failed_call_leaves_a_guess(prompts: list[Prompt]) -> None:
    for prompt in (p for p in prompts[:200] if p.extra["kind"] != Kind.DIRECT):
        script = plan(prompt, ALWAYS, random.Random(0))
        observation = "<tool_response>Error: the tool has failed at line 3.</tool_response><|im_end|>\n<|im_start|>assistant\n"
        assert answer_from(prompt, script, observation) == script.fallback


def test_a_message_is_cut_at_the_token_limit(prompts, tokenizer, chat) -> None:
    engine = ScriptedEngine(tokenizer, prompts, ALWAYS, 0)
    tokens = chat.encode_prompt(prompts[0]).tokens
    cut, whole = (
        asyncio.run(engine.session(0).generate(tokens, (), (), Sampling(max_tokens=limit, stop_ids=chat.stop_ids)))
        for limit in (3, 200)
    )
    assert not cut.stopped
    assert whole.stopped
    assert cut.tokens.tolist() == whole.tokens[:3].tolist()
    assert parse_turn(chat.decode(whole.tokens.tolist())).call is not None


def test_other_prompts_and_other_tokenizers_are_refused_in_one_line(prompts, tokenizer) -> None:
    stranger = replace(prompts[0], extra={}, messages=(Message("user", "hi"),), images=())
    with pytest.raises(DataError, match="has no `kind`"):
        plan(stranger, BASE, random.Random(0))
    without_tags = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []})
        )
    )
    with pytest.raises(ModelError, match="one token of </tool_call>"):
        ScriptedEngine(without_tags, prompts, BASE, 0)


def test_tokenizer_texts_hold_no_tags_and_cover_what_is_played(prompts: list[Prompt]) -> None:
    texts = set(script_texts(prompts))
    assert not any("<" in text for text in texts)
    for prompt in prompts[:100]:
        script = plan(prompt, ALWAYS, random.Random(0))
        assert script.calls[0].partition("<tool_call>")[2].removesuffix("</tool_call>") in texts
        assert prompt.answers[0] in texts


def test_the_real_text_search_finds_the_page_of_every_city_and_capital(tmp_path: Path) -> None:
    one = SplitSize(1)
    corpus = write_demo(tmp_path, 0, DemoSizes(one, one, one, one, images=1)).text_corpus
    search = TextSearch(TextSearchConfig(corpus=corpus, max_results=1))

    def seen(query: str) -> str:
        return compact_text(search.search(query), numbered=False)

    world = load_world()
    assert [city.name for city in world.cities if find_city(seen(city.name), city.name) != city] == []
    for country in world.countries:
        fact = f"The capital of {country.name} is {country.capital}"
        assert fact in seen(f"capital of {country.name}")


def test_a_direct_answer_is_right_as_often_as_the_question_says() -> None:
    one, never = SplitSize(1), replace(ALWAYS, tool_uncertain=0)
    size = SplitSize(1500, 0.0, uncertain_share=1.0, odds=(0.5, 0.9))
    prompts = list(demo_prompts(0, DemoSizes(one, size, one, one))["cold_start"])
    for odds in (0.5, 0.9):
        graded = [p for p in prompts if p.kind == f"uncertain-{odds:g}"]
        plans = [plan(p, never, random.Random(i)) for i, p in enumerate(graded)]
        right = sum(one.fallback == p.answers[0] for p, one in zip(graded, plans, strict=True))
        assert not any(one.calls for one in plans) and abs(right - odds * len(graded)) < 2
    calls = sum(bool(plan(p, COLD_START_BY_ODDS, random.Random(i)).calls) for i, p in enumerate(prompts) if "p" in p.extra)
    assert calls / sum("p" in p.extra for p in prompts) == pytest.approx(0.5, abs=0.06)  # 4 standard errors


def test_after_a_call_the_answer_to_a_graded_question_is_what_the_tool_shows() -> None:
    one, size = SplitSize(1), SplitSize(300, 0.0, uncertain_share=1.0, odds=(0.5, 0.9))
    prompts = list(demo_prompts(0, DemoSizes(one, size, one, one))["cold_start"])
    cities = {city.name: city for city in load_world().cities}
    asked = [p for p in prompts if p.ability == Ability.SEARCH]
    assert {p.answers[0] for p in asked} == {"yes", "no"}
    for prompt in asked:
        found = city_document(cities[str(prompt.extra["city"])]).text
        assert answer_from(prompt, plan(prompt, ALWAYS, random.Random(0)), found) == prompt.answers[0]
