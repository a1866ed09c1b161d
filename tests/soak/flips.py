"""Single bits of an adapter's files, of the cache and of a run's state, flipped: noticed, or without any effect."""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from soak.example_run import STEPS, make_options, result_of, run_in_a_child, same
from soak.outcome import Outcome, until
from svdtune import SVDScaleShiftConfig
from svdtune.cache import FOLDER

# The run whose state is damaged ends here, as if it were killed.
LAST_STEP = STEPS - 2

# An effect below this is none.
ABSOLUTE = 1e-6


def flip(path: Path, randomness: random.Random) -> str:
    """Flips one random bit of a file; says which."""
    data = bytearray(path.read_bytes())
    position = randomness.randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)
    return f"{path.name}, bit {position}"


def run(seconds: float, seed: int) -> list[Outcome]:
    parts = (_of_adapters, _of_the_cache, _of_a_state)
    return [part(seconds / len(parts), seed) for part in parts]


def _base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).eval()


def _output(folder: Path) -> Tensor:
    torch.manual_seed(1)
    return PeftModel.from_pretrained(_base(), str(folder)).eval()(torch.randn(4, 12))


def _of_adapters(seconds: float, seed: int) -> Outcome:
    outcome, randomness = Outcome("bit flips in an adapter"), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, damaged = Path(name, "adapter"), Path(name, "damaged")
        model = get_peft_model(_base(), SVDScaleShiftConfig(target_modules=["0", "2"], init_weights=False))
        model.save_pretrained(folder)
        expected = _output(folder)
        for _ in until(seconds):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(folder, damaged)
            where = flip(damaged / randomness.choice(["adapter_config.json", "adapter_model.safetensors"]), randomness)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    output = _output(damaged)
                except Exception:
                    outcome.add("refused")
                    continue
            if torch.allclose(output, expected, atol=ABSOLUTE):
                outcome.add("without effect")
            elif told:
                outcome.add("warned of")
            else:
                outcome.fail(
                    f"{where}: the output is off by {(output - expected).abs().max():.2g}, and nothing was said"
                )
    return outcome


def _of_the_cache(seconds: float, seed: int) -> Outcome:
    outcome, randomness = Outcome("bit flips in the cache"), random.Random(seed)
    config = {"target_modules": ["0", "2"]}
    with tempfile.TemporaryDirectory() as cache:
        expected = get_peft_model(_base(), SVDScaleShiftConfig(**config, svd_cache=cache))
        for _ in until(seconds):
            path = randomness.choice(sorted(Path(cache, FOLDER).glob("*.safetensors")))
            path.write_bytes(path.read_bytes())  # no longer the file that is mapped into memory
            where = flip(path, randomness)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                again = get_peft_model(_base(), SVDScaleShiftConfig(**config, svd_cache=cache))
            layers = [(again.base_model.model[index], expected.base_model.model[index]) for index in (0, 2)]
            same = all(
                torch.equal(getattr(one.spectrum, name), getattr(other.spectrum, name))
                for one, other in layers
                for name in ("left", "right", "singular_values")
            )
            if not same:
                outcome.fail(f"{where}: other vectors are in use")
            else:
                outcome.add("warned of, computed again" if told else "without effect")
    return outcome


def _of_a_state(seconds: float, seed: int) -> Outcome:
    """Of a run that was killed before its end: it goes on to the same bits, from the state before, or says why not."""
    outcome, randomness = Outcome("bit flips in a run's state"), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        options, killed, damaged = make_options(root), root / "killed", root / "damaged"
        run_in_a_child(options, root / "whole", None)
        run_in_a_child({**options, "stop_after": LAST_STEP}, killed, None)
        states = [path for path in (killed / "checkpoint").rglob("*") if path.is_file()]
        for _ in until(seconds):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(killed, damaged)
            where = flip(damaged / randomness.choice(states).relative_to(killed), randomness)
            code = run_in_a_child(options, damaged, None)
            log = damaged.with_name("damaged.log").read_text()
            if code == 2 and "Traceback" not in log:
                outcome.add("refused")
            elif code == 0 and same(result_of(damaged), result_of(root / "whole")):
                outcome.add("resumed to the same bits")
            else:
                outcome.fail(f"{where}: ended with {code}, {log[-200:]}")
    return outcome
