"""What LLM judges of VLMEvalKit are asked, in our words, and what is read from their replies.

The roles are VLMEvalKit's: find the option that is meant, extract an answer, compare two. What differs: a reply that cannot be
read gives no verdict, where VLMEvalKit counts a wrong answer or draws an option at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from metis_fast.evaluate.asking import kept_options
from metis_fast.evaluate.benchmark import JudgeForm
from metis_fast.evaluate.question import RIGHT, WRONG, Question, Verdict
from metis_fast.evaluate.scorers import vlmeval

UNREAD = Verdict(None, "the judge's reply cannot be read")
NO_OPTION = Verdict(0.0, "the judge finds no option that is meant")
NO_ANSWER = Verdict(0.0, "the judge finds no answer")
_NOTHING = ("null", "none", "n/a")
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


def _option_call(question: Question, reply: str, answers: Sequence[str]) -> str | None:
    options = kept_options(question)
    if vlmeval.infer_option(reply, options) is not None:
        return None
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return (
        "Somebody answered a question with several options. Find the option that the answer means.\n"
        f"Reply with one letter of {', '.join(options)} alone, or with Z if the answer means none of them.\n\n"
        f"Question: {question.question}\nOptions:\n{listed}\nAnswer: {reply}\nLetter:"
    )


def _read_option(question: Question, reply: str, answers: Sequence[str]) -> Verdict:
    options = kept_options(question)
    letter = vlmeval.infer_option(reply, options)
    if letter is None:
        letter = vlmeval.infer_option(answers[0], options)
    if letter is None:
        return UNREAD
    return NO_OPTION if letter == vlmeval.NO_MATCH else RIGHT if letter == question.answer else WRONG


option_judge = JudgeForm((_option_call,), _read_option)
"""V*, HR-Bench, SEED-Bench-2-Plus, WeMath: asked where the rule reads no option."""


def _mathvista_call(question: Question, reply: str, answers: Sequence[str]) -> str | None:
    if vlmeval.mathvista_rule(question, reply).value is not None:
        return None
    form = {
        "integer": "as an integer, like 14",
        "float": "as a decimal number, like 0.6",
        "list": "as a Python list, like [2007, 2008]",
    }.get(question.extra.get("answer_type", ""), "in as few words as it has")
    form = "as the letter of its option, like B" if question.options else form
    return (
        f"Extract the final answer from the response below, {form}, without unit and without any other word; null if there is "
        "none.\n\n"
        f"Question: {question.question}\nResponse: {reply}\nExtracted answer:"
    )


def _read_mathvista(question: Question, reply: str, answers: Sequence[str]) -> Verdict:
    verdict = vlmeval.mathvista_rule(question, reply)
    if verdict.value is not None:
        return verdict
    letter = vlmeval.infer_option(answers[0], question.options) if question.options else None
    if letter is not None:
        return NO_OPTION if letter == vlmeval.NO_MATCH else RIGHT if letter == question.answer else WRONG
    if _says_nothing(answers[0]):
        return NO_ANSWER
    if question.options or (question.extra.get("answer_type") in ("integer", "float") and not _is_number(answers[0])):
        return UNREAD
    return RIGHT if vlmeval.mathvista_value(question, answers[0]) else WRONG


def _says_nothing(answer: str) -> bool:
    return answer.strip().rstrip(".").lower() in _NOTHING


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


mathvista_judge = JudgeForm((_mathvista_call,), _read_mathvista, tries=5, heat=0.5)


def _extract_call(question: Question, reply: str, answers: Sequence[str]) -> str:
    return (
        "Extract the final answer from the response to a problem of mathematics: a letter, a number, an expression, or "
        f"whatever it is, and nothing else; null if there is none.\n\nResponse: {reply}\nExtracted answer:"
    )


def _compare_call(question: Question, reply: str, answers: Sequence[str]) -> str | None:
    if answers[0].strip() == question.answer.strip():
        return None
    asked = question.extra.get("question_for_eval", question.question)
    return (
        "Do these two answers to a problem of mathematics say the same? The letter of an option and its text are two answers; "
        "50 cm and 0.5 m are one. Reply with 1 if they do, with 0 if they do not, and with nothing else.\n\n"
        f"Problem: {asked}\nRight answer: {question.answer}\nGiven answer: {answers[0]}\nSame:"
    )


def _read_compared(question: Question, reply: str, answers: Sequence[str]) -> Verdict:
    if answers[0].strip() == question.answer.strip():
        return RIGHT
    return {"1": RIGHT, "0": WRONG}.get(answers[1].strip(), UNREAD)


mathverse_judge = JudgeForm((_extract_call, _compare_call), _read_compared, tries=5, heat=0.5)


def _dynamath_call(question: Question, reply: str, answers: Sequence[str]) -> str | None:
    if vlmeval.dynamath_rule(question, reply).reason != vlmeval.ASKS.reason:
        return None
    form = "the letter of the option" if question.extra.get("answer_type") == "multiple choice" else "the number, three digits"
    text = vlmeval.dynamath_text(reply)
    return f"Give the final answer of the text below, {form}, alone in one line; null if it gives none.\n\n{text}"


def _read_dynamath(question: Question, reply: str, answers: Sequence[str]) -> Verdict:
    verdict = vlmeval.dynamath_rule(question, reply)
    if verdict.reason != vlmeval.ASKS.reason:
        return verdict
    nothing = _says_nothing(answers[0])
    try:
        short = None if nothing else vlmeval.dynamath_short_answer(answers[0], question.extra.get("answer_type", ""))
    except ValueError:
        return UNREAD
    if short is not None:
        return vlmeval.dynamath_compare(question, short)
    letters = question.extra.get("answer_type") == "multiple choice"
    if letters and question.answer in vlmeval.dynamath_text(reply)[:3].upper():
        return RIGHT
    return NO_ANSWER if nothing else UNREAD


dynamath_judge = JudgeForm(
    (_dynamath_call,), _read_dynamath, tries=1, system="You turn free answers into short ones, as you are told."
)


def _letters_call(question: Question, reply: str, answers: Sequence[str]) -> str:
    return (
        "Which options does the answer below choose? Reply with their capital letters alone, one after the other; infer them "
        "from the options of the question where it names none. Reply with Z if it chooses none.\n\n"
        f"Question: {question.question}\nAnswer: {reply}\nLetters:"
    )


def _read_letters(question: Question, reply: str, answers: Sequence[str]) -> Verdict:
    letters = answers[0]
    if not (letters.isupper() and letters.isalpha()):
        return UNREAD
    gold = "".join(sorted(question.answer.lower().split(", ")))
    return RIGHT if "".join(sorted(letters.lower())) == gold else WRONG


letters_judge = JudgeForm((_letters_call,), _read_letters, tries=5, heat=0.5)
"""LogicVista, for which VLMEvalKit has no rule."""


def _grading_call(question: Question, reply: str, answers: Sequence[str]) -> str:
    if published := question.extra.get("grading_query"):
        return published.replace("{PREDICTION}", reply)
    return (
        "Grade an answer to a question about a chart. Extract the final answer from the response, compare it with the truth.\n"
        "Score 1 only if both name the same thing: other notation of the same term is the same; a number has to have the same "
        "value; of several terms all have to be there, in their order; a trend has to be the same in meaning; where the truth "
        "is Not Applicable, the response has to say so. Otherwise, and for an empty response, score 0.\n"
        'Reply with JSON alone: {"extract_answer": "...", "score": 0 or 1}\n\n'
        f"Question: {question.extra.get('asked', question.question)}\nTruth: {question.answer}\nResponse: {reply}"
    )


def _read_grading(question: Question, reply: str, answers: Sequence[str]) -> Verdict:
    text = answers[0]
    fenced = _FENCE.fullmatch(text)
    try:
        tree = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return UNREAD
    if not isinstance(tree, dict) or not {"extract_answer", "extracted_answer"} & tree.keys():
        return UNREAD
    score = tree.get("score")
    return Verdict(float(score)) if isinstance(score, int | float) and score in (0, 1) else UNREAD


grading_judge = JudgeForm((_grading_call,), _read_grading, tries=10)
"""CharXiv, for which VLMEvalKit has no rule: the file's own grading query where it has one."""
