"""Shared code of all benchmarks: options, timing, memory, and results as Markdown and JSON.

After a warm-up, contenders take turns within one run, in another order each round. The reported ratio is the median of
the ratios per round. A slow phase of the machine, and memory left by the previous contender, thus affect all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Command-line options of a benchmark."""

    device: str = "cpu"
    dtype: str = "float32"
    rounds: int | None = None
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_device(self, module_or_tensor: Any) -> Any:
        return module_or_tensor.to(self.device, self.torch_dtype)

    def rounds_or(self, full: int, quick: int) -> int:
        """The number of timed rounds: the user's, or the default."""
        return self.rounds or (quick if self.quick else full)


@dataclass(frozen=True)
class Claim:
    """A ratio and its target (``reach``). The ratio should not exceed the target."""

    measure: str
    against: str
    value: float
    reach: float
    spread: str = ""

    @property
    def holds(self) -> bool:
        """Whether the ratio meets the target, within half a percent."""
        return self.value <= 1.005 * self.reach

    def row(self) -> list[str]:
        mark = "reached" if self.holds else "**not reached**"
        return [
            self.measure,
            self.against,
            f"{self.value:.2f}" if self.value > 0.1 else f"{self.value:.3f}",
            self.spread,
            f"{self.reach:.3g}",
            mark,
        ]


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender, per round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, reference: str) -> list[float]:
        """The ratio to the reference of the same round, per round."""
        return [ours / theirs for ours, theirs in zip(self.seconds[name], self.seconds[reference], strict=True)]

    def rows(self, reference: str) -> list[list[str]]:
        """Table rows per contender: name, median seconds, median ratio to the reference and its spread."""
        rows = []
        for name in self.seconds:
            ratios = self.ratios(name, reference)
            median, spread = statistics.median(ratios), spread_of(ratios)
            rows.append([name, f"{self.median(name):.3f}", f"{median:.2f}", spread if name != reference else ""])
        return rows

    def claim(self, measure: str, name: str, reference: str, reach: float) -> Claim:
        ratios = self.ratios(name, reference)
        return Claim(measure, reference, statistics.median(ratios), reach, spread_of(ratios))


@dataclass
class Result:
    """The result of one script: tables with captions, and claims with their targets."""

    name: str
    claims: list[Claim] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def add_table(self, caption: str, columns: list[str], rows: list[list[str]]) -> None:
        table = {"caption": caption, "columns": columns, "rows": rows}
        self.tables.append(table)
        print(f"\n{caption}\n\n{markdown_table(columns, rows)}", flush=True)

    def save(self, options: Options) -> Path:
        """Writes ``NAME.json`` to the results folder."""
        path = results_folder(options) / f"{self.name}.json"
        content = {"machine": machine(options), "options": asdict(options), **asdict(self)}
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, path)
        return path


def results_folder(options: Options) -> Path:
    """The results folder: one per device and dtype, and one for quick runs."""
    kind = "quick" if options.quick else f"{options.device}-{options.dtype}"
    folder = RESULTS / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(measure: Callable[[Options], Result]) -> None:
    """The main function of a script: parses the options, measures, prints and saves."""
    options = parse_options(sys.argv[1:])
    print(machine(options))
    result = prepared(measure)(options)
    if result.claims:
        print("\n" + claims_table(result.claims))
    print(f"\n{result.save(options)}")


def parse_options(arguments: list[str]) -> Options:
    """Parses the options that all scripts share."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, help="how many rounds count")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and three of the encoder's twelve blocks")
    return Options(**vars(parser.parse_args(arguments)))


def prepared(measure: Callable[[Options], Result]) -> Callable[[Options], Result]:
    """``measure`` with a fixed seed, without the user's cache, and without denormal numbers, which slow a CPU down."""

    def with_preparation(options: Options) -> Result:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("There is no CUDA device here: leave --device out, or set it to cpu.")
        os.environ.pop("SVDTUNE_CACHE", None)
        torch.manual_seed(0)
        torch.set_flush_denormal(True)
        return measure(options)

    return with_preparation


def time_interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Timings:
    """Calls every contender once per round, for ``rounds`` rounds after ``warm_up`` rounds.

    The order changes each round: memory left by the previous contender affects a step on a CPU by several per cent.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    shuffled = random.Random(0)
    for round_number in range(warm_up + rounds):
        for name in shuffled.sample(list(contenders), len(contenders)):
            _synchronize()
            start = time.perf_counter()
            contenders[name]()
            _synchronize()
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return Timings(seconds)


def spread_of(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} - {max(ratios):.2f}"


def bytes_kept(forward: Callable[[], object], held: list[torch.Tensor]) -> int:
    """The number of bytes that autograd keeps from a forward pass for the backward pass.

    Args:
        forward: The forward pass.
        held: Tensors that exist anyway and are not counted: parameters, buffers, singular vectors.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # keeps the tensors alive, so that no address is reused
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak of GPU memory during a call, in bytes above the memory in use before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def machine(options: Options) -> str:
    """Describes the machine and the versions in one line."""
    on_gpu = options.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device}, {options.dtype}, torch {torch.__version__}, Python {platform.python_version()}"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claims_table(claims: list[Claim]) -> str:
    columns = ["measure", "against", "ratio", "least - most", "reach", ""]
    return markdown_table(columns, [claim.row() for claim in claims])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
