"""System messages and observations in the form of the published data, in words of our own."""

from __future__ import annotations

import json
from collections.abc import Sequence

_TOOLS = {
    "python": (
        "Runs Python code in a session that lasts as long as the conversation. The images are there as image_1, image_2 and so "
        "on. What is printed, and every image that is shown, comes back.",
        {"code": "part = image_1.crop((0, 0, 200, 100))\npart"},
    ),
    "text_search": ("Searches the web for pages about a query.", {"query": "who built the old lighthouse at Kestil"}),
    "image_search": ("Searches the web for pages with the image of the question.", {}),
}


def system_message(tools: Sequence[str]) -> str:
    """tools: those that it offers, of python, text_search and image_search."""
    one = len(tools) == 1
    offers = []
    for tool in tools:
        purpose, arguments = _TOOLS[tool]
        offers.append(f"## {tool}\n{purpose}\nFormat: {call(tool, arguments)}")
    return "\n\n".join(
        [
            "You are an assistant that looks closely, thinks, and answers questions about images.",
            "# Tools\nYou may call " + ("the following tool, once or several times." if one else "one of the following tools."),
            *offers,
            "# Decision Guidelines\n"
            "1. Answer at once where the image and what you know are enough.\n"
            "2. Look closer with a tool where something is too small to be read.\n"
            "3. Compute with a tool where a mistake is likely.\n"
            "4. Call a tool only for what you do not have yet.",
            "# Output Format\n"
            "Begin each message with your thoughts in <reason>...</reason>. Then either call one tool in "
            "<tool_call>...</tool_call>, or give the final answer in <answer>...</answer>.",
        ]
    )


def call(tool: str, arguments: dict[str, str]) -> str:
    """A tool call as it stands in a message."""
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def code_result(stdout: str, num_images: int) -> str:
    """What the published python tool answers. stdout: as it was printed."""
    blocks = f"Code execution result:\nstdout:\n```\n{stdout}\n```\n\nstderr:\n```\n\n```"
    return blocks + ("\n\nImages:\n" + "<image>" * num_images if num_images else "")


def search_result(query: str, pages: Sequence[tuple[str, str, str]]) -> str:
    """What the published text search answers. pages: (title, link, snippet)."""
    found = [f"Page {i}. [Title: {title}](Link: {link})\nSnippet: {text}\n" for i, (title, link, text) in enumerate(pages, 1)]
    return f"A Google search for '{query}' found {len(pages)} results:\n\n## Web Results\n" + "\n".join(found)


def image_result(titles: Sequence[str]) -> str:
    """What the published image search answers: each page with its image."""
    pages = "\n\n".join(f"{i}. <image>\n[{title}]\n" for i, title in enumerate(titles, 1))
    return f"A Google image search for the image found {len(titles)} results:\n\n## Web Results\n{pages}"
