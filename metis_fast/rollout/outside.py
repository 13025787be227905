"""What tools return as tokens: it can spell no control token, and none of the tags that a conversation is made of.

A tokenizer has these tags as tokens of their own, which `split_special_tokens` leaves alone. Here they become ordinary text,
with the tokens that a vocabulary without them would give.
"""

from __future__ import annotations

import re
from itertools import chain, pairwise

from transformers import PreTrainedTokenizerBase

_TAG = re.compile(r"</?(?:tool_call|tool_response|think)(?=>)")


def encode_outside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that neither the agent nor a protocol has written."""
    cuts = [match.end() for match in _TAG.finditer(text)]  # a tag without its last character is no tag
    if not cuts:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
    pieces = [text[start:stop] for start, stop in pairwise((0, *cuts, len(text)))]
    return list(chain.from_iterable(tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]))
