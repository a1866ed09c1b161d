"""Draws the masks of all methods side by side, for some test images."""

from __future__ import annotations

from pathlib import Path

from sam_medical.adapters.adapter import load_adapter
from sam_medical.comparison.finished import FinishedRuns
from sam_medical.comparison.results import Results
from sam_medical.data.loading import evaluation_loader, spread
from sam_medical.data.opening import open_dataset, settle_reading
from sam_medical.evaluation.prediction import predict_masks
from sam_medical.evaluation.report import draw_grid
from sam_medical.methods import METHODS


def draw_masks(finished: FinishedRuns, results: Results, path: Path) -> None:
    """Draws the paper's Figure 3: test images, their true masks, and each method's masks; first fold, first seed.

    This needs images and adapters, so it works only where the runs are stored.
    """
    options = finished.plan.options
    seeds = {method: results.done_seeds(method) for method in options.method_names}
    first = {method: next(iter(cells.values()))[0] for method, cells in seeds.items() if cells}
    if not first:
        return
    root, labels = options.data_root, options.labels
    name, fold = finished.plan.dataset_of(1)
    reading = settle_reading(open_dataset(name, root, "train", labels, options.reading, fold))
    dataset = open_dataset(name, root, "test", labels, reading, fold)
    samples = spread(dataset, options.examples)
    columns = {"truth": [sample.masks for sample in samples]}
    for method, cell in first.items():
        adapter = finished.folder_of(cell) / "adapter"
        if not adapter.is_dir():  # not stored with the run, because of its size
            continue
        model, task = load_adapter(adapter, options.backbone)
        loader = evaluation_loader(samples, task.framing, batch_size=1)
        columns[METHODS[method].title] = [masks for _, masks in predict_masks(model, loader)]
    draw_grid(samples, columns, list(dataset.labels), path)
