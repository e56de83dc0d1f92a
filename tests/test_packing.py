"""The buffers of `configs/irgl.py` suit the data that they are meant for."""

import pathlib
import runpy

import pytest

BENCHMARK = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "data.py"


@pytest.fixture(scope="module")
def benchmark():
  return runpy.run_path(str(BENCHMARK))


@pytest.mark.parametrize("stage,least", [("stage1", 0.93), ("stage2", 0.92)])
def test_flops_of_a_row_are_spent_on_tokens(benchmark, stage, least):
  """Thoughts of 100 to 1500 tokens, pictures of 1024 pixels, all modes by their weights."""
  settings = benchmark["load_settings"]()
  use, used = benchmark["packing_use"](settings, getattr(settings, stage), blocks=6)
  assert use >= least
  assert all(0 < share <= 1 for share in used.values())


class Longest:
  """In the place of a numpy Generator: every text at its longest, nothing dropped."""

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
