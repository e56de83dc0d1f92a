"""Losses of the moving average on held-out records (`data.held_out`), by mode.

The records, their rows, their noise and their timesteps are the same at every evaluation, on every
mesh and on any number of processes, so two evaluations differ by the weights alone. No condition is
dropped.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax.data.batch import LENGTH_FEATURES, Dropout, pack_row, stack_rows
from irg_jax.data.pipeline import exceeded_limit
from irg_jax.data.records import MODES
from irg_jax.data.samples import record_features
from irg_jax.train.feed import place, row_block, row_blocks
from irg_jax.train.loss import loss_sums, mean_losses, token_losses
from irg_jax.train.step import sample_noise


class Validation:
  """Computes the losses of one stage.

  Args:
    settings: `TrainSettings`; `stage` are those of the stage.
    sources: held-out records by mode.
    encode: `latents.Encoder`.
  """

  def __init__(self, settings, stage, sources: dict, tokenizer, encode, model, mesh):
    self._settings, self._stage, self._tokenizer = settings, stage, tokenizer
    self._sources = {mode: sources[mode] for mode in stage.mixture if len(sources.get(mode, ()))}
    self._encode, self._mesh = encode, mesh
    self._batches = None  # numpy, of this process
    self._sums = jax.jit(functools.partial(sums, model, settings, mesh),
                         out_shardings=NamedSharding(mesh, PartitionSpec()))
    self.samples = []  # (mode, record) numbers of the records that were used

  def __call__(self, params) -> dict[str, float]:
    """Losses by name, as in the log of a step; {} without records. Called by all processes."""
    if self._batches is None:
      self._batches = self._read()
    placed = (place(batch, self._settings.data.rows, self._mesh) for batch in self._batches)
    totals = [jax.device_get(self._sums(params, batch, np.int32(number)))
              for number, batch in enumerate(placed)]
    if not totals:
      return {}
    losses = jax.device_get(mean_losses(jax.tree.map(lambda *x: sum(x), *totals)))
    found = {name: float(x) for name, x in losses.items()
             if not name.startswith("weight/") and losses.get(f"weight/{name}", 1) > 0}
    return {"loss": sum(found.get(name, 0.0) for name in ("ce", "mse"))} | found

  def _read(self):
    """This process's rows of all batches, which fill up with rows without weight."""
    data, sizes = self._settings.data, self._stage.sizes
    samples = [x for mode, source in self._sources.items() for x in self._features(mode, source)]
    self.samples = [[int(x["sample_mode"][0]), int(x["sample_index"][0])] for x in samples]
    rows = pack(samples, sizes)
    block, _ = row_block(data.rows, self._mesh)
    own = row_blocks(data.rows, self._mesh)[block]
    row = lambda i: rows[i] if i < len(rows) else None
    return [self._batch([row(i) for i in range(first, first + data.rows)], own)
            for first in range(0, len(rows), data.rows)]

  def _batch(self, rows, own):
    """A batch of the rows with numbers `own`; None stands for a row without weight."""
    filled = [rows[i] or rows[0] for i in own]
    batch = stack_rows([pack_row(row, self._stage.sizes) for row in filled])
    weight = np.array([rows[i] is not None for i in own], np.float32)[:, None]
    batch = dataclasses.replace(batch, text_weight=batch.text_weight * weight,
                                latent_weight=batch.latent_weight * weight)
    images = [(i, *image) for i, row in enumerate(filled) for image in images_of(row)]
    return self._encode(batch, images) if images else batch

  def _features(self, mode, source):
    """Features of the first records of a mode that fit a row."""
    data, found = self._settings.data, []
    data = dataclasses.replace(data, dropout=Dropout(text=0.0, vit=0.0, vae=0.0))
    for i in range(len(source)):
      record = source[i]
      rng = np.random.default_rng((self._settings.seed, MODES.index(mode), record.index))
      features = record_features(record, self._tokenizer, self._settings.model, data, rng)
      if exceeded_limit(features, self._stage.sizes, data.max_sample_tokens) is None:
        found.append(features)
      if len(found) == self._settings.watch.records:
        break
    return found


def sums(model, settings, mesh, params, batch, number):
  """`loss.loss_sums` of batch `number`, whose noise depends on that and the seed alone."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    key = jax.random.fold_in(jax.random.key(settings.seed), number)
    noise = sample_noise(batch, key, settings.timestep_shift)
    return loss_sums(*token_losses(model, params, batch, *noise), batch)


def pack(samples, sizes) -> list[list]:
  """Puts each sample into the first row with room for it; samples are features."""
  rows, room = [], []
  for sample in samples:
    need = {buffer: len(sample[name]) for buffer, name in LENGTH_FEATURES.items()}
    fits = lambda left: all(left[buffer] >= length for buffer, length in need.items())
    number = next((i for i, left in enumerate(room) if fits(left)), len(rows))
    if number == len(rows):
      rows.append([])
      room.append(dataclasses.asdict(sizes))
    rows[number].append(sample)
    for buffer, length in need.items():
      room[number][buffer] -= length
  return rows


def images_of(row):
  """(first token in gen, pixels) of the images of a row's samples that are still to be encoded."""
  start = 0
  for sample in row:
    yield from ((start + first, pixels) for first, pixels in sample["images"])
    start += len(sample["gen_place"])
