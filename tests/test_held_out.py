"""The held-out share of the data: fixed by number, apart from what is trained on."""

import pickle

import grain
import pytest

from irg_jax.data import held_out

SOURCES = {"a": list(range(1000)), "b": list(range(100, 2000))}


class Source(list):
  metadata = {"rows": 3}


def test_without_a_share_the_sources_are_used_as_they_are():
  train, held = held_out.split(SOURCES, 0.0)
  assert train is SOURCES and held == {}


def test_every_record_is_in_one_part_and_the_share_is_about_right():
  train, held = held_out.split(SOURCES, 0.1)
  for mode, source in SOURCES.items():
    assert sorted([*train[mode], *held[mode]]) == source
    assert len(held[mode]) == pytest.approx(len(source) / 10, rel=0.3)


def test_a_number_is_held_out_in_every_mode_or_in_none_and_stays_when_the_share_grows():
  small, large = (held_out.split(SOURCES, share)[1] for share in (0.1, 0.2))
  numbers = lambda part: set(part.numbers.tolist())
  assert numbers(small["a"]) == {i for i in numbers(small["b"]) if i < 1000}
  assert numbers(small["b"]) < numbers(large["b"])
  assert [i for i in range(100) if held_out.is_held_out(i, 0.1)] == HELD


# Fixed for all time: a run that goes on with another version trains on none of what was held out.
HELD = [18, 29, 47, 55, 66, 71, 72, 90, 99]


def test_a_part_has_the_metadata_of_its_source_and_goes_to_other_processes():
  train, _ = held_out.split({"a": Source("abcdefghij")}, 0.3)
  part = pickle.loads(pickle.dumps(train["a"]))
  assert part.metadata == {"rows": 3} and list(part) == list(train["a"])
  assert list(grain.MapDataset.source(part)) == list(part)
