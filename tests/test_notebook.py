"""docs/quickstart.ipynb: its cells run from top to bottom, on data and a network of toy size."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from artifacts.checkpoint import open_checkpoint
from dataset.text.tokenizer import Tokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
TINY = (
    "device=cpu dataset.seq_len=256 arch.hidden_size=32 arch.num_heads=2 arch.expansion=1 arch.L_layers=1 "
    "generation.max_output_tokens=4"
)


def test_it_is_kept_without_outputs_which_would_age() -> None:
    nbformat.validate(NOTEBOOK)
    assert not any(cell.outputs or cell.execution_count for cell in NOTEBOOK.cells if cell.cell_type == "code")


def test_the_cells_run_in_their_order(tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, checkpoints, exported = tmp_path / "tokenizer.model", tmp_path / "checkpoints", tmp_path / "exported"
    tokenizer.write_bytes(tiny_tokenizer.model_bytes)
    settings = {
        "LLAMA_TOKENIZER": str(tokenizer),
        "ROWS": "150",
        "TEST_ROWS_PER_FAMILY": "1",
        "SETTINGS": TINY,
        "DATA": str(tmp_path / "data"),
        "CHECKPOINTS": str(checkpoints),
        "EXPORT": str(exported),
        # What Jupyter and IPython keep beside a notebook.
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    client = NotebookClient(NOTEBOOK.copy(), timeout=200, resources={"metadata": {"path": str(DOCS)}})
    cells = {cell.id: cell for cell in client.execute().cells}

    printed = {
        name: "".join(output.get("text", "") for output in cell.outputs) for name, cell in cells.items() if "outputs" in cell
    }
    assert printed["depth"].count("of 15 answers exactly right") == 2
    assert "ACT steps" in printed["halting"] and printed["chat"].startswith("> What is 23 + 45?")
    assert cells["curves"].outputs[0].data["image/png"]
    assert open_checkpoint(checkpoints / "Sample-ACT/notebook").config.arch.hidden_size == 32
    assert (exported / "config.json").is_file()

    # The other cells reuse what is there, or only read.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    subprocess.run(["bash", "-c", cells["data"].source.removeprefix("%%bash")], cwd=DOCS.parent, check=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before
