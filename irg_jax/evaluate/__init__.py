"""Benchmarks: generate images for their prompts, score them, and report beside published figures.

One item of a benchmark from prompt to table, file by file:

  commands/eval.py        the flags of `irg eval generate`, `score` and `report`
  evaluate/BENCHMARK.py   prompts, layout, questions, parsing, scoring, published figures
  evaluate/base.py        the protocol that a benchmark's file implements
  evaluate/generate.py    the images of the prompts, with traces
  evaluate/judge.py       the judge's answers, each paid for once
  evaluate/score.py       a line for each prompt, and a summary of each round
  evaluate/report.py      the table and the pages

A new benchmark is one file with a subclass of `base.Benchmark`, and a line of `_REGISTERED` below
or a call of `register`.
"""

from irg_jax.evaluate import base, geneval, genai_bench, oneig, tiif, wise

_REGISTERED = (geneval.GENEVAL, wise.WISE, tiif.TIIF, genai_bench.GENAI_BENCH, oneig.ONEIG)
BENCHMARKS: dict[str, base.Benchmark] = {}  # by name, in the order of the table


def register(benchmark: base.Benchmark) -> None:
  """Adds a benchmark to `BENCHMARKS`."""
  BENCHMARKS[benchmark.name] = benchmark


def get(name: str) -> base.Benchmark:
  """The benchmark of that name; ValueError names the known ones."""
  if name not in BENCHMARKS:
    raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
  return BENCHMARKS[name]


for _benchmark in _REGISTERED:
  register(_benchmark)
