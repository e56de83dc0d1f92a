"""`irg` as one of several processes, with a report of records read and shardings of the state.

  python train_worker.py REPORT.json ARGUMENTS OF irg
"""

import collections
import json
import sys

import jax

from irg_jax import commands, sharding
from irg_jax.data import sources
from irg_jax.train import run as train_run


class Recorded:
  """A source that records which of its records are read."""

  def __init__(self, source, read):
    self._source, self._read = source, read

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    self._read(int(i))
    return self._source[i]

  @property
  def metadata(self):
    return self._source.metadata


def main(path, arguments) -> int:
  read, states = collections.defaultdict(set), []
  open_sources, loop, check_data = sources.open_sources, train_run.loop, train_run.check_data

  def recorded(*args, **kwargs):
    return {mode: Recorded(source, lambda i, mode=mode: read[mode].add(i))
            for mode, source in open_sources(*args, **kwargs).items()}

  def checked(*args):
    found = check_data(*args)
    read.clear()  # of the check, which reads all records of small modes
    return found

  def watched(run, stage, optimizer, state, *args):
    states.append((run.mesh, shapes(state)))
    end = loop(run, stage, optimizer, state, *args)
    states.append((run.mesh, shapes(end[0])))
    return end

  sources.open_sources, train_run.loop, train_run.check_data = recorded, watched, checked
  status = commands.main(arguments)
  with open(path, "w") as file:
    json.dump({"read": {mode: sorted(records) for mode, records in read.items()},
               **layout(states)}, file)
  return status


def shapes(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def layout(states) -> dict:
  """Counts of kernels and of split kernels; names of leaves with another sharding than declared."""
  kernels = split = 0
  wrong = []
  for mesh, state in states:
    declared = jax.tree.leaves(sharding.parameter_shardings(state, mesh))
    for (path, x), placed in zip(jax.tree.leaves_with_path(state), declared, strict=True):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if not x.sharding.is_equivalent_to(placed, len(x.shape)):
        wrong.append(name)
      if name.endswith("/q/kernel") or name.endswith("/gate/kernel"):
        kernels += 1
        split += x.sharding.shard_shape(x.shape) != x.shape
  return {"kernels": kernels, "kernels split": split, "not as declared": wrong}


if __name__ == "__main__":
  sys.exit(main(sys.argv[1], sys.argv[2:]))
