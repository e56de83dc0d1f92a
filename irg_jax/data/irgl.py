"""The `tensorflow-datasets` builder `irgl`: published parquet to ArrayRecord, a config a mode.

  builder = Irgl(config="initial_full_learning", data_dir="data", file_format="array_record")
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir="IRG-Toy-Dataset"))
  source = builder.as_data_source("train")

`build` does that for several modes at once and leaves nothing behind where it fails.
"""

import contextlib
import io
import os
import pathlib

import tensorflow_datasets as tfds

from irg_jax.data import array_records, published
from irg_jax.data.records import MODES
from irg_jax.storage import scratch_folder

SHARD_BYTES = 512 * 2**20


class Irgl(tfds.core.GeneratorBasedBuilder):
  """IRGL. Needs no TensorFlow.

  Args (beside those of every builder):
    max_rejected: the share of a mode's rows that may be unusable.
    shard_bytes: size of a file.
    workers, progress: see `published.read_good`.
  """

  VERSION = tfds.core.Version(array_records.VERSION)
  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name=mode, description=f"The rows of {mode}.") for mode in MODES]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
      "manual_dir is the published dataset: a folder a mode with parquet files of one column "
      "'conversation'.")
  # Nothing is downloaded. Looking for checksums would need a package that the library's own
  # requirements leave out.
  url_infos = {}

  def __init__(self, *, max_rejected: float = 0.01, shard_bytes: int = SHARD_BYTES,
               workers: int | None = None, progress=None, **kwargs):
    self._max_rejected, self._shard_bytes = max_rejected, shard_bytes
    self._workers, self._progress = workers, progress
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=array_records.features(), disable_shuffling=True,
        description="Interleaved thoughts and images: learning to plan, draw, and improve.",
        metadata=tfds.core.MetadataDict())

  def _split_generators(self, dl_manager):
    return {array_records.SPLIT: self._generate_examples(dl_manager.manual_dir)}

  def _generate_examples(self, path):
    """(index, example) of the usable rows in order; what was rejected goes to the metadata."""
    mode = self.builder_config.name
    files = published.mode_files(path, mode)
    tally = published.Tally(mode, published.count_rows(files), self._max_rejected)
    good = 0
    for _, record in published.read_good(files, tally, workers=self._workers,
                                         progress=self._progress):
      good += 1
      yield record.index, array_records.to_example(record)
    if not good:
      raise ValueError(f"{path}: none of the {tally.total} rows of mode {mode} can be used")
    self.info.metadata.update(tally.metadata)

  def _generate_splits(self, dl_manager, download_config):
    # The library's own writer sorts: with keys in order it would hold the whole mode in memory.
    splits = []
    for name, examples in self._split_generators(dl_manager).items():
      lengths, size = array_records.write_shards(
          self.data_path, (example for _, example in examples), self._shard_bytes)
      splits.append(tfds.core.SplitInfo(
          name=name, shard_lengths=lengths, num_bytes=size,
          filename_template=self._get_filename_template(name)))
    return splits


def write_info(path, mode: str, shard_lengths: list[int], num_bytes: int, metadata: dict) -> None:
  """Writes the descriptions that make a folder of `array_records.shard_path` files a dataset.

  Args:
    path: the folder above `irgl`; the files are in `array_records.mode_folder(path, mode)`.
    shard_lengths, num_bytes: records of each file, and bytes of all (see `write_shard`).
    metadata: that of the dataset which the records come from (`source.metadata`).
  """
  builder = Irgl(config=mode, data_dir=path, file_format="array_record")
  name = array_records.SPLIT
  split = tfds.core.SplitInfo(
      name=name, shard_lengths=shard_lengths, num_bytes=num_bytes,
      filename_template=builder._get_filename_template(split_name=name))
  builder.info.set_splits(tfds.core.splits.SplitDict([split]))
  builder.info.metadata.update(metadata)
  builder.info.write_to_directory(array_records.mode_folder(path, mode))


def build(source, out, modes=MODES, *, max_rejected: float = 0.01, workers: int | None = None,
          shard_bytes: int = SHARD_BYTES, progress=None) -> dict[str, dict]:
  """Builds modes of the published dataset at `source` as `out/irgl/MODE`, all or none.

  Returns:
    By mode: {"rows": all rows, "rejected": {reason: rows}, "offenders": [(file, row, reason,
    detail)] of the first of them}.

  Raises:
    ValueError: a mode has no files, is there already, or has too many unusable rows.
  """
  out = pathlib.Path(out)
  for mode in modes:
    published.mode_files(source, mode)
    if array_records.mode_folder(out, mode).parent.exists():
      raise ValueError(f"{array_records.mode_folder(out, mode).parent} exists already; remove it, "
                       "or choose another folder")
  with scratch_folder(out) as aside:
    reports = {mode: _build_mode(source, aside, mode, max_rejected=max_rejected, workers=workers,
                                 shard_bytes=shard_bytes, progress=progress) for mode in modes}
    (out / array_records.NAME).mkdir(exist_ok=True)
    for mode in modes:
      folder = array_records.mode_folder(aside, mode).parent
      folder.rename(array_records.mode_folder(out, mode).parent)
  return reports


def _build_mode(source, out, mode, **options):
  builder = Irgl(config=mode, data_dir=os.fspath(out), file_format="array_record", **options)
  config = tfds.download.DownloadConfig(manual_dir=os.fspath(source), try_download_gcs=False)
  with contextlib.redirect_stdout(io.StringIO()):  # the library announces itself there
    builder.download_and_prepare(download_config=config)
  return dict(builder.info.metadata)
