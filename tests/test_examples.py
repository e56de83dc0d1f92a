"""The notebooks of examples/: well-formed and without outputs; the long tests run them."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

BOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# What a reader is to see at the end, over the notebook's names.
SHOWN = {
    "1_generate": "len(result.images) == 2 and all(result.thoughts) and len(results) == 2",
    "2_guidance_rule": "table['text_scale 2, not scaled back']['levels from plain'] > 1 and "
                       "table['text_scale 2, not scaled back']['contrast'] > 1 + "
                       "table['text_scale 2, global']['contrast'] and "
                       "table['no guidance']['right'] > 0.5",
    "3_train": "status == 0 and all(last[name] < first[name] for name in ('ce', 'mse'))",
    "4_evaluate": "status == 0 and right.size == 2 * 2 * 4 and np.nanmean(right) > 0.5",
}
# Runs cells as Jupyter does: the value of a last expression is displayed.
RUNNER = """
import ast, json, sys
cells = [c for c in json.load(open(sys.argv[1]))["cells"] if c["cell_type"] == "code"]
names, shown = {"__name__": "__main__"}, []
for number, cell in enumerate(cells):
  body = ast.parse("".join(cell["source"])).body
  last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
  exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
  if last is not None:
    value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    print(getattr(value, "_repr_html_", value.__repr__)())
assert eval(sys.argv[2], names), sys.argv[2]
"""


def code_of(book):
  return ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]


def test_the_notebooks_are_there():
  assert {path.stem for path in BOOKS} == set(SHOWN)
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert "examples/" in readme


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_well_formed_and_has_no_outputs(path):
  text = path.read_text(encoding="utf-8")
  book = json.loads(text)
  assert len(text) < 20_000 and (book["nbformat"], book["nbformat_minor"]) == (4, 5)
  assert book["metadata"]["kernelspec"]["name"] == "python3"
  ids = [cell["id"] for cell in book["cells"]]
  assert len(set(ids)) == len(ids) and book["cells"][0]["cell_type"] == "markdown"
  for cell in book["cells"]:
    wanted = {"cell_type", "id", "metadata", "source"}
    if cell["cell_type"] == "code":
      wanted |= {"execution_count", "outputs"}
      assert cell["outputs"] == [] and cell["execution_count"] is None
    assert set(cell) == wanted and all(isinstance(line, str) for line in cell["source"])
    assert max(len(line.rstrip("\n")) for line in cell["source"]) <= 100


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_exists(path):
  for code in code_of(json.loads(path.read_text(encoding="utf-8"))):
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.Import):
        assert all(importlib.util.find_spec(alias.name) for alias in node.names), code
      elif isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module)
        for alias in node.names:
          assert (hasattr(module, alias.name)
                  or importlib.util.find_spec(f"{node.module}.{alias.name}")), code


@pytest.mark.long
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
      [sys.executable, "-c", RUNNER, str(path), SHOWN[path.stem]], cwd=tmp_path, text=True,
      env=environment | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"},
      capture_output=True)
  assert done.returncode == 0, done.stderr[-3000:]
  print(done.stdout)
