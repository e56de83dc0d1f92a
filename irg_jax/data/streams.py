"""One stream of the data: read, shuffle, mix, pack; the rows and the state to go on from."""

import collections
import json

import grain
import numpy as np

from irg_jax.config import ModelConfig
from irg_jax.data.batch import LENGTH_FEATURES, BufferSizes
from irg_jax.data.examples import record_features
from irg_jax.data.records import MODES
from irg_jax.data.sequence import sample_features


def open_stream(stream: int, streams: int, data, sources, tokenizer, model: ModelConfig,
                mixture: dict, sizes: BufferSizes, seed: int, start: str | None):
  """Stream number `stream` of `streams`; the other arguments are those of `open_batches`.

  Args:
    start: "state" of the last row that was used; None: from the beginning.

  Returns:
    An endless grain.IterDataset of {"stream": its number, "row": packed features, "state": a
    text that stands for what comes after this row}.
  """
  rows = _packed_rows(stream, streams, data, sources, tokenizer, model, mixture, sizes, seed)
  return _Resumed(rows, stream, start)


def exceeded_limit(sample: dict, sizes: BufferSizes, max_sample_tokens: int) -> str | None:
  """Name of the first limit that a sample's features exceed, or None."""
  lengths = {buffer: len(sample[name]) for buffer, name in LENGTH_FEATURES.items()}
  if lengths["und"] + lengths["gen"] > max_sample_tokens:
    return "max_sample_tokens"
  return next((b for b, length in lengths.items() if length > getattr(sizes, b)), None)


def _packed_rows(stream, streams, data, sources, tokenizer, model, mixture, sizes, seed):
  modes = []
  for mode in mixture:
    records = grain.MapDataset.source(sources[mode])[stream::streams]
    key = (seed, stream, MODES.index(mode))
    example = _Example(tokenizer, model, data, key, len(records))
    samples = records.shuffle(seed=_number(key)).repeat().map_with_index(example)
    # Without Grain's threads: they would hold hundreds of decoded images for each mode.
    samples = samples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    modes.append(_SkipOversized(samples, mode, sizes, data.max_sample_tokens, len(records)))
  mixed = grain.IterDataset.mix(modes, list(mixture.values()))
  names = [name for name in sample_features([], model, tokenizer.special) if name != "images"]
  counted = LENGTH_FEATURES.values()  # those whose segment numbers are needed
  return grain.experimental.FirstFitPackIterDataset(
      mixed, length_struct={name: sizes.of_feature(name) for name in names},
      num_packing_bins=data.bins, seed=_number((seed, stream)),
      meta_features=[n for n in names if n not in counted] + ["images", "skipped"])


class _Example:
  """Record -> features, for `map_with_index`; the index counts on through the epochs."""

  def __init__(self, tokenizer, model, data, key, records):
    self._arguments, self._key, self._records = (tokenizer, model, data), key, records

  def __call__(self, i, record):
    # Never from the place of work: draws must not depend on processes or on resuming.
    rng = np.random.default_rng((*self._key, record.index, i // self._records))
    return record_features(record, *self._arguments, rng)


class _SkipOversized(grain.IterDataset):
  """Leaves out the samples that no row can hold; the next sample says which, as `skipped`."""

  def __init__(self, parent, mode, sizes, max_sample_tokens, records):
    super().__init__(parent)
    self._arguments = mode, sizes, max_sample_tokens, records

  def __iter__(self):
    return _SkipOversizedIterator(iter(self._parent), *self._arguments)


class _SkipOversizedIterator(grain.DatasetIterator):

  def __init__(self, parent, mode, sizes, max_sample_tokens, records):
    super().__init__(parent)
    self._mode, self._sizes, self._records = mode, sizes, records
    self._max_sample_tokens = max_sample_tokens

  def __next__(self):
    skipped = []
    while len(skipped) < self._records:
      sample = next(self._parent)
      limit = exceeded_limit(sample, self._sizes, self._max_sample_tokens)
      if limit is None:
        return sample | {"skipped": skipped}
      skipped.append((self._mode, limit))
    limits = dict(collections.Counter(limit for _, limit in skipped))
    raise ValueError(f"mode {self._mode}: not one of {self._records} samples fits a row; limits "
                     f"that they exceed: {limits}; enlarge the buffers or make images smaller")

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    self._parent.set_state(state)


class _Resumed(grain.IterDataset):
  """A stream that starts where it was left; each row comes with the state behind it.

  The state travels with the row, so it does not matter how many rows a worker process or a
  mixture of streams has taken in advance.
  """

  def __init__(self, parent, stream, start):
    super().__init__(parent)
    self._stream, self._start = stream, start

  def __iter__(self):
    rows = iter(self._parent)
    if self._start is not None:
      rows.set_state(json.loads(self._start))
    return _ResumedIterator(rows, self._stream)


class _ResumedIterator(grain.DatasetIterator):

  def __init__(self, parent, stream):
    super().__init__(parent)
    self._stream = stream

  def __next__(self):
    row = next(self._parent)
    return {"stream": self._stream, "row": row, "state": json.dumps(self._parent.get_state())}

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    self._parent.set_state(state)


def _number(key):
  """A seed for what takes a single number."""
  return int(np.random.SeedSequence(key).generate_state(1)[0])
