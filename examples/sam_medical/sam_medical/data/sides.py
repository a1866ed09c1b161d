"""Labels of a left or a right, in the languages that labels are seen in: a mirrored picture makes them wrong."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import permutations

# As words of their own.
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
# As beginnings of words, with whatever ending or thing behind them.
STEMS = "vänster höger vänstra högra venstre højre høyre høgre stâng dreapt αριστερ δεξι"
# In languages that write without spaces, anywhere.
PARTS = ("左", "右", "왼쪽", "오른쪽", "왼", "좌측", "우측", "ซ้าย", "ขวา")
ARTICLES = ("ال", "ה")
# In words that are put together of a side and a thing, or of letters, and words that mean something else as well: only
# where both of a pair are among the labels; the left one first.
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
    """Labels that a mirror makes wrong: those of a left or right, spelt out; and those in pairs of L and R."""
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
    """Whether two labels differ in one word alone, and there by a left and a right: LK and RK, leftkidney."""
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
    """In small letters, also of leftKidney and kidney_L; marks belong to their letters, as Hindi's vowels do."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", unicodedata.normalize("NFC", label))
    letters = "".join(sign if unicodedata.category(sign)[0] in "LM" else " " for sign in apart)
    return {_plain(word) for word in letters.split()}


def _plain(word: str) -> str:
    """In small letters, whichever the alphabet's: a Turkish capital i has a dot, and Greek capitals no accents."""
    folded = unicodedata.normalize("NFD", word.casefold())
    bare = re.sub("(?<=[α-ω])\u0301|\u0307", "", folded)
    return unicodedata.normalize("NFC", bare)


WORDS = frozenset(map(_plain, SIDES.split()))
KNOWN_STEMS = tuple(map(_plain, STEMS.split()))
KNOWN_PAIRS = tuple((_plain(left), _plain(right)) for left, right in PAIRS)
