"""Records to packed batches with Grain: read, shuffle, mix, pack; resumable exactly.

The data is divided into streams. Stream s of S reads records s, s + S, ... of every mode, and has
its own shuffle, mixture, random values and packer. A global batch takes the same number of rows
from each stream, in order, and a process owns the streams of its rows. So the content of a batch
depends on S and the seed, but not on the number of processes, worker processes or devices; no
process reads another's records; and any process can continue a stream from its state.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import threading

import grain
import jax
import numpy as np
from absl import flags

from irg_jax.config import ModelConfig
from irg_jax.data.batch import LENGTH_FEATURES, BufferSizes, finish_row, stack_rows
from irg_jax.data.records import MODES
from irg_jax.data.samples import record_features, sample_features

_BUFFERED_ROWS = 2  # of a stream, ahead of the training in a worker process


def open_batches(data, sources, tokenizer, model: ModelConfig, *, mixture: dict, sizes: BufferSizes,
                 seed: int, process_index: int = 0, process_count: int = 1, encode=None):
  """Opens the `Batches` that one process feeds, an endless iterator.

  Args:
    data: `batch.DataSettings`.
    sources: records by mode (`sources.open_sources`).
    mixture: weight of each mode by name, per sample; modes of weight 0 are left out.
    seed: of all random values, >= 0.
    process_index, process_count: which contiguous block of the global batch's rows to yield.
    encode: `latents.Encoder`; needed if records have no moments.

  Raises:
    ValueError: streams, rows and processes that do not divide; a mode without a source, or with
      fewer records than streams; moments of another image transform.
  """
  mixture = {mode: weight for mode, weight in mixture.items() if weight > 0}
  streams = data.streams or data.rows
  _check(data, sources, mixture, streams, process_index, process_count)
  own = streams // process_count
  own = range(process_index * own, (process_index + 1) * own)
  make = lambda stream, start: open_stream(
      stream, streams, data, sources, tokenizer, model, mixture, sizes, seed, start)
  return Batches(make, own, streams, data.rows // streams, data.workers, encode)


class Batches:
  """Iterator of `data.batch.Batch` with this process's rows of each global batch.

  Attributes:
    skipped: {mode: {limit: samples}}: samples of this process's streams left out so far, by the
      limit that they exceed: a buffer of `BufferSizes`, or "max_sample_tokens".
  """

  def __init__(self, make, own, streams, rows, workers, encode):
    self._make, self._own, self._streams, self._rows = make, own, streams, rows
    self._workers, self._encode = workers, encode
    self._groups = None  # [(streams, iterator)], opened for the first batch
    self._starts = dict.fromkeys(own)  # Grain's state as JSON; None: from the beginning
    self.skipped = {}

  def __iter__(self):
    return self

  def __next__(self):
    if self._groups is None:
      parts = np.array_split(self._own, min(self._workers, len(self._own)) or 1)
      groups = [part.tolist() for part in parts]
      self._groups = [(group, iter(self._dataset(group))) for group in groups]
    rows = {stream: [] for stream in self._own}
    for group, iterator in self._groups:
      for _ in range(self._rows):
        for stream in group:  # a mixture of equal weights takes turns
          item = next(iterator)
          if item["stream"] != stream:
            raise RuntimeError(f"row of stream {item['stream']} where one of {stream} was due")
          rows[stream].append(item["row"])
          self._starts[stream] = item["state"]
    rows = [row for stream in self._own for row in rows[stream]]
    for mode, limit in itertools.chain(*(sample for row in rows for sample in row["skipped"])):
      self._add({mode: {limit: 1}})
    batch = stack_rows([
        finish_row(row, {buffer: row[f"{name}_segment_ids"]
                         for buffer, name in LENGTH_FEATURES.items()}) for row in rows])
    images = [(i, *image) for i, row in enumerate(rows) for image in _images(row)]
    if images and self._encode is None:
      raise ValueError("there are images without latents: run irg data encode-latents first, "
                       "or give a checkpoint with a VAE")
    return self._encode(batch, images) if images else batch

  def get_state(self) -> dict[int, dict]:
    """State for `set_state` to continue after the last batch; by stream, JSON types."""
    return {stream: {"streams": self._streams, "position": self._starts[stream],
                     "skipped": copy.deepcopy(self.skipped) if stream == self._own[0] else {}}
            for stream in self._own}

  def set_state(self, state: dict) -> None:
    """Continues where `get_state` was called, on any number of processes.

    `state` may hold other streams too, and their numbers may be texts. Raises ValueError if an
    own stream is missing, or the data was divided into another number of streams.
    """
    state = {int(stream): value for stream, value in state.items()}
    missing = [stream for stream in self._own if stream not in state]
    if missing:
      raise ValueError(f"the saved data state lacks streams {missing}; it has {sorted(state)}")
    counts = {state[stream]["streams"] for stream in self._own}
    if counts != {self._streams}:
      raise ValueError(f"the data state was saved with {sorted(counts)} streams, but there are "
                       f"{self._streams} now: keep data.streams (0: data.rows) as it was")
    self.close()
    self._starts = {stream: state[stream]["position"] for stream in self._own}
    self.skipped = {}
    for stream in self._own:
      self._add(state[stream]["skipped"])

  def close(self) -> None:
    """Ends the worker processes, if any."""
    for _, iterator in self._groups or ():
      iterator.close()
    self._groups = None

  def _dataset(self, streams):
    dataset = grain.IterDataset.mix([self._make(s, self._starts[s]) for s in streams])
    if not self._workers:
      return dataset
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags; irg parses none of them
    # One worker a group: several in one would divide the records among themselves.
    options = grain.MultiprocessingOptions(
        num_workers=1, per_worker_buffer_size=_BUFFERED_ROWS * len(streams))
    return dataset.mp_prefetch(options, worker_init_fn=_start_worker)

  def _add(self, skipped):
    for mode, limits in skipped.items():
      self.skipped.setdefault(mode, collections.Counter()).update(limits)


def open_stream(stream: int, streams: int, data, sources, tokenizer, model: ModelConfig,
                mixture: dict, sizes: BufferSizes, seed: int, start: str | None):
  """Opens stream number `stream` of `streams` as an endless grain.IterDataset.

  Items are {"stream": its number, "row": packed features, "state": JSON text of the state after
  this row}; `start` is the "state" of the last row that was used, None: from the beginning.
  """
  modes = []
  for mode in mixture:
    records = grain.MapDataset.source(sources[mode])[stream::streams]
    key = (seed, stream, MODES.index(mode))
    features = functools.partial(_features, tokenizer, model, data, key, len(records))
    samples = records.shuffle(seed=_number(key)).repeat().map_with_index(features)
    # Without Grain's threads, which would hold hundreds of decoded images a mode.
    samples = samples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    modes.append(_Mapped(samples, functools.partial(
        _next_that_fits, mode, sizes, data.max_sample_tokens, len(records))))
  mixed = grain.IterDataset.mix(modes, list(mixture.values()))
  names = [name for name in sample_features([], model, tokenizer.special) if name != "images"]
  counted = LENGTH_FEATURES.values()  # those whose segment numbers are needed
  rows = grain.experimental.FirstFitPackIterDataset(
      mixed, length_struct={name: sizes.of_feature(name) for name in names},
      num_packing_bins=data.bins, seed=_number((seed, stream)),
      meta_features=[n for n in names if n not in counted] + ["images", "skipped"])
  return _Mapped(rows, functools.partial(_with_state, stream), start)


def exceeded_limit(sample: dict, sizes: BufferSizes, max_sample_tokens: int) -> str | None:
  """Name of the first limit that a sample's features exceed, or None."""
  lengths = {buffer: len(sample[name]) for buffer, name in LENGTH_FEATURES.items()}
  if lengths["und"] + lengths["gen"] > max_sample_tokens:
    return "max_sample_tokens"
  return next((b for b, length in lengths.items() if length > getattr(sizes, b)), None)


def _features(tokenizer, model, data, key, records, i, record):
  """Record -> features; `i` counts on through the epochs of `records` records each."""
  # The key names the sample, so random values do not depend on processes or on resuming.
  rng = np.random.default_rng((*key, record.index, i // records))
  return record_features(record, tokenizer, model, data, rng)


class _Mapped(grain.IterDataset):
  """Dataset of the values of `function(parent's iterator)`; `start` is the state to begin at."""

  def __init__(self, parent, function, start=None):
    super().__init__(parent)
    self._function, self._start = function, start

  def __iter__(self):
    iterator = _MappedIterator(iter(self._parent), self._function)
    if self._start is not None:
      iterator.set_state(json.loads(self._start))
    return iterator


class _MappedIterator(grain.DatasetIterator):
  """Iterator with no state beside its parent's."""

  def __init__(self, parent, function):
    super().__init__(parent)
    self._function = function

  def __next__(self):
    return self._function(self._parent)

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    self._parent.set_state(state)


def _next_that_fits(mode, sizes, max_sample_tokens, records, samples):
  """The next sample that fits a row, with those left out before it as `skipped`."""
  skipped = []
  while len(skipped) < records:
    sample = next(samples)
    limit = exceeded_limit(sample, sizes, max_sample_tokens)
    if limit is None:
      return sample | {"skipped": skipped}
    skipped.append((mode, limit))
  limits = dict(collections.Counter(limit for _, limit in skipped))
  raise ValueError(f"mode {mode}: not one of {records} samples fits a row; limits that they "
                   f"exceed: {limits}; enlarge the buffers or make images smaller")


def _with_state(stream, rows):
  """The next row with the state after it, however many rows are read ahead of the training."""
  row = next(rows)
  return {"stream": stream, "row": row, "state": json.dumps(rows.get_state())}


def _number(key):
  """A seed as a single number."""
  return int(np.random.SeedSequence(key).generate_state(1)[0])


def _images(row):
  """(first token in gen, pixels) of a row's images to encode."""
  lengths = np.bincount(row["gen_place_segment_ids"], minlength=len(row["images"]) + 1)[1:]
  starts = np.cumsum(lengths) - lengths
  return [(int(start) + first, pixels) for start, images in zip(starts, row["images"])
          for first, pixels in images]


def _start_worker(index, count):
  del index, count
  jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the training process
  # The worker ends with its parent: else it would wait for room in its buffer for ever.
  wait = lambda: (multiprocessing.parent_process().join(), os._exit(1))
  threading.Thread(target=wait, daemon=True).start()


def _check(data, sources, mixture, streams, process_index, process_count):
  if data.rows % streams:
    raise ValueError(f"data.rows {data.rows} must be a multiple of data.streams {streams}")
  if streams % process_count:
    raise ValueError(f"{streams} data streams cannot be shared by {process_count} processes: "
                     "set data.streams to a multiple of their number")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} of {process_count} does not exist")
  if not mixture:
    raise ValueError("the mixture has no mode with a weight above 0")
  for mode in mixture:
    if mode not in sources:
      raise ValueError(f"the mixture names mode {mode!r}, but the data has {sorted(sources)}")
    records = len(sources[mode])
    if records < streams:
      raise ValueError(f"mode {mode} has {records} records, fewer than the {streams} data "
                       "streams: lower data.streams, or leave the mode out of the mixture")
    # From `irg data encode-latents`.
    made = getattr(sources[mode], "metadata", {}).get("vae_transform")
    want = dataclasses.asdict(data.vae_transform)
    if made is not None and dict(made) != want:
      raise ValueError(f"mode {mode}: its latents were encoded with vae_transform {dict(made)}, "
                       f"but the configuration has {want}: use the same, or encode them again")
