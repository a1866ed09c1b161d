"""Detects labels with a side, such as "left kidney", in many languages. Flipped images would make them wrong."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import permutations

# Whole words.
SIDES = """
    left right links rechts linke linker linkes rechte rechter rechtes gauche droit droite
    izquierdo izquierda derecho derecha esquerdo esquerda direito direita esquerre esquerra dret dreta
    sinistro sinistra destro destra sinister dexter dextra
    lewy lewa lewe lewej lewego prawy prawa prawe prawej prawego
    levý levá levé levého pravý pravá pravé pravého ľavý ľavá ľavé ľavej pravej lijevi lijeva lijevo desni desna desno
    левый левая левое левой левого правый правая правое правой правого ляв лява ляво десен дясна дясно
    лівий ліва ліве лівої лівого правий права праве правої правого леви лева десни десна
    vasen vasemman oikea oikean jobb sağ stanga drept dreapta kairys kairė dešinys dešinė
    trái phải kiri kanan
    يسار يمين يسرى يمنى أيسر أيمن ايسر ايمن يسري يمني چپ راست
    שמאל שמאלי שמאלית ימין ימני ימנית
    बायां दायां बायाँ दायाँ बाएँ दाएँ बाएं दाएं बायें दायें बायीं दायीं बाईं दाईं बाया दाया বাম ডান இடது வலது
"""
# Beginnings of words.
STEMS = "vänster höger vänstra högra venstre højre høyre høgre stâng dreapt αριστερ δεξι"
# Anywhere in a label, for languages without spaces.
PARTS = ("左", "右", "왼쪽", "오른쪽", "왼", "좌측", "우측", "ซ้าย", "ขวา")
ARTICLES = ("ال", "ה")
# Abbreviations, parts of compound words, and ambiguous words, as (left, right). They count only if the labels contain
# both sides of a pair.
PAIRS = (
    ("l", "r"),
    ("left", "right"),
    ("links", "rechts"),
    ("linke", "rechte"),
    ("gauche", "droite"),
    ("gauche", "droit"),
    ("izq", "der"),
    ("izquierdo", "derecho"),
    ("izquierda", "derecha"),
    ("sin", "dex"),
    ("sx", "dx"),
    ("os", "od"),
    ("sol", "sağ"),
    ("sol", "sag"),
    ("bal", "jobb"),
    ("lev", "prav"),
    ("leva", "prava"),
    ("levy", "pravy"),
    ("leve", "prave"),
    ("lavy", "pravy"),
    ("lava", "prava"),
    ("lave", "prave"),
    ("vanster", "hoger"),
    ("venstre", "hojre"),
    ("venstre", "hoyre"),
    ("trai", "phai"),
    ("좌", "우"),
)


def labels_with_a_side(labels: Sequence[str]) -> list[str]:
    """Returns the labels that a flip would make wrong: with a spelt-out side, or in pairs such as L and R."""
    words = {label: _words(label) for label in labels}
    spelt = {label for label in labels if _has_a_side(label, words[label])}
    for one, other in permutations(labels, 2):
        if _are_mirrored(words[one], words[other]):
            spelt |= {one, other}
    return [label for label in labels if label in spelt]


def _has_a_side(label: str, words: set[str]) -> bool:
    bare = words | {word.removeprefix(article) for word in words for article in ARTICLES}
    is_spelt = bool(bare & WORDS) or any(word.startswith(KNOWN_STEMS) for word in words)
    return is_spelt or any(part in unicodedata.normalize("NFC", label) for part in PARTS)


def _are_mirrored(words: set[str], others: set[str]) -> bool:
    """Whether two labels differ in a single word, and there only by left and right, such as LK and RK."""
    if len(words - others) != 1 or len(others - words) != 1:
        return False
    (word,), (other,) = words - others, others - words
    for left, right in KNOWN_PAIRS:
        if {word, other} == {left, right}:
            return True
        begin_so = word.startswith(left) and other.startswith(right) and word[len(left) :] == other[len(right) :]
        end_so = word.endswith(left) and other.endswith(right) and word[: -len(left)] == other[: -len(right)]
        if begin_so or end_so:
            return True
    return False


def _words(label: str) -> set[str]:
    """Splits a label such as leftKidney or kidney_L into lower-case words. Combining marks stay with their letters."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", unicodedata.normalize("NFC", label))
    letters = "".join(sign if unicodedata.category(sign)[0] in "LM" else " " for sign in apart)
    return {_plain(word) for word in letters.split()}


def _plain(word: str) -> str:
    """Lower-cases a word. Removes the dot of a Turkish capital i, and Greek accents, which capitals lack."""
    folded = unicodedata.normalize("NFD", word.casefold())
    bare = re.sub("(?<=[α-ω])\u0301|\u0307", "", folded)
    return unicodedata.normalize("NFC", bare)


WORDS = frozenset(map(_plain, SIDES.split()))
KNOWN_STEMS = tuple(map(_plain, STEMS.split()))
KNOWN_PAIRS = tuple((_plain(left), _plain(right)) for left, right in PAIRS)
