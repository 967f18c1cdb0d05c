"""Text to token numbers: byte-level BPE (SmolLM2) and WordPiece (MiniLM), from the vocabularies beside the weights."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise


class ByteLevelBpe:
    """GPT-2's byte-level pair encoding with SmolLM2's rule that every digit stands alone.

    Text is split into words, a word is a run of UTF-8 bytes, and neighbouring pieces of a word are merged in the order
    of ``merges``. Special tokens in a text are not recognised: it is all content.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._tokens = list(tokens)
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the tokens of ``text``."""
        numbers: list[int] = []
        for word in words(text):
            if word not in self._words:
                self._words[word] = [self._ids[piece] for piece in self._merge(word)]
            numbers += self._words[word]
        return numbers

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the text of these tokens."""
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        return bytes(byte_of[letter] for i in numbers for letter in self._tokens[i]).decode()

    def _merge(self, word: str) -> list[str]:
        letters = byte_letters()
        pieces = [letters[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            first = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if first not in self._ranks:
                break
            merged: list[str] = []
            for piece in pieces:
                # what was just merged is longer than the pair's left part, so it is not taken again
                if merged and (merged[-1], piece) == first:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        return pieces


@cache
def byte_letters() -> tuple[str, ...]:
    """Return the printable letter that stands for each byte: itself, or the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def words(text: str) -> list[str]:
    """Return the words of ``text``, which joined give it back: digits alone, then GPT-2's rule between them."""
    numbers, rule = _patterns()
    return [word for chunk in numbers.split(text) if chunk for word in rule.findall(chunk)]


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the pattern of a digit (all of Unicode's class N), and of the words between digits."""
    digits = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith("N"))
    letter = rf"[^\W_{digits}]"  # \w is letters, numbers and the underscore
    other = r"(?:[^\s\w]|_)"
    rule = rf"'(?:s|t|re|ve|m|ll|d)| ?{letter}+| ?{other}+|\s+(?!\S)|\s+|[{digits}]"
    return re.compile(f"([{digits}])"), re.compile(rule)


class WordPiece:
    """BERT's uncased tokenizer: lower case without accents, split at spaces and punctuation, longest piece first."""

    LONGEST_WORD = 100

    def __init__(self, tokens: Sequence[str]) -> None:
        self._ids = {token: i for i, token in enumerate(tokens)}

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the tokens of ``text``, between [CLS] and [SEP]."""
        pieces = (piece for word in basic_words(text) for piece in self._split(word))
        return [self._ids[token] for token in ("[CLS]", *pieces, "[SEP]")]

    def _split(self, word: str) -> list[str]:
        pieces: list[str] = []
        start = 0
        while start < len(word) <= self.LONGEST_WORD:
            prefix = "##" if start else ""
            for stop in range(len(word), start, -1):
                if prefix + word[start:stop] in self._ids:
                    break
            else:
                return ["[UNK]"]
            pieces.append(prefix + word[start:stop])
            start = stop
        return pieces or ["[UNK]"]


def basic_words(text: str) -> Iterator[str]:
    """Yield words and single punctuation marks, in lower case and without accents."""
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    word = ""
    for c in text:
        alone = is_punctuation(c) or is_chinese(c)
        if (alone or c == " ") and word:
            yield word
            word = ""
        if alone:
            yield c
        elif c != " ":
            word += c
    if word:
        yield word


def is_punctuation(c: str) -> bool:
    """Whether BERT splits at ``c``: all of ASCII that is not alphanumeric, and Unicode's class P."""
    return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"


def is_chinese(c: str) -> bool:
    """Whether ``c`` is a CJK ideograph, each of which is a word of its own."""
    return "CJK" in unicodedata.name(c, "") and "IDEOGRAPH" in unicodedata.name(c, "")
