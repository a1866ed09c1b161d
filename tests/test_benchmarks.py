"""The benchmarks are right: the published baseline is the paper's layer, and bytes and ratios are computed correctly.

Their results are not tested here.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bench
import harness
import precision
from harness import Claim, Timings, bytes_kept, time_interleaved
from published import RebuiltLinear, with_rebuilt_layers
from subjects import METHODS, Subject, held_tensors, trained_values, tuned


@torch.no_grad()
def test_the_published_baseline_is_the_papers_layer_and_learns_scale_and_shift(paper_weight):
    model = nn.Sequential(nn.Linear(12, 8)).double()
    weight, x = model[0].weight.clone(), torch.randn(3, 12).double()
    model = with_rebuilt_layers(model, targets=["0"])
    assert isinstance(model[0], RebuiltLinear)
    assert trained_values(model) == 16
    model[0].scale.normal_()
    model[0].shift.normal_()
    expected = x @ paper_weight(weight, model[0].scale, model[0].shift).T + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_bytes_kept_are_those_of_inputs_that_a_gradient_needs():
    linear, x = nn.Linear(10, 4), torch.randn(6, 10, requires_grad=True)
    assert bytes_kept(lambda: linear(x), [*linear.parameters()]) == x.nbytes
    assert bytes_kept(lambda: linear(x), [*linear.parameters(), x]) == 0
    frozen = nn.Linear(10, 4).requires_grad_(False)
    assert bytes_kept(lambda: frozen(x), [*frozen.parameters()]) == 0
    assert bytes_kept(lambda: frozen(x).exp().relu(), [*frozen.parameters()]) == 2 * 6 * 4 * 4


def test_contenders_take_turns_and_warm_ups_do_not_count():
    calls = []
    timings = time_interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warm_up=2)
    assert [sorted(calls[start : start + 2]) for start in range(0, 10, 2)] == [["a", "b"]] * 5
    assert len({tuple(calls[start : start + 2]) for start in range(0, 10, 2)}) == 2
    assert [len(seconds) for seconds in timings.seconds.values()] == [3, 3]


def test_a_claim_is_the_median_of_the_ratios_of_each_round():
    timings = Timings({"ours": [1.0, 4.0, 3.0], "theirs": [2.0, 2.0, 2.0]})
    claim = timings.claim("step", "ours", "theirs", reach=1.5)
    assert (claim.value, claim.spread, claim.holds) == (1.5, "0.50 - 2.00", True)
    assert not timings.claim("step", "ours", "theirs", reach=1.4).holds
    assert "not reached" in Claim("step", "theirs", 1.2, 1.1).row()[-1]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_values_of_its_own(method):
    subject = Subject("net", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), ["0", "1"], torch.randn(5, 64))
    model = tuned(subject, method)
    model(subject.x).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert len(held_tensors(model)) > 4


def test_a_script_leaves_its_result_and_all_results_make_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["precision.py", "--quick"])
    monkeypatch.setattr(precision, "weights", lambda: {"square": torch.randn(40, 40), "wide": torch.randn(20, 40)})
    harness.run(precision.measure)
    printed = capsys.readouterr().out
    assert "| square |" in printed
    path = Path(printed.strip().splitlines()[-1])
    assert path == tmp_path / "quick" / "precision.json"
    result = json.loads(path.read_text())
    assert all(
        error < 1e-4 for form, error in result["data"]["errors"]["wide"].items() if form != "held on both sides"
    )
    report = bench.report([result], path.parent)
    assert "| wide |" in report and "    python benchmarks/precision.py --quick\n" in report
