"""Where a message that is being sampled completes one of some strings, however they are cut into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Of one tokenizer. Strings must be ASCII: then a token's own text is its part of the whole, whatever stands before."""

    def __init__(self, decode: Callable[[int], str]) -> None:
        """decode: a token's text, control tokens included."""
        self._decode = decode
        self._texts: dict[int, str] = {}  # of tokens that came up

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> StopStrings:
        """Over a tokenizer of bytes, as Qwen's is."""
        return StopStrings(
            lambda token: str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        )

    def text(self, token: int) -> str:
        """A token's text."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._decode(token)
        return text

    def watch(self, strings: Sequence[str]) -> Watch:
        """For one message.

        Raises:
            ValueError: a string is empty, or not ASCII.
        """
        for string in strings:
            if not string or not string.isascii():
                raise ValueError(f"a stop string must be of ASCII characters, and have one; got {string!r}")
        return Watch(self, tuple(strings))

    def completes(self, tokens: Sequence[int], strings: Sequence[str]) -> bool:
        """Whether the last of these tokens is the one with which a string is complete."""
        watch = self.watch(strings)
        longest = max(map(len, strings), default=0)
        start, length = len(tokens), 0
        while start and length <= longest:  # what stands before cannot be part of it
            start -= 1
            length += len(self.text(tokens[start])) if start < len(tokens) - 1 else 0
        found = False
        for token in tokens[start:]:
            found = watch.ends(token)
        return found


class Watch:
    """One message, token by token."""

    def __init__(self, texts: StopStrings, strings: tuple[str, ...]) -> None:
        self._texts, self._strings = texts, strings
        self._keep = max(map(len, strings), default=1) - 1
        self._tail = ""

    def ends(self, token: int) -> bool:
        """Whether a string is complete with this token, the next of the message."""
        if not self._strings:
            return False
        text = self._tail + self._texts.text(token)
        self._tail = text[-self._keep :] if self._keep else ""
        return any(string in text for string in self._strings)
