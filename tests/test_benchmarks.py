"""The registry of benchmarks: one file each, and nothing else names one."""

import pathlib
import re

import numpy as np
from PIL import Image

from irg_jax import evaluate
from irg_jax.commands import main
from irg_jax.commands.eval import benchmarks
from irg_jax.evaluate import base, records, score

PACKAGE = pathlib.Path(evaluate.__file__).parents[1]


def test_no_module_names_a_benchmark_but_its_own_file_and_the_registry():
  own = {benchmark.name: type(benchmark).__module__.split(".")[-1]
         for benchmark in benchmarks().values() if not benchmark.name.startswith("mini")}
  assert own == {name: name for name in own} and len(own) == 5
  named = re.compile(rf"\b({'|'.join(own)})\b")
  found = {path.name for folder in ("evaluate", "generate", "reports", "mini")
           for path in (PACKAGE / folder).glob("*.py") if named.search(path.read_text())}
  assert found == {"__init__.py", *(f"{name}.py" for name in own)}
  assert not named.search((PACKAGE / "commands" / "eval.py").read_text())


def test_the_registry_knows_the_benchmarks_in_the_order_of_the_table():
  assert list(benchmarks()) == ["geneval", "wise", "tiif", "genai_bench", "oneig", "mini",
                                "mini2"]


def test_a_new_benchmark_is_known_by_its_name_once_registered(monkeypatch):
  class New(base.Benchmark):
    name = "new"

  monkeypatch.setattr(evaluate, "BENCHMARKS", {})
  evaluate.register(New())
  assert evaluate.get("new").title == "" and list(evaluate.BENCHMARKS) == ["new"]


class Bright(base.Benchmark):
  """The smallest benchmark: an image's score is its brightness."""

  name, title, columns = "bright", "Brightness", ("Bright",)

  def read_items(self, path):
    return [base.Item(self.name, f"{i}", entry.record["prompt"], 1, entry.record)
            for i, entry in enumerate(records.json_lines(path))]

  def image_path(self, item, image, round):
    return base.round_root(round) / f"{item.id}.png"

  def score(self, folder, options, open_judge):
    return score.score_images(folder, Brightness, {})

  def categories(self, summary):
    return {"overall": summary["overall"]}


class Brightness:

  def __init__(self):
    self._mean = base.Mean()

  def add(self, item, path):
    value = np.asarray(Image.open(path)).mean() / 255
    self._mean.add(value)
    return score.item_line(None, {"brightness": value})

  def value(self):
    return {"overall": self._mean.value(), "items": self._mean.count,
            "unscored": base.Unscored().summary()}


def test_a_new_benchmark_goes_from_prompts_to_the_table(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(benchmarks(), "bright", Bright())
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "a lamp"}\n{"prompt": "the sun"}\n')
  for number, level in ((1, 51), (2, 102)):
    for name in ("0", "1"):
      path = tmp_path / "out" / f"round{number}" / f"{name}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (4, 4), (level,) * 3).save(path)
  assert main(["eval", "score", "bright", "--out", str(tmp_path / "out"), "--prompts",
               str(tmp_path / "prompts.jsonl")]) == 0
  assert main(["eval", "report", str(tmp_path / "out"), "--to", str(tmp_path / "report")]) == 0
  assert "round 2: Bright 0.400 (2 scored, 0 not there" in (said := capsys.readouterr().out)
  assert "| this run, round 1 |" in said and "| Bright |" in said
  assert "the sun" in (tmp_path / "report" / "pages" / "bright-001.html").read_text()
