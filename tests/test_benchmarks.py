"""The registry of benchmarks: one file each, and nothing else names one."""

import pathlib
import re

from irg_jax import evaluate
from irg_jax.commands.eval import benchmarks
from irg_jax.evaluate import base

PACKAGE = pathlib.Path(evaluate.__file__).parents[1]


def test_no_module_names_a_benchmark_but_its_own_file_and_the_registry():
  own = {benchmark.name: type(benchmark).__module__.split(".")[-1]
         for benchmark in benchmarks().values() if benchmark.name != "mini"}
  assert own == {name: name for name in own} and len(own) == 5
  named = re.compile(rf"\b({'|'.join(own)})\b")
  found = {path.name for folder in ("evaluate", "generate", "reports", "mini")
           for path in (PACKAGE / folder).glob("*.py") if named.search(path.read_text())}
  assert found == {"__init__.py", *(f"{name}.py" for name in own)}
  assert not named.search((PACKAGE / "commands" / "eval.py").read_text())


def test_the_registry_knows_the_benchmarks_in_the_order_of_the_table():
  assert list(benchmarks()) == ["geneval", "wise", "tiif", "genai_bench", "oneig", "mini"]


def test_a_new_benchmark_is_known_by_its_name_once_registered(monkeypatch):
  class New(base.Benchmark):
    name = "new"

  monkeypatch.setattr(evaluate, "BENCHMARKS", {})
  evaluate.register(New())
  assert evaluate.get("new").title == "" and list(evaluate.BENCHMARKS) == ["new"]
