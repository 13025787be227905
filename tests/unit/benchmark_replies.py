"""Questions and replies of ours, on which other evaluation kits were run too (tests/parity/record_benchmarks.py).

Standard library only: the recorder imports it in an environment without this project.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asked:
    """A question. kind: of a free answer. choices: options by their letter, in order."""

    name: str
    question: str
    answer: str
    choices: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    precision: str = ""


@dataclass(frozen=True)
class Case:
    """A reply, and what a judge says of it, call by call. meant: the letter that it chooses, "" for no single one."""

    benchmark: str
    asked: Asked
    reply: str
    judge: tuple[str, ...] = ()
    meant: str | None = None


def lettered(*texts: str) -> dict[str, str]:
    return dict(zip("ABCDEFGH", texts, strict=False))


COLOURS = Asked("colours", "What is the colour of the scarf?", "B", lettered("red", "blue", "dark green", "None"))
SIDES = Asked(
    "sides",
    "Where is the dog, seen from the cart?",
    "C",
    lettered("on the left side", "on the right side", "above it", "behind"),
)
NUMBERS = Asked("numbers", "Which number does the door have?", "D", lettered("12", "21", "112", "2"))
REFUSAL = lettered("a bus", "A train", "a ferry", "a plane", "The image does not feature the object.")
FIVE = Asked("five", "What stands at the stop?", "B", REFUSAL)
TREE = Asked("tree", "Which of them is nearest?", "E", lettered("cup", "Bottle", "dish", "Apple", "None of the above"))
STEPS = Asked("steps", "How long is the edge?", "F", lettered("2 cm", "3 cm", "4 cm", "5 cm", "6 cm", "No correct answer"))
AREAS = Asked("areas", "Which area is larger?", "A", lettered("the triangle", "the square", "both are equal"))

LETTER_FORMS = (
    *("{L}", "({L})", "{L}.", "{L}:", "{l}", "[{L}]", "**{L}**", "{L}. {T}", "({L}) {T}", "{L}: {T}", "{T}", "{T}."),
    *("The answer is {L}.", "The answer is {T}.", "Answer: {L}", "**Answer:** {L}", "Answer: ({L}) {T}", "The answer is: {L}"),
    *("<answer>{L}</answer>", "<answer>{T}</answer>", "<answer>{l}</answer>", "<answer>The answer is {L}</answer>"),
    *("<think>Is it {M}? No.</think><answer>{L}</answer>", "<reason>It is {T}.</reason><answer>{L}. {T}</answer>"),
    *("<think>The letter is {M}", "\\boxed{{{L}}}", "Therefore \\boxed{{{L}}}.", "I think the correct option is {L}"),
    *("{L} because the others do not fit", "Option {L}", "It is {T}, not {U}.", "Either {L} or {M}", "{L}, {M}", "not {M}"),
    *("{L} is what I see in the picture on its other side", "Looking closely at the picture, the option has to be {L}"),
    *("First I zoomed in.\nThen I compared.\nTherefore, the answer is {L}.", "It is {T} as one can see there", "{L}{M}"),
    *("The best answer is {L}", "The best option is {L}", "Best answer: {L}", "Correct: {L}", "{T} ({L})", "It must be {U}"),
)
FIXED_FORMS = (
    *("", "I cannot tell.", "Z", "None", "none of them", "(", "Sorry, I can't help with images of people yet."),
    *("Failed to obtain answer via API.", "I am not sure, but all of the options look wrong to me here", "42", "?"),
)
OTHER_FORMS = ("It must be {U}", "<Thought process>: <<{M}>> <Answer>: <<{M}>>")
UNCLEAR_FORMS = (
    *("<think>The letter is {M}", "Either {L} or {M}", "{L}, {M}", "not {M}", "{L}{M}", "Answer: <<>>", "No Answer"),
    *("Answer:{L}:{M}", "<Thought process>: <<{M}>> <Answer>: <<{L}. {T}>>"),
)
OPTION_JUDGES = ("A", "B", "Z", "the option cannot be found", "(C)")
WEMATH_FORMS = (
    "<Thought process>: <<it is {T}>> <Answer>: <<{L}>>", "<Thought process>: <<{M}>> <Answer>: <<{L}. {T}>>", "Answer: {L}.",
    "The Answer is {L}", "Answer {l}", "Answer: <<>>", "No Answer", "{L} Answer", "Answer: **{L}**", "Answer:{L}:{M}",
)  # fmt: skip


def _option_cases(benchmark: str, questions: tuple[Asked, ...], forms: tuple[str, ...] = LETTER_FORMS) -> Iterator[Case]:
    judges = itertools.cycle(OPTION_JUDGES)
    for asked in questions:
        letters = list(asked.choices)
        for form, (at, letter) in itertools.product(forms, enumerate(letters)):
            other = letters[(at + 1) % len(letters)]
            text, other_text = asked.choices[letter], asked.choices[other]
            reply = form.format(L=letter, l=letter.lower(), T=text, M=other, U=other_text)
            meant = "" if form in UNCLEAR_FORMS else other if form in OTHER_FORMS else letter
            yield Case(benchmark, asked, reply, (next(judges),), meant)
        for reply, judge in itertools.product(FIXED_FORMS, OPTION_JUDGES):
            own = [letter for letter, text in asked.choices.items() if reply and reply.rstrip(".") == text]
            yield Case(benchmark, asked, reply, (judge,), own[0] if own else "")


_FREE = (
    Asked("whole", "How many circles are there?", "14", kind="integer"),
    Asked("nothing", "How many squares are left?", "0", kind="integer"),
    Asked("decimal", "Which share is blue?", "0.6", kind="float", precision="1"),
    Asked("fine", "What is the mean?", "2.50", kind="float", precision="2"),
    Asked("years", "Between which years is the peak?", "[2007, 2008]", kind="list"),
    Asked("yes", "Is the sum greater than 30?", "Yes", kind="text"),
    Asked("name", "Which city is shown?", "Kestil", kind="text"),
)
_FREE_REPLIES = (
    *(
        "14",
        "14.0",
        " 14 ",
        "15",
        "0",
        "0.0",
        "0.6",
        "0.60",
        ".6",
        "0.64",
        "0.66",
        "2.5",
        "2.50",
        "2.504",
        "2.51",
        "14 circles",
    ),
    *("The number is 14.", "The answer is 0.6", "<answer>14</answer>", "<answer>0.6</answer>", "fourteen", "1,400", "60%"),
    *(
        "[2007, 2008]",
        "2007 and 2008",
        "2008, 2007",
        "Yes",
        "yes.",
        "No",
        "Kestil",
        "kestil",
        "It is Kestil.",
        "Varno",
        "",
        "None",
    ),
    *("\\boxed{14}", "The share is 3/5", "14 cm", "about 2.5", "<think>14"),
)
_MATHVISTA_CHOICES = Asked("choice", "Choices:\n(A) 3/11\n(B) 8/11\n(C) 6/11\nWhich?", "B", lettered("3/11", "8/11", "6/11"))


def _mathvista() -> Iterator[Case]:
    yield from _option_cases("mathvista", (_MATHVISTA_CHOICES,))
    for asked, reply in itertools.product(_FREE, _FREE_REPLIES):
        for judge in (asked.answer, "15"):
            yield Case("mathvista", asked, reply, (judge,))


_PROBLEMS = (
    Asked("letter", "Find the length.\nChoices:\nA:2\nB:4\nC:6\nD:8", "C", lettered("2", "4", "6", "8"), "multi-choice"),
    Asked("root", "Find the height.", "2\\sqrt{3}", kind="free-form"),
    Asked("interval", "Which interval is shown?", "(-2, 1]", kind="free-form"),
    Asked("line", "Which line is it?", "y=2x+1", kind="free-form"),
)
_MATH_REPLIES = (
    *(
        "C",
        "C. 6",
        "6",
        "The answer is C",
        "The length is 6.",
        "B",
        "\\boxed{C}",
        "<answer>C</answer>",
        "2\\sqrt{3}",
        "$2\\sqrt{3}$",
    ),
    *(
        "\\boxed{\\sqrt{12}}",
        "3.46",
        "The height is $2\\sqrt{3}$.",
        "(-2, 1]",
        "\\((-2, 1)\\)",
        "y = 2x + 1",
        "y=1+2x",
        "y=2x-1",
        "",
    ),
)


def _mathverse() -> Iterator[Case]:
    for asked, reply in itertools.product(_PROBLEMS, _MATH_REPLIES):
        for extracted, judged in ((asked.answer, "0"), ("null", "0"), (reply, "1"), (f" {asked.answer} ", "?"), ("7", "1\n")):
            yield Case("mathverse", asked, reply, (extracted, judged))


_DYNAMIC = (
    Asked("float", "What is the slope?", "1.250", kind="float"),
    Asked("pi", "What is the area?", "6.283", kind="float"),
    Asked("option", "Which curve is it? choice: (A) one (B) two", "B", kind="multiple choice"),
    Asked("text", "Is it even, odd or neither?", "odd", kind="text"),
)
_SHORT = (
    *(
        "1.250",
        "1.25",
        "1.2505",
        "1.252",
        "1.25 m",
        "-1.25",
        "5",
        "6.283",
        "2π",
        "2 π",
        "2\\pi",
        "π",
        "6.2832",
        "B",
        "b",
        "(B)",
    ),
    *("B. two", "A", "A or B", "two", "odd", "Odd", "even", "od", "", "neither odd nor even", "odd function", "1,250"),
)


def _dynamath() -> Iterator[Case]:
    for asked, short in itertools.product(_DYNAMIC, _SHORT):
        tree = {"solution": "It is seen.", "short answer": short}
        forms = (json.dumps(tree, ensure_ascii=False), f"```json\n{json.dumps(tree, indent=4, ensure_ascii=False)}\n```", short)
        for form, judge in zip(forms, (asked.answer, "no idea", "B"), strict=True):
            yield Case("dynamath", asked, form, (judge,))
    for asked, value in itertools.product(_DYNAMIC, (1.25, 1, True, None, ["B"], {"a": 1})):
        yield Case("dynamath", asked, json.dumps({"solution": "", "short answer": value}), (asked.answer,))
    for asked, form in itertools.product(
        _DYNAMIC, ("The short answer is {A}", "<answer>{A}</answer>", '{{"short answer": "{A}"', "[]")
    ):
        yield Case("dynamath", asked, form.format(A=asked.answer), (asked.answer,))


_LOGIC = (
    Asked("single", "Which box comes next? Select from A-E", "D"),
    Asked("several", "Which two are the same? Select from A-E", "A, C"),
)
_LOGIC_REPLIES = (
    *(
        "D",
        "(D)",
        "D.",
        "The answer is D.",
        "A, C",
        "A and C",
        "AC",
        "C, A",
        "(A) and (C)",
        "\\boxed{D}",
        "<answer>A, C</answer>",
    ),
    *("A", "B", "The sequence is A, B, C, D, E.", "", "I cannot tell.", "It is box D because it turns", "d", "A, C and D"),
)
_LOGIC_JUDGES = ("D", "AC", "CA", "A, C", "Z", "d", "D\n", "ACD")


def _logicvista() -> Iterator[Case]:
    for asked, reply, judge in itertools.product(_LOGIC, _LOGIC_REPLIES, _LOGIC_JUDGES):
        yield Case("logicvista", asked, reply, (judge,))


_CHARTS = (
    Asked("title", "what is its title?", "Loss over time"),
    Asked("lines", "how many lines are there?", "3"),
    Asked("absent", "how many lines are there?", "Not Applicable"),
    Asked("tick", "what is the rightmost labeled tick on the x-axis?", "0.75"),
)
_CHART_REPLIES = (
    *(
        "Loss over time",
        "loss over time.",
        "The title is Loss over time",
        "Loss",
        "3",
        "three",
        "3 lines",
        "4",
        "Not Applicable",
    ),
    *("N/A", "There are no lines.", "0.75", ".75", "0.750", "0.8", ""),
)
_GRADES = (
    '{"extract_answer": "3", "score": 1}', '{"extract_answer": "3", "score": 0}', '{"extract_answer": "", "score": 0.0}',
    '{"score": 1}', '[1]', 'score: 1', '```json\n{"extract_answer": "3", "score": 1}\n```',
)  # fmt: skip


def _charxiv(benchmark: str) -> Iterator[Case]:
    for asked, reply, judge in itertools.product(_CHARTS, _CHART_REPLIES, _GRADES):
        yield Case(benchmark, asked, reply, (judge,))


def cases() -> Iterator[Case]:
    """All of them, at least 300 a benchmark."""
    yield from _option_cases("vstar", (COLOURS, SIDES))
    yield from _option_cases("hrbench4k", (NUMBERS, COLOURS))
    yield from _option_cases("hrbench8k", (SIDES, NUMBERS))
    yield from _option_cases("treebench", (TREE, SIDES))
    yield from _option_cases("mme-realworld", (FIVE, TREE))
    yield from _option_cases("seedbench2plus", (NUMBERS, SIDES))
    yield from _charxiv("charxiv-dq")
    yield from _charxiv("charxiv-rq")
    yield from _mathvista()
    yield from _mathverse()
    yield from _option_cases("wemath", (STEPS, AREAS), (*LETTER_FORMS[::2], *WEMATH_FORMS))
    yield from _dynamath()
    yield from _logicvista()


Hit = dict[str, object]
"""A row with what it was marked: `hit` is 0 or 1."""


def _rolled(rows: list[Hit], share: float) -> list[Hit]:
    rng = random.Random(f"{len(rows)}/{share}")
    return [{**row, "hit": int(rng.random() < share)} for row in rows]


def wemath_hits() -> list[Hit]:
    """525 composites, as there are: 360 of two steps and 165 of three."""
    rows: list[Hit] = []
    for steps, count in ((2, 360), (3, 165)):
        for composite in range(count):
            for role in (*range(1, steps + 1), "multi"):
                rows.append(
                    {"index": len(rows), "ID": composite, "key": f"{steps}steps_{role}", "knowledge concept": "Direction"}
                )
    return _rolled(rows, 0.7)


def dynamath_hits() -> list[Hit]:
    """40 problems in ten variants."""
    levels = ("high school", "undergraduate")
    rows: list[Hit] = []
    for variant in range(1, 11):
        for problem in range(40):
            place = {"subject": ("algebra", "statistics", "puzzle test")[problem % 3], "knowledge_level": levels[problem % 2]}
            rows.append({"index": len(rows), "qid": problem, "varid": variant, **place})
    return _rolled(rows, 0.93)


def hrbench_hits() -> list[Hit]:
    """50 questions in four orders."""
    return _rolled(
        [
            {
                "index": 50 * cycle + number,
                "question": f"{number}?",
                "category": ("single", "cross")[number % 2],
                "cycle_category": cycle,
            }
            for cycle in range(4)
            for number in range(50)
        ],
        0.8,
    )


def domain_hits(task_and_domain: tuple[str, ...], details: tuple[str, ...]) -> list[Hit]:
    """120 rows with a category, for MME-RealWorld and TreeBench."""
    count = len(task_and_domain)
    return _rolled(
        [
            {"index": i, "category": task_and_domain[i % count], "l2-category": details[i // count % len(details)]}
            for i in range(120)
        ],
        0.6,
    )


MME_CATEGORIES = ("Perception/Remote Sensing", "Reasoning/Monitoring", "Perception/OCR with Complex Context")
MME_DETAILS = ("Person/Attribute/color", "count", "vehicle/attribute/type")
TREE_CATEGORIES = ("Perception/OCR", "Reasoning/Ordering", "Perception/Attributes")

BOX_REPLIES = (
    "<think>It is <box>[10,20,50,60]</box>.</think><answer>A</answer>", "<box>[10,20,30,60]</box>", "<box>[50,20,10,60]</box>",
    "<think>none</think><box>[10,20,50,60]</box>", "<think><box>[10, 20, 50, 60]</box></think>", "B", "",
    "<box>[0,0,5,5]</box> and <box>[10,20,50,61]</box>", "<box> [10,20,50,60] </box>", "<box>[10,20,50,60] the cup</box>",
)  # fmt: skip
TRUE_BOXES = ("[[10, 20, 50, 60]]", "[[10, 20, 50, 60], [100, 100, 120, 120]]", "[]")

PROMPT_ROWS: dict[str, dict[str, object]] = {
    "vstar": {"question": "What is the colour?", "A": "red", "B": "None", "C": "blue", "answer": "A"},
    "treebench": {"question": "Which one?", "A": "one", "B": "two", "E": "five", "answer": "A", "hint": "Look."},
    "wemath": {"question": "How long?", "A": "2 cm", "B": "NA", "C": "3 cm", "answer": "A", "requirement": "Answer: <<>>"},
    "mme-realworld": {
        "question": "What is it?",
        "multi-choice options": ["(A) a bus", "(B) a train", "(E) none"],
        "answer": "A",
    },
    "mme-realworld-cn": {"question": "是什么？", "multi-choice options": ["(A) 车", "(B) 船", "(E) 没有"], "answer": "A"},
    "dynamath/float": {"question": "What is {x}?", "answer_type": "float", "answer": "1.000"},
    "dynamath/multiple choice": {"question": "Which?", "answer_type": "multiple choice", "answer": "A"},
    "dynamath/text": {"question": "Odd?", "answer_type": "text", "answer": "odd"},
    "mathverse": {"question": "Find x.", "query_cot": "Think. Find x.", "answer": "3"},
}
