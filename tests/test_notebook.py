"""The notebook runs from top to bottom with the demo pair, by the interpreter of the tests."""

import json
import pathlib
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from ctc_spec_jax import demo

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "decode.ipynb"
KERNEL = "running-interpreter"


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """Name of a kernel of the running interpreter, whatever kernels the machine has."""
    folder = tmp_path / "kernels" / KERNEL
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": KERNEL, "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return KERNEL


def test_outputs_are_cleared():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.skipif(not demo.target_folder().is_dir(), reason="the demo pair is not there yet")
def test_notebook_runs(kernel):
    """Every cell succeeds, its own check against plain decoding included, and a plot comes out."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=600, kernel_name=kernel, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
