"""The share of the records that is never trained on, chosen by a hash of a record's number.

The number is that of the record among the usable ones of its mode, so the choice needs no reading,
is the same in either form of the data, on any number of processes, and in every mode: where the
modes tell the same conversations in the same order, no mode trains on what another holds out.
"""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """A source of some of the records of another one (see `sources.open_source`)."""

  source: object
  numbers: np.ndarray  # int64, of its records in `source`

  @property
  def metadata(self):
    return self.source.metadata

  def __len__(self):
    return len(self.numbers)

  def __getitem__(self, i: int):
    return self.source[int(self.numbers[i])]


def is_held_out(number: int, share: float) -> bool:
  """Whether a record is held out; a larger share holds out the same records and more."""
  digest = hashlib.blake2b(str(number).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < share * 2**64


def split(sources: dict, share: float) -> tuple[dict, dict]:
  """(sources to train on, held-out ones) by mode. For a share of 0: `sources` as they are, {}."""
  if not share:
    return sources, {}
  train, held = {}, {}
  for mode, source in sources.items():
    out = np.array([is_held_out(i, share) for i in range(len(source))], bool)
    train[mode], held[mode] = Part(source, np.flatnonzero(~out)), Part(source, np.flatnonzero(out))
  return train, held
