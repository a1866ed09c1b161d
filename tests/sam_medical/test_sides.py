"""Labels with a left or right side, in many languages."""

import pytest

from sam_medical.data.sides import labels_with_a_side

PAIRS = """
levá ledvina | pravá ledvina
levý obratel | pravý obratel
ľavá oblička | pravá oblička
leva_ledvina | prava_ledvina
vänster njure | höger njure
Vänsternjure | Högernjure
venstre nyre | højre nyre
venstre nyre | høyre nyre
vasen munuainen | oikea munuainen
sol böbrek | sağ böbrek
SOL AKCİĞER | SAĞ AKCİĞER
bal vese | jobb vese
rinichi stâng | rinichi drept
왼쪽 신장 | 오른쪽 신장
좌측폐 | 우측폐
좌신장 | 우신장
الكلية اليسرى | الكلية اليمنى
كلية يسرى | كلية يمنى
الفص الأيسر | الفص الأيمن
فص أيسر | فص أيمن
αριστερός νεφρός | δεξιός νεφρός
ΑΡΙΣΤΕΡΗ ΚΟΙΛΙΑ | ΔΕΞΙΑ ΚΟΙΛΙΑ
αριστερά | δεξιά
बायां गुर्दा | दायां गुर्दा
बाएँ फेफड़े | दाएँ फेफड़े
ліва нирка | права нирка
левый желудочек | правый желудочек
thận trái | thận phải
ginjal kiri | ginjal kanan
כליה שמאלית | כליה ימנית
הכליה השמאלית | הכליה הימנית
کلیه چپ | کلیه راست
ไตซ้าย | ไตขวา
lewa nerka | prawa nerka
左肾 | 右肾
linkernier | rechternier
"""


@pytest.mark.parametrize("pair", PAIRS.strip().splitlines())
def test_a_pair_of_sides_is_known(pair):
    labels = pair.split(" | ")
    assert labels_with_a_side([*labels, "aorta"]) == labels


@pytest.mark.parametrize(
    "labels",
    [
        ["sol", "liver"],  # Spanish's sun
        ["bal", "lung"],
        ["sole", "sagittal sinus"],
        ["balloon", "job"],
        ["Levator ani", "pravastatin"],
        ["prawn", "lewd"],
        ["dexterity test", "leave"],
    ],
)
def test_other_words_have_no_side(labels):
    assert labels_with_a_side(labels) == []
