"""The question: do the tokenizers split and merge as their rules say, and does decoding give the text back."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from distrattn_np.bench.models import tokenizers
from distrattn_np.bench.models.tokenizers import ByteLevelBpe, WordPiece, basic_words, byte_letters, words
from hypothesis import example, given
from hypothesis import strategies as st

MERGES = ["l l", "h e", "he ll", "Ġ w", "o o", "hell o"]
BPE = ByteLevelBpe([*byte_letters(), *(merge.replace(" ", "") for merge in MERGES)], MERGES)
PIECES = ["[UNK]", "[CLS]", "[SEP]", "attend", "##s", "##ing", "a", "##t", "##tend", ",", "!", "cafe", "中"]
WORD_PIECE = WordPiece(PIECES)


def pieces(text):
    return [BPE.decode([number]) for number in BPE.encode(text)]


class TestByteLevelBpe:
    @given(st.text())
    @example("two  spaces\n\n\ttab 12 x²")
    @example("e\u0301 中文 😀 \x00")
    def test_round_trip(self, text):
        assert BPE.decode(BPE.encode(text)) == text

    @given(st.text())
    def test_words_join_to_the_text(self, text):
        assert "".join(words(text)) == text

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hello world", ["hello", " w", "o", "r", "l", "d"]),
            ("hell", ["hell"]),
            ("llll", ["ll", "ll"]),
            ("ooo", ["oo", "o"]),  # pairs are taken from the left
            ("helo", ["he", "l", "o"]),
        ],
    )
    def test_merges(self, text, expected):
        assert pieces(text) == expected

    def test_lower_ranks_merge_first(self):
        bpe = ByteLevelBpe([*byte_letters(), "ab", "bc"], ["b c", "a b"])
        assert [bpe.decode([number]) for number in bpe.encode("abc")] == ["a", "bc"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("I'll say: it's 1234.5", ["I", "'ll", " say", ":", " it", "'s", " ", "1", "2", "3", "4", ".", "5"]),
            ("a  b", ["a", " ", " b"]),
            ("a \n\n b", ["a", " \n\n", " b"]),
            ("end  ", ["end", "  "]),
            ("x²Ⅷ", ["x", "²", "Ⅷ"]),
            ("__init__(self)", ["__", "init", "__(", "self", ")"]),
            ("naïve café", ["naïve", " café"]),
        ],
    )
    def test_words(self, text, expected):
        assert words(text) == expected

    def test_letters_and_numbers_are_unicode_classes(self):
        # every assigned letter is a word with its neighbour, no number is
        for c in map(chr, range(sys.maxunicode + 1)):
            kind = unicodedata.category(c)[0]
            if kind in "LN":
                assert words(f"a{c}") == ([f"a{c}"] if kind == "L" else ["a", c]), hex(ord(c))

    def test_every_byte_has_its_letter(self):
        letters = byte_letters()
        assert len(set(letters)) == 256
        assert all(c.isprintable() and not c.isspace() for c in letters)
        assert letters[ord(" ")] == "Ġ"
        assert letters[ord("a")] == "a"


class TestWordPiece:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Attends", ["attend", "##s"]),
            ("attending, ATTEND!", ["attend", "##ing", ",", "attend", "!"]),
            ("at", ["a", "##t"]),
            ("atten", ["[UNK]"]),
            ("Café", ["cafe"]),
            ("a中a", ["a", "中", "a"]),
            ("", []),
            ("a" * 101, ["[UNK]"]),
            ("a\x00\u200bt\ta", ["a", "##t", "a"]),
        ],
    )
    def test_pieces(self, text, expected):
        numbers = WORD_PIECE.encode(text)
        assert [PIECES[i] for i in numbers] == ["[CLS]", *expected, "[SEP]"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a_b-c", ["a", "_", "b", "-", "c"]),
            ("“quoted”…", ["“", "quoted", "”", "…"]),
            ("$5 + 6", ["$", "5", "+", "6"]),
            (" \n x \t", ["x"]),
            ("ÀÉÎ", ["aei"]),
        ],
    )
    def test_basic_words(self, text, expected):
        assert list(basic_words(text)) == expected

    def test_the_longest_piece_comes_first(self):
        longer = WordPiece(["[CLS]", "[SEP]", "[UNK]", "a", "at", "##t", "##tend", "##end"])
        assert longer.encode("attend") == [0, 4, 6, 1]  # at ##tend, not a ##t ##t... or a ##t ##tend


def test_punctuation_is_ascii_symbols_and_class_p():
    found = {c for c in map(chr, range(128)) if tokenizers.is_punctuation(c)}
    assert found == set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    assert tokenizers.is_punctuation("—")
    assert not tokenizers.is_punctuation("€")
