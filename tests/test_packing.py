"""Buffer sizes of `configs/irgl.py` fit the data."""

import dataclasses
import pathlib
import runpy

import jax
import numpy as np
import pytest

from irg_jax import sharding
from irg_jax.data.batch import BufferSizes
from irg_jax.model.kernels import tpu
from irg_jax.plan import cost, programs
from irg_jax.train.step import row_units, unit_flops
from irg_jax.tokens import Tokens, allowed

BENCHMARK = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "data.py"


@pytest.fixture(scope="module")
def benchmark():
  made = runpy.run_path(str(BENCHMARK))
  # All pairs of a row's tokens: the computing takes longer than to compile it well.
  made["visited_blocks"].__globals__["mask_words"] = jax.jit(
      made["mask_words"].__wrapped__, compiler_options={"xla_backend_optimization_level": 3})
  return made


@pytest.mark.parametrize("stage,least", [("stage1", 0.93), ("stage2", 0.92)])
def test_flops_of_a_row_are_spent_on_tokens(benchmark, stage, least):
  """Thoughts of 100 to 1500 tokens, images of 1024 pixels, all modes by their weights."""
  settings = benchmark["load_settings"]()
  use, used = benchmark["packing_use"](settings, getattr(settings, stage), blocks=6)
  assert use >= least
  assert all(0 < share <= 1 for share in used.values())


class Longest:
  """Stands in for a numpy Generator: every text has its greatest length, nothing is dropped."""

  def integers(self, low, high):
    return high - 1

  def random(self):
    return 1.0


def test_longest_sample_fits_every_buffer(benchmark):
  settings = benchmark["load_settings"]()
  for stage in settings.stages.values():
    for mode in stage.mixture:
      lengths = benchmark["sample_lengths"](mode, settings, Longest())
      assert lengths["und"] + lengths["gen"] <= settings.data.max_sample_tokens
      for buffer, length in lengths.items():
        assert length <= getattr(stage.sizes, buffer), (mode, buffer)


@pytest.mark.parametrize("sizes", [
    BufferSizes(und=4608, gen=3584, vit=2048, text=1024, samples=8), None],
    ids=["8192 tokens", "the rows of stage 2"])
def test_each_token_costs_what_one_expert_needs(benchmark, sizes):
  """Two layers of the real widths, for one device, without rematerialisation."""
  settings = benchmark["load_settings"]()
  model = dataclasses.replace(
      settings.model, remat="none", dtype="float32",
      llm=dataclasses.replace(settings.model.llm, num_layers=2),
      vit=dataclasses.replace(settings.model.vit, num_layers=2))
  stage = dataclasses.replace(settings.stage2, sizes=sizes or settings.stage2.sizes)
  settings = dataclasses.replace(settings, model=model, stage2=stage,
                                 data=dataclasses.replace(settings.data, rows=1))
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  program = programs.train_program(settings, "stage2", mesh)
  with jax.set_mesh(mesh):
    made, unbounded = cost.count_flops(program.trace().jaxpr)
  needed = program.cases[0].needed_flops
  if sizes is None:  # its scores are too many to keep: the backward pass makes them again
    each, count = unit_flops(model), row_units(stage.sizes)
    needed += sum(each[name] * count[name] for name in ("pairs", "vit_pairs")) / 2
  assert unbounded == 0
  assert needed * 0.99 < made < needed * 1.05


@pytest.mark.long
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_the_plan_counts_the_blocks_that_the_kernel_visits_in_such_rows(benchmark, name):
  settings = benchmark["load_settings"]()
  rows = [next(benchmark["open_rows"](settings, settings.stages[name], moments=True, bins=1))]
  by_parts, vit = benchmark["visited_blocks"](settings.model, rows, (1, 4))
  planned, planned_vit = programs.VISIBLE[name]
  assert by_parts[1] <= by_parts[4]
  # One row is not the mean of many.
  assert by_parts[1] == pytest.approx(planned[1], abs=0.12)
  assert vit == pytest.approx(planned_vit, abs=0.12)


def test_blocks_read_are_those_in_which_anything_is_visible(benchmark):
  sample = np.repeat(np.arange(4), (700, 900, 300, 148))[None]
  index = np.arange(2048)[None]
  zeros = np.zeros_like(index)
  tokens = Tokens(sample=sample, index=index, split=zeros, kind=zeros)
  queries, keys = tpu.block_sizes(1024, 2048, 7)
  blocks = np.asarray(allowed(tokens, tokens)).reshape(2, 1024 // queries, queries, -1, keys)
  by_part = blocks.any((2, 4)).mean((1, 2))
  read = benchmark["blocks_read"](*benchmark["mask_words"](tokens), 7, 2)
  assert float(read) == pytest.approx(by_part.max())
