"""Prompts with a given number of tokens, which are new to every cache or share a prefix."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

#: Common words; most tokenizers encode each as one token.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea kid body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)
_WORDS = _TEXT.split()
#: The tokens after a shared prefix: they stand for a question after a long system prompt.
OWN_TOKENS = 32
_ATTEMPTS = 16
#: Tokens per word, for engines without a tokenizer endpoint: an upper bound for usual tokenizers.
_TOKENS_A_WORD = 1.05

TokenCounter = Callable[[str], int | None]


class Prompts:
    """A generator of texts of random words.

    ``count`` returns the tokens of a text by the engine's tokenizer (None: it has none).
    ``overhead`` is the number of tokens that the chat template adds to a text.
    """

    def __init__(self, count: TokenCounter, *, overhead: int = 0, seed: int | None = None) -> None:
        """Start the generator. The same seed gives the same prompts; without a seed all differ."""
        self._count = count
        self._random = random.Random(seed)
        self.overhead = overhead
        #: Tokens per word; without a tokenizer the caller derives it from the server's counts.
        self.tokens_a_word = _TOKENS_A_WORD

    def unique(self, tokens: int, prefix: str = "") -> str:
        """Return a prompt with a unique end, and a unique start unless a prefix is given.

        ``tokens`` includes those of the chat template and of the prefix.
        """
        return self._text(prefix, max(1, tokens - self.overhead))

    def prefix(self, tokens: int) -> str:
        """Return a shared start for prompts of so many tokens."""
        return self._text("", max(1, tokens - self.overhead - OWN_TOKENS))

    def _text(self, start: str, tokens: int) -> str:
        """Return ``start`` with random words after it, ``tokens`` tokens in all if possible."""
        counted = self._count(start) if start else 0
        begun = len(start.split()) * self.tokens_a_word if counted is None else counted
        guess = max(1, round((tokens - begun) / self.tokens_a_word))
        words = self._words(guess)
        # Search for the most whole words that fit: ``low`` words fit, ``high`` words do not.
        low, high = 0, math.inf
        for _ in range(_ATTEMPTS):
            counted = self._count(_joined(start, words[:guess]))
            if counted is None or counted == tokens:
                return _joined(start, words[:guess])
            low, high = (guess, high) if counted < tokens else (low, guess)
            if high - low <= 1:
                break
            a_word = max(1.0, (counted - begun) / guess)
            step = int((tokens - counted) / a_word) or (1 if counted < tokens else -1)
            guess = int(min(max(guess + step, low + 1), high - 1))
            words += self._words(guess - len(words))
        return self._filled(_joined(start, words[:low] or [self._short(start, tokens)]), tokens)

    def _short(self, start: str, tokens: int) -> str:
        """Return a word that fits where the first random word did not; any word if none fits."""
        words = self._random.sample(_WORDS, len(_WORDS))
        fits = (one for one in words if (self._count(_joined(start, [one])) or 0) <= tokens)
        return next(fits, words[0])

    def _filled(self, text: str, tokens: int) -> str:
        """Return the text with letters added at its end, because less than a word is missing."""
        for letter in (" a", *("a" * _ATTEMPTS)):
            counted = self._count(text + letter)
            if counted is None or counted > tokens:
                # A letter with a space may be two tokens, a letter without one a single token.
                continue
            text += letter
            if counted == tokens:
                break
        return text

    def _words(self, count: int) -> list[str]:
        return self._random.choices(_WORDS, k=count)


def _joined(start: str, words: list[str]) -> str:
    return " ".join((start, *words) if start else words)
