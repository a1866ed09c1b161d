"""Options come from YAML and the command line alike, and every mistake is told in one line."""

import pytest

from sam_medical.common.errors import UserError
from sam_medical.options.options import EvaluateOptions, TrainOptions, parse_options


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
        ("stepps: 7", "options.yaml has the unknown key 'stepps'; the keys are method, dataset, "),
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
