"""The structure of the package: layers, sizes and where things are named.

The figures are printed (`pytest tests/test_house.py -s`), so that a change shows what it costs.
"""

import ast
import functools
import pathlib
import statistics

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "irg_jax"

# From top to bottom: a package imports only packages below it, and the modules at the root.
LAYERS = ("commands", "serve", "mini", "rl", "evaluate", "plan", "train", "generate", "data", "weights",
          "model", "reports")
# The modules at the root, from top to bottom; they import no package.
GROUND = ("compiled", "chips", "sharding", "hub", "runs", "leases", "holders", "tokenizer", "flow",
          "images", "progress", "config", "storage", "buckets", "stores", "messages", "tokens")

# Reading order of one prompt, from the command line to the compiled steps.
PROMPT_PATH = ("commands/generate.py", "generate/run.py", "generate/generator.py",
               "generate/settings.py", "generate/irg.py", "generate/context.py",
               "generate/steps.py", "model/unified.py", "model/decoder.py", "model/attention.py",
               "tokens.py", "flow.py")
# Reading order of one benchmark item, from its prompt to the table.
ITEM_PATH = ("commands/eval.py", "evaluate/base.py", "evaluate/wise.py", "evaluate/generate.py",
             "evaluate/judge.py", "evaluate/score.py", "evaluate/report.py")


def files():
  return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree(path):
  return ast.parse(path.read_text())


def module(path):
  """The dotted name below irg_jax: "data.batch"."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports():
  """{module: modules of the package that it imports}, both below irg_jax."""
  known = {module(path) for path in files()}
  found = {}
  for path in files():
    names = set()
    for node in ast.walk(tree(path)):
      if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "irg_jax":
        base = node.module.removeprefix("irg_jax").lstrip(".")
        inner = [f"{base}.{a.name}".lstrip(".") for a in node.names]
        names |= {name if name in known else base for name in inner}
      elif isinstance(node, ast.Import):
        names |= {a.name.removeprefix("irg_jax.") for a in node.names
                  if a.name.startswith("irg_jax.")}
    found[module(path)] = names - {module(path)}
  return found


def room(name):
  """The package that a module belongs to; modules at the root are their own room."""
  return name.split(".")[0]


def rank(name):
  """Height of a module's room; 0 is the ground."""
  order = (*LAYERS, *GROUND)
  if room(name) in ("", "__main__"):
    return len(order)
  return len(order) - 1 - order.index(room(name))


def lines(path):
  return len(path.read_text().splitlines())


def function_lengths():
  return [node.end_lineno - node.lineno + 1 for path in files() for node in ast.walk(tree(path))
          if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_every_package_and_root_module_has_its_place_in_the_order():
  rooms = {room(module(path)) for path in files()} - {"", "__main__"}
  assert rooms == {*LAYERS, *GROUND}


def test_imports_go_down_only():
  upward = [f"{name} imports {other}" for name, others in imports().items() for other in others
            if rank(other) > rank(name)]
  assert not upward


def test_no_two_modules_import_each_other_directly_or_through_others():
  state, cycles = {}, []

  def visit(name, path):
    if state.get(name) == "open":
      cycles.append(" -> ".join([*path[path.index(name):], name]))
    elif name not in state:
      state[name] = "open"
      for other in sorted(imports().get(name, ())):
        visit(other, [*path, name])
      state[name] = "done"

  for name in sorted(imports()):
    visit(name, [])
  assert not cycles


def test_imports_stand_at_the_top_of_a_module_but_in_commands():
  inside = [f"{module(path)}:{node.lineno}" for path in files()
            if room(module(path)) != "commands"
            for function in ast.walk(tree(path)) if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
  assert not inside


def test_the_package_stays_small():
  count, total = len(files()), sum(map(lines, files()))
  print(f"\n{count} files, {total} lines")
  # 95 files and 15,500 lines, and what came since: kernels for TPUs and GPUs with their plans;
  # answers of any judge, bounded replies, checked headers and images, locks; the first hour:
  # `irg_jax.load`, prompts as people type them, traces that go on, completion; pods as they are
  # used: buckets, the hub, watching a run, adapters; a server with its page, answers in text;
  # forecasts of updates, int8 weights; attention of a lone CPU; learning from rewards; a second
  # mini world; a learned stop; controls of a run, and figures over seeds; a stop learned from
  # rewards; what helps a small model to look, and mistakes to learn from; s3:// as well as gs://.
  assert count <= 95 + 5 + 3 + 4 + 9 + 5 + 2 + 15 + 4 + 16 + 4 + 1 + 5 + 1 + 1
  assert total <= (15_500 + 1_200 + 1_300 + 1_200 + 2_200 + 900 + 200 + 1_900 + 700 + 150 + 1_600
                   + 700 + 150 + 250 + 250 + 200 + 100)


def test_no_file_is_long():
  sizes = sorted(((lines(path), module(path)) for path in files()), reverse=True)
  print(f"\nlongest files: {sizes[:3]}")
  assert sizes[0][0] <= 350


def test_lines_are_short():
  long = [f"{module(path)}:{number}" for path in files()
          for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
  assert not long


def test_functions_are_short():
  lengths = function_lengths()
  median, p90 = statistics.median(lengths), np.percentile(lengths, 90)
  print(f"\n{len(lengths)} functions: median {median}, 90th percentile {p90}, "
        f"longest {max(lengths)} lines")
  assert median <= 8
  assert p90 <= 22


@pytest.mark.parametrize("benchmark", ["geneval", "wise", "tiif", "genai_bench", "oneig"])
def test_a_benchmark_is_named_in_its_own_file_and_once_in_the_registry(benchmark):
  words = {benchmark, {"genai_bench": "GenAI-Bench", "oneig": "OneIG", "geneval": "GenEval",
                       "wise": "WISE", "tiif": "TIIF"}[benchmark]}
  registry = PACKAGE / "evaluate" / "__init__.py"
  own = PACKAGE / "evaluate" / f"{benchmark}.py"
  assert own.is_file()
  named = [module(path) for path in files() if path not in (own, registry)
           and words & set(_words(path))]
  assert not named
  assert _words(registry).count(benchmark) <= 2  # imported, and listed


def _words(path):
  """Names in code and words of the strings that are not documentation."""
  documentation = {id(node.body[0].value) for node in ast.walk(tree(path))
                   if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                   and node.body and isinstance(node.body[0], ast.Expr)}
  found = []
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Name):
      found.append(node.id)
    elif isinstance(node, ast.alias):
      found += node.name.split(".")
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      if id(node) not in documentation:
        found += node.value.replace('"', " ").replace(",", " ").replace(".", " ").split()
  return found


@pytest.mark.parametrize("path, limit", [(PROMPT_PATH, 12), (ITEM_PATH, 7)],
                         ids=["prompt", "benchmark item"])
def test_the_story_is_read_in_few_files(path, limit):
  assert len(path) <= limit
  names = [module(PACKAGE / file) for file in path]
  assert all((PACKAGE / file).is_file() for file in path)
  for i, name in enumerate(names[1:], 1):
    linked = any(name in imports()[other] or other in imports()[name]
                 for other in names[:i] + names[i + 1:])
    assert linked, f"{name} is reached from none of the others"
