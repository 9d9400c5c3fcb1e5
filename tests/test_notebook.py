"""The notebook runs from top to bottom on real runs, and is stored without outputs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from synthetic import write_run

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = ROOT / "notebooks" / "analysis.ipynb"


def execute(runs, tmp_path) -> tuple[list[str], str]:
    """Run the notebook with its parameters replaced; return kinds and text of outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = f"RUNS = {[str(run) for run in runs]!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    texts = (o.get("data", {}).get("text/html", "") + o.get("text", "") for o in outputs)
    return kinds, " ".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_the_notebook_draws_an_evaluated_run(tmp_path, gated):
    run = write_run(tmp_path / "pair", gated=gated)
    shown, text = execute([run], tmp_path)
    assert shown.count("image/png") == 7 + gated and "text/html" in shown
    assert ("No gate answered" in text) != gated
    assert not (run / "plots").exists()


@pytest.mark.slow
def test_the_notebook_says_what_imported_data_lack(imported, tmp_path):
    shown, text = execute([imported], tmp_path)
    assert shown.count("image/png") == 5  # two losses, who answers what, times and traffic
    assert "No conflict questions were asked" in text
    assert "No universal, never seen questions were asked" in text and "need a `fact`" in text
    assert "No scale of the local adapter was tried" in text and "No gate answered" in text


@pytest.mark.slow
def test_the_notebook_compares_runs_that_are_not_evaluated(tmp_path):
    runs = [write_run(tmp_path / mode, mode=mode, evaluated=False) for mode in ("dual", "fedavg")]
    shown, text = execute(runs, tmp_path)
    assert shown.count("image/png") >= 4 and "Not evaluated yet" in text


@pytest.mark.slow
def test_the_notebook_reads_a_run_without_a_round(tmp_path):
    run = write_run(tmp_path / "run", evaluated=False)
    (run / "history.json").write_text("[]")
    shown, text = execute([run], tmp_path)
    assert "image/png" not in shown and "Nothing was evaluated" in text


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(not c.outputs and c.execution_count is None for c in cells)


def test_reading_and_drawing_runs_needs_no_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = f"""
import sys
import fedlora_app as fedlora
run = fedlora.load_run({str(run)!r})
history = fedlora.load_history(run)
fedlora.plot_accuracy(history), fedlora.plot_swap_table(run.evaluation)
from fedlora_app.report.page import write_report
write_report(run.path)
heavy = {{"torch", "transformers", "peft", "flwr", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {})
