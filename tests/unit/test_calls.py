"""The agent's calls: read as they were written, in either syntax; what cannot be read is told what to write."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.rollout.calls import parse_turn
from metis_fast.types import ToolCall

SYNTAXES = ("strict", "lenient")


def wrap(body):
    return f"<tool_call>\n{body}\n</tool_call>"


def call(name="python", arguments='{"code": "1"}'):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


# -- which part of a message is the call ----------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        (call(), "python", {"code": "1"}),
        ("<reason>hm</reason> " + call() + " trailing", "python", {"code": "1"}),
        (call("a") + call("b"), "b", {"code": "1"}),
        (call(arguments='{"a": {"b": [1, {"c": null}]}}'), "python", {"a": {"b": [1, {"c": None}]}}),
        (call(arguments='{"code": "<tool_call>"}'), "python", {"code": "<tool_call>"}),
        (call(arguments='{"code": "</tool_call>"}'), "python", {"code": "</tool_call>"}),
        (call(arguments='{"code": "\'\\"</tool_call><tool_call>{}"}') + call("b"), "b", {"code": "1"}),
        (
            call("a", arguments='{"code": "<tool_call>{}</tool_call> <tool_call>"}'),
            "a",
            {"code": "<tool_call>{}</tool_call> <tool_call>"},
        ),
        (call("a") + "<tool_call>{unfinished", "a", {"code": "1"}),
        ("<tool_call> would do: " + call(), "python", {"code": "1"}),
        ("<think>a <tool_call>?</think>" + call(), "python", {"code": "1"}),
        ("<think>now " + call(), "python", {"code": "1"}),
        ("<think>" + call() + "</think><answer>5</answer>", "python", {"code": "1"}),
        (call() + "<answer>5</answer>", "python", {"code": "1"}),
        ("<answer>5</answer>" + call(), "python", {"code": "1"}),
        (call(arguments='{"code": "<answer>5</answer>"}'), "python", {"code": "<answer>5</answer>"}),
        ('<tool_call>\n {"name": "image_search"}\n</tool_call>', "image_search", {}),
        (call(arguments='{"code": "é😀\\n"}'), "python", {"code": "é😀\n"}),
        (call(arguments='{"code": "<\\/tool_call>"}'), "python", {"code": "</tool_call>"}),
    ],
)
def test_a_well_formed_call_is_read(text, name, arguments, syntax):
    parsed = parse_turn(text, syntax)
    assert parsed.call is not None and parsed.call.name == name
    assert parsed.arguments == arguments == json.loads(parsed.call.arguments)
    assert parsed.error == ""


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "<answer>Paris</answer>",
        "</tool_call>",
        "< tool_call>{}</tool_call>",
        "tool_call",
        "I could use <tool_call> but need not. <answer>5</answer>",
        "<answer>5</answer> without any <tool_call>.",
        "<think>is <tool_call> of use? {no}</think>\n<answer>5</answer>",
        '<tool_call>{"name": "python", "arguments": {"code": "</tool_call>"}} <answer>5</answer>',
        "<tool_call>" * 9 + "<answer>5</answer>",
    ],
)
def test_a_message_without_a_closed_call_and_with_an_answer_or_no_tag_calls_nothing(text, syntax):
    assert parse_turn(text, syntax).call is None


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "</tool_call><tool_call>{}",
        "<reason><tool_call></reason>",
        "<tool_call> or <answer>5",
        "</answer><tool_call><answer>",
        '<tool_call>{"name": "python", "arguments": {"code": "print(\'<answer>5</answer>\')"}}',
    ],
)
def test_an_open_call_without_a_finished_answer_is_a_malformed_one(text, syntax):
    parsed = parse_turn(text, syntax)
    assert parsed.call == ToolCall("", "") and parsed.error == "the tool call has no </tool_call>; write it behind the object"


# -- what is wrong with it ------------------------------------------------------------------------------------------------

NAMED = '{"name": "python", '
FAULTS = [
    ("", "it is empty; write {"),
    (NAMED + '"arguments": {"code": "a\nb"}}', "a raw line break in a string; write \\n"),
    (NAMED + '"arguments": {"code": "a\tb"}}', "a raw tab in a string; write \\t"),
    (NAMED + '"arguments": {"code": "a\x1bb"}}', "a raw control character in a string; write \\u001b"),
    (NAMED + '"arguments": {"code": "1",}}', "a comma before } or ]; leave it out"),
    (NAMED + '"arguments": {"code": ["1",]}}', "a comma before } or ]; leave it out"),
    ("{'name': 'python', 'arguments': {'code': '1'}}", 'single quotes; write "'),
    (NAMED + '"arguments": {"code": \'1\'}}', 'single quotes; write "'),
    ('```json\n{"name": "python"}\n```', "leave out the ``` around it"),
    ('{"name": "python"}\n```', "leave it out"),
    (NAMED + '"arguments": {"code": "1"}', "it ends too early; close every { with }"),
    ('{"name": "python"}}', '"}" after its end; leave it out'),
    ('{"name": "a"}\n{"name": "b"}', "several objects; write one call a message"),
    ('{"name": "a"}, {"name": "b"}', "several objects; write one call a message"),
    ('{"name": "a"} so', '"so" after its end; leave it out'),
    ("<function=python><parameter=code>1</parameter></function>", "it is XML; write {"),
    (NAMED + "# now\n" + '"arguments": {}}', "a comment; leave it out"),
    (NAMED + '"arguments": {"code": "1"} // now\n}', "a comment; leave it out"),
    (NAMED + '"arguments": {"a": True}}', "True; write true, false, null"),
    (NAMED + '"arguments": None}', "None; write true, false, null"),
    ("{“name”: “python”}", '“ for a quote; write "'),
    ('{"name": “python”}', '“ for a quote; write "'),
    (NAMED + '"arguments": {"code": "print("a")"}}', 'write \\" for a quote in a string'),
    (NAMED + '"arguments": {"code": """print(1)"""}}', 'write \\" for a quote in a string'),
    (NAMED + '"arguments": {"code": "a" "b": 1}}', "the , or : that is missing"),
    (NAMED + '"arguments": {"code": "1}}', 'has no end; write \\" for a quote in a string, <\\/tool_call> for the tag'),
    (NAMED + '"arguments": {"code": "\\d"}}', "write \\\\ for a backslash"),
    ("{name: python}", 'write names in " quotes'),
    ("python(1)", 'it begins with "python(1)"; write {'),
    ("{oops}", 'write names in " quotes'),
    ('{{"name": "python", "arguments": {{}}}}', "{{ for a brace; write {"),
    ('{\\"name\\": \\"python\\"}', "a backslash outside of a string; leave it out"),
    (NAMED + '"arguments": {"code": oops}}', '"oops}}" where something else is expected; write {'),
    ('{"name": "a", "arguments": {"code": ' + "1" * 5000 + "}}", "a number in it is too long"),
    ('{"name": "a", "arguments": ' + "[" * 100_000 + "}", "it is nested too deeply"),
    ('{"name": "a", "arguments": {"code": "\\ud800"}}', "half of a surrogate pair"),
    ('{"name": "\\udfff"}', "half of a surrogate pair"),
    ('\u00a0{"name": "a"}', "U+00A0 outside of a string; leave it out"),
    ('{"name": "a"}\u00a0', "U+00A0 outside of a string; leave it out"),
    ('{"name":\u2003"a"}', "U+2003 outside of a string; leave it out"),
    ('{"name": "a",\u3000"arguments": {}}', "U+3000 outside of a string; leave it out"),
    ('\ufeff{"name": "a"}', "U+FEFF outside of a string; leave it out"),
    ('{"name": "a"}\u200b', "U+200B outside of a string; leave it out"),
    ('{"name": "a"\x0b}', "U+000B outside of a string; leave it out"),
    ('{"name": "a"}\0', "U+0000 outside of a string; leave it out"),
    ("\u00a0", "U+00A0 outside of a string; leave it out"),
    ('\u00a0```\n{"name": "a"}\n```', "U+00A0 outside of a string; leave it out"),
]


@pytest.mark.parametrize(("body", "says"), FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_a_malformed_call_is_still_a_call_and_is_told_what_to_write(body, says):
    parsed = parse_turn(wrap(body))
    assert parsed.call == ToolCall("", "") and parsed.arguments is None
    assert parsed.error.startswith("the tool call is not valid JSON: ") and says in parsed.error
    assert len(parsed.error) <= 200 and "\n" not in parsed.error


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[]", 'is a list, but needs a "name": write one call'),
        ('[{"name": "a"}, {"name": "b"}]', "write one call a message"),
        ('"python"', 'needs a "name", a string: write {'),
        ('{"name": 3}', 'needs a "name", a string: write {'),
        ('{"arguments": {}}', 'needs a "name", a string: write {'),
        ('{"type": "function", "function": {"name": "python"}}', 'needs a "name", a string: write {'),
    ],
)
def test_a_call_without_a_name_is_told_so(body, says, syntax):
    parsed = parse_turn(wrap(body), syntax)
    assert parsed.call == ToolCall("", "") and parsed.arguments is None and says in parsed.error


@pytest.mark.parametrize("arguments", ['"1"', "[1]", "null", "3"])
def test_arguments_that_are_no_object_keep_the_name_that_was_asked_for(arguments):
    for syntax in SYNTAXES:
        parsed = parse_turn(call(arguments=arguments), syntax)
        assert parsed.call == ToolCall("python", arguments)
        assert parsed.arguments is None and "must be an object" in parsed.error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('"parameters": {"code": "1"}', 'write "arguments": {...} instead of "parameters"'),
        ('"args": {"code": "1"}', 'write "arguments": {...} instead of "args"'),
        ('"code": "1"', '"arguments" is missing: write "arguments": {...}'),
        ('"arguments": "{\\"code\\": \\"1\\"}"', 'not a string: write "arguments": {...}'),
    ],
)
def test_arguments_in_another_place_are_told_where_to_stand(body, says):
    parsed = parse_turn(wrap(NAMED + body + "}"))
    assert parsed.call is not None and parsed.call.name == "python" and parsed.arguments is None
    assert says in parsed.error


# -- lenient --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        NAMED + '"arguments": {"code": "a\n\tb</tool_call>"}}',
        "{'name': 'python', 'arguments': {'code': 'a\\n\\tb</tool_call>'}}",
        "{'name': 'python', 'arguments': {'code': 'a\n\tb</tool_call>',},}",
        '```json\n{"name": "python", "arguments": {"code": "a\\n\\tb</tool_call>"}}\n```',
        '```\n{"name": "python", "arguments": {"code": "a\\n\\tb</tool_call>"}}```',
        NAMED + '"parameters": {"code": "a\\n\\tb</tool_call>"}}',
        NAMED + '"args": {"code": "a\\n\\tb</tool_call>"}}',
        NAMED + '"arguments": "{\\"code\\": \\"a\\\\n\\\\tb</tool_call>\\"}"}',
        NAMED + '"arguments": "{\\"code\\": \\"a\\n\\tb</tool_call>\\"}"}',
    ],
)
def test_lenient_reads_what_can_only_mean_one_thing_and_strict_refuses_it(body):
    parsed = parse_turn(wrap(body), "lenient")
    assert parsed.error == "" and parsed.arguments == {"code": "a\n\tb</tool_call>"}
    assert parsed.call == ToolCall("python", json.dumps(parsed.arguments))
    assert parse_turn(wrap(body), "strict").arguments is None


REFUSED = [
    body for body, _ in FAULTS if not any(mark in body for mark in ("\n", "\t", "\x1b", ",}", ",]", "'", "True", "None"))
]


@pytest.mark.parametrize(
    "body",
    [
        *REFUSED,
        '{"name": "a"}\n{"name": "b"}',
        '{"name": "a",,}',
        '{"name": "a", "arguments": {,}}',
        '{"name": "a", "arguments": {"x": [,]}}',
        '{"name": "a", "arguments": {"x": 1 2}}',
        '{"name": "a", "arguments": {"x": "1" "2"}}',
        "{'name': 'a', 'arguments': {'x': 'print('1')'}}",
        "{'name': 'a', 'arguments': {'x': 'a\\/b'}}",
        "{'name': 'a', 'arguments': {'x': '\\x41'}}",
        "{'name': 'a', 'arguments': {'x': (1, 2)}}",
        "{'name': 'a', 'arguments': {'x': b'1'}}",
        "{'name': 'a', 'arguments': {'x': f'1'}}",
        "{'name': 'a', 'arguments': dict(x=1)}",
        "{'name': 'a', 'arguments': {'x': 0x10}}",
        "{'name': 'a', 'arguments': {'x': nan}}",
        "{'name': 'a', 'arguments': {'x'}}",
        '```json\n{"name": "a"}',
        '{"name": "a"}\n```',
        "'" * 99,
    ],
)
def test_lenient_refuses_what_is_in_doubt_in_the_words_of_strict(body):
    parsed = parse_turn(wrap(body), "lenient")
    assert parsed.arguments is None and parsed == parse_turn(wrap(body), "strict")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"name": "python", "name": "search", "arguments": {}}', '"name" stands twice'),
        ('{"name": "a", "arguments": {"x": "1"}, "arguments": {"x": "2"}}', '"arguments" stands twice'),
        ('{"name": "a", "arguments": {"x": "1", "x": "2"}}', '"x" stands twice'),
        ('{"name": "a", "arguments": {"x": [{"y": 1, "\\u0079": 2}]}}', '"y" stands twice'),
        ('{"name": "a", "parameters": {"x": "1"}, "parameters": {"x": "2"}}', '"parameters" stands twice'),
        ("{'name': 'a', 'arguments': {'x': 1, \"x\": 2,}}", '"x" stands twice'),
        ('```\n{"name": "a", "arguments": {"x": 1, "x": 1}}\n```', '"x" stands twice'),
        ('{"name": "a", "arguments": {"\\ud800": 1, "\\ud800": 1}}', '"?" stands twice'),
        ('{"name": "a", "arguments": "{\\"x\\": 1, \\"x\\": 2}"}', '"arguments" must be an object, not a string'),
        ('{"name": "a", "parameters": {"x": "1"}, "x": "2"}', '"x" beside "parameters"; write all arguments in "arguments"'),
        ('{"name": "a", "arguments": {"x": "1"}, "x": "2"}', '"x" beside "arguments"; write all arguments in "arguments"'),
        ('{"name": "a", "arguments": {}, "parameters": {"x": "1"}}', '"parameters" beside "arguments"'),
        ('{"name": "a", "arguments": null, "args": {"x": "1"}}', '"args" beside "arguments"'),
        ('{"name": "a", "parameters": {}, "args": {}}', '"arguments" is missing'),
    ],
)
def test_lenient_refuses_what_says_two_things(body, says):
    parsed = parse_turn(wrap(body), "lenient")
    assert parsed.arguments is None and says in parsed.error
    assert len(parsed.error) <= 200 and "\n" not in parsed.error
    parsed.error.encode()


def test_strict_reads_a_name_that_stands_twice_as_json_does():
    twice = parse_turn(wrap('{"name": "a", "name": "b", "arguments": {"x": 1, "x": 2}, "x": 3}'), "strict")
    assert twice.call == ToolCall("b", '{"x": 2}') and twice.arguments == {"x": 2}


@pytest.mark.parametrize("place", ["arguments", "parameters", "args"])
def test_what_servers_write_beside_a_call_says_nothing(place):
    body = json.dumps({"id": "call_1", "type": "function", "name": "python", place: {"code": "1"}})
    assert parse_turn(wrap(body), "lenient").arguments == {"code": "1"}


@pytest.mark.parametrize("arguments", ['"1"', '"[1]"', '"{\\"a\\": \\"\\\\ud800\\"}"', '"{"'])
def test_lenient_takes_a_string_for_arguments_only_if_it_holds_an_object(arguments):
    parsed = parse_turn(call(arguments=arguments), "lenient")
    assert parsed.arguments is None and "must be an object" in parsed.error


# -- any text -------------------------------------------------------------------------------------------------------------

PIECES = """x = 1\n~print('a')~print("b")~\\n~\t~<tool_call>~</tool_call>~{~}~[~]~,~, ~'~"~\"\"\"~True~None~\\~/"""
PIECES += "~<answer>5</answer>~:~#~é😀~```~ ~1~\x1b~\u2028~<think>~null"
CODE = st.lists(st.sampled_from(PIECES.split("~")), max_size=12).map("".join)
VALUE = st.recursive(
    st.one_of(CODE, st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(CODE, inner, max_size=2)),
    max_leaves=4,
)


def raw(text):
    """JSON with its control characters written as they are."""
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\\\")


def trailing(tree):
    """JSON with a comma behind the last item of everything that has items."""
    if isinstance(tree, dict):
        return "{" + "".join(f"{json.dumps(key)}: {trailing(value)}, " for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + "".join(f"{trailing(value)}, " for value in tree) + "]"
    return json.dumps(tree)


def single(text):
    """JSON with strings in single quotes, as people write it."""
    tokens = json.dumps(text)
    out, inside, i = "", False, 0
    while i < len(tokens):
        char = tokens[i]
        if char == '"':
            inside, char = not inside, "'"
        elif char == "\\":
            i += 1
            char = '"' if tokens[i] == '"' else "\\" + tokens[i]
        elif char == "'" and inside:
            char = "\\'"
        out, i = out + char, i + 1
    return out


SPELLINGS = {
    "strict": json.dumps,
    "unicode": lambda tree: json.dumps(tree, ensure_ascii=False),
    "raw": lambda tree: raw(json.dumps(tree)),
    "trailing": trailing,
    "python": repr,
    "single": single,
    "fence": lambda tree: f"```json\n{json.dumps(tree)}\n```",
    "parameters": lambda tree: json.dumps({"name": tree["name"], "parameters": tree["arguments"]}),
    "string": lambda tree: json.dumps({"name": tree["name"], "arguments": json.dumps(tree["arguments"])}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@given(arguments=st.dictionaries(CODE, VALUE, max_size=3))
@settings(max_examples=40)
def test_lenient_reads_back_exactly_what_was_meant_or_refuses(spelling, arguments):
    text = SPELLINGS[spelling]({"name": "python", "arguments": arguments})
    parsed = parse_turn(f"<reason>hm</reason>\n{wrap(text)}", "lenient")
    assert parsed.call is not None
    if parsed.arguments is None:
        assert spelling == "python" and parsed.error  # repr has escapes that JSON has not
        assert any(mark in text for mark in ("\\x", "\\u", "\\'"))
    else:
        assert parsed.arguments == arguments and parsed.call.name == "python"
    strict = parse_turn(f"<reason>hm</reason>\n{wrap(text)}", "strict")
    assert strict.arguments is None or strict.arguments == arguments
    assert strict.arguments is not None or spelling not in ("strict", "unicode")


@given(code=CODE, cut=st.integers(0, 60), drop=st.integers(0, 3))
@settings(max_examples=150)
def test_a_damaged_call_is_refused_or_means_what_was_meant(code, cut, drop):
    whole = json.dumps({"name": "python", "arguments": {"code": code}})
    damaged = whole[:cut] + whole[cut + drop :]
    for syntax in SYNTAXES:
        parsed = parse_turn(wrap(damaged), syntax)
        try:
            meant = json.loads(damaged)
        except ValueError:
            meant = None
        if meant is not None and isinstance(meant, dict) and isinstance(meant.get("arguments"), dict):
            assert parsed.arguments == meant["arguments"] or "name" not in meant
        elif syntax == "strict":
            assert parsed.arguments is None and 0 < len(parsed.error) <= 200


HUGE = [
    "<tool_call>",
    "</tool_call>",
    "<tool_call>{",
    '<tool_call>{"',
    '<tool_call>{"</tool_call>',
    "<tool_call></tool_call>",
    "{",
    "[",
]
HUGE += [
    '<tool_call>"</tool_call>"',
    "<tool_call>{'",
    "<tool_call>{'\"",
    "<answer>",
    '{"a":',
    "'",
    "\\",
    '<tool_call>{"a": \'</tool_call>',
]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("unit", HUGE)
def test_a_huge_message_is_read_to_its_end_and_its_error_is_short(unit, syntax):
    for text in (unit * 100_000, "<tool_call>{" + unit * 100_000 + "</tool_call>"):
        parsed = parse_turn(text, syntax)
        # a search that takes the square of its length would take an hour
        assert parsed.arguments is None and len(parsed.error) <= 200


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=200)
def test_no_text_makes_the_parser_fail(before, body):
    for syntax in SYNTAXES:
        parsed = parse_turn(f"{before}<tool_call>{body}</tool_call>", syntax)
        assert parsed.call is not None
        assert (parsed.arguments is None) == bool(parsed.error)
        assert len(parsed.error) <= 200 and "\n" not in parsed.error
