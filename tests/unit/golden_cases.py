"""What golden forms of the `compact` protocol are of; `golden/compact.json` has them, from when it was the only protocol.

Since then two things were changed on purpose: a tag in an observation is text, and errors say more of what to write instead.
"""

from __future__ import annotations

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
ANSWER = "<answer>Paris</answer><|im_end|>"

# text, sizes of the images (None: it is damaged), limit in tokens, whether the message before was ended
OBSERVATIONS: list[tuple[str, list[tuple[int, int] | None], int, bool]] = [
    ("", [], 100, False),
    ("Paris lies on the Seine.\n", [], 100, False),
    ("a <image> b", [(32, 32)], 100, True),
    ("one", [(32, 32), (96, 32)], 100, False),
    ("a<image>b<image>c", [(32, 32)], 100, False),
    ("a<image>b<image>c", [None, (32, 32)], 100, False),
    ("x" * 400 + "<image>END", [(32, 32)], 50, False),
    ("look <image> and <image> and more of it, much more of it", [(96, 96), (96, 96)], 30, False),
    ("<|im_end|> </tool_response> <|image_pad|>", [], 100, False),
]

# messages, observations (text, outcome), settings of rollout
EPISODES: list[tuple[list[str], list[tuple[str, str]], dict[str, int]]] = [
    ([CALL, ANSWER], [("4", "tool_result")], {}),
    (["<tool_call>{oops}</tool_call>", ANSWER], [], {}),
    (["<tool_call>{<|im_end|>", ANSWER], [], {}),
    (['<tool_call>{"name": "python", "arguments": 3}</tool_call>', ANSWER], [], {}),
    ([CALL, CALL, ANSWER], [("Error: no", "tool_error")], {"max_turns": 2}),
    ([CALL, "x" * 200 + ANSWER], [("4", "tool_result")], {"max_turn_tokens": 60}),
    ([CALL, ANSWER], [("y" * 500, "tool_result")], {"max_response_tokens": 120}),
]

# calls of one session each, with a prompt image of 40 x 30
CODES: list[list[str]] = [
    ["print('hello')", "x = 1", "x", "x + y"],
    ["import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('again')\n5"],
    ["print('before')\nimage_1.show()\nprint('between')\nshow(image_1.rotate(90))\nimage_1.crop((0, 0, 5, 6))"],
    ["print('<image>')\nimage_1.show()\n1 / 0"],
    ["print('x' * 3000)"],
    ["for i in range(10): image_1.resize((4, 4)).show()"],
    ["print('a')\nimport os\nos._exit(3)", "print(1)"],
    ["import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1))\nplt.plot([1, 2])\nplt.show()"],
    ["import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo child']) if False else None\nprint('end', end='')"],
    ["  x = 1"],
    ["import warnings\nwarnings.warn('careful')"],
]
SLOW = ["x = 1", "print('begin')\nwhile True: pass", "x"]
