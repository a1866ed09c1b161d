"""Options from YAML and the command line, and one-line errors."""

import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import get_args

import pytest

from medical_gradient_shares import GradientOptions
from sam_medical.common import choices
from sam_medical.common.choices import PROMPTS
from sam_medical.common.errors import UserError
from sam_medical.data import DATASETS
from sam_medical.data.augmentation import AUGMENTATIONS
from sam_medical.data.geometry import PLANES, STORED
from sam_medical.data.reading import Reading
from sam_medical.evaluation import inspection
from sam_medical.evaluation.metrics import CRITERIA
from sam_medical.methods import METHODS
from sam_medical.options.checks import choices_of
from sam_medical.options.commands import CompareOptions, EvaluateOptions, InspectOptions, PredictOptions, TrainOptions
from sam_medical.options.parsing import parse_options


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_command_line_goes_before_yaml_before_defaults(config):
    arguments = config("learning_rate: 1e-3\nsteps: 7\nlabels: [gray matter, brain]\nresume: true\n")
    options = parse_options(TrainOptions, [*arguments, "--steps", "9"])
    assert (options.learning_rate, options.steps, options.labels) == (1e-3, 9, ["gray matter", "brain"])
    assert options.resume is True and options.batch_size == TrainOptions().batch_size


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepps: 7", "options.yaml has the unknown key 'stepps'; the keys are dataset, data_root, "),
        ("steps: many", "options.yaml: argument --steps: invalid int value: 'many'"),
        ("steps: 1.5", "invalid int value: '1.5'"),
        ("steps: 0", "steps is 0, but it must be at least 1"),
        ("mixed_precision: fp8", "mixed_precision is 'fp8', but it must be no, bf16 or fp16"),
        ("augmentation: wild", "augmentation is 'wild', but it must be one of upright"),
        ("- steps", "must hold lines of the form"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_bad_file_is_answered_in_one_line(config, text, message):
    with pytest.raises(UserError) as error:
        parse_options(TrainOptions, config(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bad_command_line_is_answered_in_one_line(tmp_path):
    for arguments, message in {
        ("--stepps", "7"): "unrecognized arguments: --stepps 7",
        ("--batch_size", "none"): "invalid int value: 'none'",
        ("--config", str(tmp_path / "nothing.yaml")): "cannot read the configuration",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_options(TrainOptions, list(arguments))
    with pytest.raises(UserError, match="adapter is '', but it must be given"):
        parse_options(EvaluateOptions, [])


OPENED = SimpleNamespace(labels=["liver"], reading=Reading())
COMMANDS = ("train", "evaluate", "predict", "compare", "inspect", "made-up")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_before_anything_heavy_is_imported(command):
    code = f"""
import sys
from sam_medical.cli.main import main
sys.argv = ["sam-medical", {command!r}, "--help"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = ("torch", "monai", "peft", "transformers", "accelerate", "numpy", "nibabel", "matplotlib", "scipy")
sys.exit(", ".join(name for name in heavy if name in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_help_names_the_choices_and_every_command_takes_extensions(capsys):
    for options_type in (TrainOptions, EvaluateOptions, PredictOptions, CompareOptions, InspectOptions):
        with pytest.raises(SystemExit):
            parse_options(options_type, ["--help"])
        text = capsys.readouterr().out
        assert "--extensions" in text and text.startswith("usage: ")
        for words in choices_of(options_type).values():
            assert f"{{{','.join(words)}}}" in text


def test_every_word_that_may_be_chosen_stands_for_something():
    assert get_args(choices.Augmentation) == tuple(AUGMENTATIONS)
    assert get_args(choices.Criterion) == tuple(CRITERIA)
    assert get_args(choices.Prompt) == PROMPTS
    assert get_args(choices.Plane) == (*PLANES, STORED)


def test_no_command_takes_an_option_of_another(config):
    for name in ("method", "seed", "learning_rate", "resume", "overwrite", "fold"):
        assert name not in {f.name for f in fields(CompareOptions)}
    assert {f.name for f in fields(GradientOptions)}.isdisjoint({"steps", "mixed_precision", "method"})
    with pytest.raises(UserError, match="unrecognized arguments: --seed 5"):
        parse_options(CompareOptions, ["--seed", "5"])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a user's own, in the current folder, which says when it is imported."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from dataclasses import replace\n"
        "from sam_medical.methods import METHODS\n"
        "from sam_medical.data import DATASETS\n"
        "SLIM = replace(METHODS['s-sam'], title='Slim')\n"
        "METHODS.register(__name__ + '-registered', SLIM)\n"
        "class Data(DATASETS['glas']): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("sam_medical.common.registry.EXTENSIONS", set())
    for registry in (DATASETS, METHODS):
        monkeypatch.setattr(registry, "_values", {**registry._values})
    yield name
    sys.modules.pop(name, None)


def test_extensions_are_imported_before_options_are_checked(module):
    options = parse_options(TrainOptions, ["--extensions", module, "--method", f"{module}-registered"])
    assert METHODS[options.method].title == "Slim" and options.extensions == [module]
    with pytest.raises(UserError, match="extensions names 'nothing_of_that_name', which cannot be imported"):
        parse_options(TrainOptions, ["--extensions", "nothing_of_that_name"])


def test_a_place_is_imported_if_it_was_typed(module):
    assert METHODS[parse_options(TrainOptions, ["--method", f"{module}:SLIM"]).method].title == "Slim"
    options = parse_options(CompareOptions, ["--methods", f"lora,{module}:SLIM", "--dataset", f"{module}:Data"])
    assert options.method_names == ["lora", f"{module}:SLIM"] and options.dataset in DATASETS
    with pytest.raises(UserError, match=f"'{module}:METHODS' is no dataset, but Registry"):
        parse_options(TrainOptions, ["--dataset", f"{module}:METHODS"])


def test_no_name_in_a_file_imports_anything(module, config):
    with pytest.raises(UserError, match=r"the method .* a file's name imports nothing"):
        parse_options(TrainOptions, config(f"method: {module}:SLIM"))
    with pytest.raises(UserError, match="extensions runs code, and is only taken from the command line"):
        parse_options(TrainOptions, config(f"extensions: [{module}]"))
    assert module not in sys.modules
    assert f"{module}:SLIM" not in METHODS
    # Once the user has named the module, it is trusted.
    options = parse_options(TrainOptions, [*config(f"method: {module}:SLIM"), "--extensions", module])
    assert METHODS[options.method].title == "Slim"


def test_inspect_shows_the_labels_and_the_fold_that_it_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(inspection, "open_dataset", lambda *arguments: asked.append(arguments) or OPENED)
    monkeypatch.setattr(inspection, "settle_reading", lambda dataset: dataset.reading)
    options = parse_options(InspectOptions, ["--dataset", "abdominal-us-real", "--fold", "2", "--labels", "liver"])
    inspection.open_all(options)
    assert [(name, split, labels, fold) for name, _, split, labels, _, fold in asked] == [
        ("abdominal-us-real", split, ["liver"], 2) for split in ("train", "validation", "test")
    ]
