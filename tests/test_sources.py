"""Parquet and ArrayRecord: the same records in both forms, atomic builds, damaged files."""

import collections
import dataclasses
import importlib.util
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import irgl_rows
import numpy as np
import pytest
import tensorflow_datasets as tfds
from irgl_rows import BAD, MODE, write_mode

from irg_jax.data import parquet, sources
from irg_jax.data.records import MODES, ImagePart, Record, TextPart

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOOD = 8


@pytest.fixture
def folder(tmp_path):
  """Two files of one mode, the bad rows of every kind between the good ones."""
  bad = [row for row, _, _ in BAD.values()]
  good = [irgl_rows.good(i) for i in range(GOOD)]
  root = tmp_path / "published"
  write_mode(root, bad[:5] + good[:3] + bad[5:9] + good[3:4], name="part-0.parquet")
  write_mode(root, good[4:6] + bad[9:] + good[6:], name="part-1.parquet")
  return root


def good_indices():
  bad = len(BAD)
  return [5, 6, 7, 12, 13, 14, bad + 6, bad + 7]


@pytest.fixture
def clean(tmp_path):
  root = tmp_path / "clean"
  write_mode(root, [irgl_rows.good(i) for i in range(GOOD)])
  return root


def test_exactly_the_bad_rows_go_and_each_is_counted(folder):
  source = sources.open_source(folder, MODE, max_rejected=0.9)
  assert [r.index for r in source] == good_indices()
  assert [r.parts[0].text for r in source] == [f"prompt {i}" for i in range(GOOD)]
  reasons = collections.Counter(reason for _, reason, _ in BAD.values())
  assert source.metadata["rejected"] == reasons
  assert source.metadata["rows"] == len(BAD) + GOOD


def test_built_and_published_records_are_the_same(folder, tmp_path):
  reports = sources.build(folder, tmp_path / "out", [MODE], max_rejected=0.9,
                                shard_bytes=4000)
  plain = sources.open_source(folder, MODE, max_rejected=0.9)
  built = sources.open_source(tmp_path / "out", MODE)
  assert list(built) == list(plain)
  assert len(list((tmp_path / "out" / "irgl" / MODE).rglob("*array_record*"))) > 2
  for metadata in (built.metadata, plain.metadata):
    assert metadata["rejected"] == reports[MODE]["rejected"]
    assert [list(o) for o in metadata["offenders"]] == [list(o) for o in reports[MODE]["offenders"]]


def test_random_access_agrees_with_reading_in_order(clean, tmp_path):
  sources.build(clean, tmp_path / "out", [MODE])
  order = np.random.default_rng(0).permutation(2 * GOOD) - GOOD
  for path in (clean, tmp_path / "out"):
    source = sources.open_source(path, MODE)
    records = list(source)
    assert [source[i] for i in order] == [records[i] for i in order]
    assert pickle.loads(pickle.dumps(source))[3] == records[3]
    with pytest.raises(IndexError):
      source[GOOD]


def test_threads_may_share_a_source(clean):
  source = sources.open_source(clean, MODE)
  want, wrong = list(source), []

  def read(seed):
    for i in np.random.default_rng(seed).permutation(GOOD):
      if source[i] != want[i]:
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_a_mode_that_loses_too_much_stops_the_build_and_leaves_nothing(folder, tmp_path):
  other = "initial_full_learning"
  write_mode(folder, [irgl_rows.good(0)], mode=other)
  out = tmp_path / "new" / "out"
  with pytest.raises(ValueError) as e:
    sources.build(folder, out, [other, MODE])
  message = str(e.value)
  assert MODE in message and "max_rejected" in message
  assert "part-0.parquet row 0: bad_json: the row is None, not a text" in message
  assert message.count("\n  part-") == parquet.LISTED  # not one: enough to see what is wrong
  assert not out.parent.exists()
  with pytest.raises(ValueError, match="part-0.parquet row 0: bad_json"):
    sources.open_source(folder, MODE)


def test_the_limit_is_a_share_that_may_be_reached(tmp_path):
  write_mode(tmp_path, [irgl_rows.good(i) for i in range(3)] + ["{"])
  assert len(sources.open_source(tmp_path, MODE, max_rejected=0.25)) == 3
  with pytest.raises(ValueError, match="1 of 4 rows cannot be used"):
    sources.open_source(tmp_path, MODE, max_rejected=0.24)
  with pytest.raises(ValueError, match="max_rejected is the share"):
    sources.open_source(tmp_path, MODE, max_rejected=25)


def test_a_hopeless_mode_is_given_up_before_its_end(tmp_path):
  write_mode(tmp_path, ["{"] * 100)
  with pytest.raises(ValueError, match="10 of the first 10 of 100 rows"):
    sources.build(tmp_path, tmp_path / "out", [MODE])


def test_a_mode_without_a_usable_row_is_refused_whatever_the_limit(tmp_path):
  write_mode(tmp_path, ["{"])
  for call in (lambda: sources.open_source(tmp_path, MODE, max_rejected=1.0),
               lambda: sources.build(tmp_path, tmp_path / "out", [MODE], max_rejected=1.0)):
    with pytest.raises(ValueError, match="none of the 1 rows"):
      call()
  assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(clean, tmp_path):
  sources.build(clean, tmp_path / "out", [MODE])
  with pytest.raises(ValueError, match="exists already"):
    sources.build(clean, tmp_path / "out", [MODE])
  assert len(sources.open_source(tmp_path / "out", MODE)) == GOOD


def test_modes_can_be_built_one_after_the_other(clean, tmp_path):
  write_mode(clean, [irgl_rows.good(1)], mode=MODES[2])
  for mode in (MODE, MODES[2]):
    sources.build(clean, tmp_path / "out", [mode])
  found = sources.open_sources(tmp_path / "out", [MODE, MODES[2]])
  assert {mode: len(source) for mode, source in found.items()} == {MODE: GOOD, MODES[2]: 1}
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["irgl"]


def test_the_builder_works_as_any_builder_of_its_library(clean, tmp_path):
  builder = sources.Irgl(config=MODE, data_dir=tmp_path / "tfds", file_format="array_record")
  assert sorted(sources.Irgl.builder_configs) == sorted(MODES)
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=str(clean)))
  example = builder.as_data_source("train")[0]
  assert sources.from_example(example, MODE) == sources.open_source(clean, MODE)[0]
  again = tfds.builder_from_directory(sources.mode_folder(tmp_path / "tfds", MODE))
  assert len(again.as_data_source("train")) == GOOD


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None,
                    reason="TensorFlow is installed here, so its absence cannot be tried")
def test_tensorflow_and_jax_are_not_needed(clean, tmp_path):
  out = str(tmp_path / "out")
  code = (
      "import sys; from irg_jax.data import sources\n"
      f"sources.build({str(clean)!r}, {out!r}, [{MODE!r}])\n"
      f"assert len([r for r in sources.open_source({out!r}, {MODE!r})]) == {GOOD}\n"
      "assert not {'tensorflow', 'jax', 'importlib_resources'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_moments_are_kept_to_the_bit(tmp_path):
  moments = np.random.default_rng(0).standard_normal((2, 3, 4, 16)).astype(np.float16)
  image = ImagePart(irgl_rows.image() + b"\0", True, False, False)  # a NUL at the end stays
  records = [
      Record(MODE, i, (TextPart("x", True), dataclasses.replace(image, moments=m), image))
      for i, m in enumerate([moments, moments.astype(np.float32)])]
  place = sources.mode_folder(tmp_path, MODE)
  place.mkdir(parents=True)
  written = [sources.write_shard(sources.shard_path(place, i, 2), [record])
             for i, record in enumerate(records)]
  metadata = {"rows": 5, "rejected": {"bad_json": 3}, "offenders": []}
  sources.write_info(tmp_path, MODE, [n for n, _ in written], sum(b for _, b in written),
                           metadata)
  source = sources.open_source(tmp_path, MODE)
  assert list(source) == records and source.metadata == metadata
  for got, want in zip(source, records):
    assert got.parts[1].moments.dtype == want.parts[1].moments.dtype
    np.testing.assert_array_equal(got.parts[1].moments, want.parts[1].moments)
    assert got.parts[2].moments is None


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
  def records():
    yield Record(MODE, 0, (TextPart("x", True),))
    raise KeyError("stop")

  with pytest.raises(KeyError):
    sources.write_shard(tmp_path / "shard", records())
  with pytest.raises(ValueError, match="no record"):
    sources.write_shard(tmp_path / "shard", [])
  with pytest.raises(OSError, match="/none/"):
    sources.write_shard(tmp_path / "none" / "shard", records())
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode, message", [
    (MODES[0], f"no mode {MODES[0]}: neither irgl/{MODES[0]}"), ("paint", "unknown mode 'paint'")])
def test_a_mode_that_is_not_there_is_named(clean, mode, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source(clean, mode)


def test_parquet_files_that_cannot_be_read_are_named(tmp_path):
  (tmp_path / MODE).mkdir()
  with pytest.raises(ValueError, match="no parquet files"):
    sources.open_source(tmp_path, MODE)
  path = write_mode(tmp_path, [irgl_rows.good(i) for i in range(20)], group=20)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match="part-0.parquet: not a parquet file"):
    sources.open_source(tmp_path, MODE)
  path.write_bytes(data[:40] + b"\xff" * 200 + data[240:])
  with pytest.raises(ValueError, match="part-0.parquet: damaged parquet"):
    sources.open_source(tmp_path, MODE)
  write_mode(tmp_path, ["x"], column="text")
  with pytest.raises(ValueError, match="no column 'conversation'; its columns: text"):
    sources.open_source(tmp_path, MODE)


def test_a_damaged_dataset_is_named(clean, tmp_path):
  sources.build(clean, tmp_path / "out", [MODE], shard_bytes=4000)
  shards = sorted((tmp_path / "out").rglob("*array_record*"))
  data = shards[0].read_bytes()
  shards[0].write_bytes(data[:200] + bytes(b ^ 255 for b in data[200:300]) + data[300:])
  source = sources.open_source(tmp_path / "out", MODE)
  with pytest.raises(ValueError, match="record 0 cannot be read"):
    source[0]
  assert source[GOOD - 1].parts
  shards[0].unlink()
  with pytest.raises(ValueError, match=f"1 files are missing, the first is {shards[0].name}"):
    sources.open_source(tmp_path / "out", MODE)
  shards[0].parent.joinpath("dataset_info.json").unlink()
  with pytest.raises(ValueError, match="not a dataset of this version"):
    sources.open_source(tmp_path / "out", MODE)


def test_a_fingerprint_is_the_same_in_both_forms_and_differs_for_any_other_rows(tmp_path):
  rows = [irgl_rows.good(i) for i in range(6)]
  print_of = lambda name, rows: sources.fingerprint(sources.open_source(
      write_mode(tmp_path / name, rows).parents[1], MODE, max_rejected=0.5))
  wanted = print_of("a", rows)
  sources.build(tmp_path / "a", tmp_path / "built", (MODE,))
  assert sources.fingerprint(sources.open_source(tmp_path / "built", MODE)) == wanted
  assert print_of("again", rows) == wanted
  other = irgl_rows.good(7)
  flag = irgl_rows.good(2)
  flag[1]["content"][1]["need_vit"] = False
  changed = {"order": rows[::-1], "row": [*rows[:5], other], "fewer": rows[:5],
             "prompt": [*rows[:5], [{**rows[5][0], "content": "prompt 6"}, rows[5][1]]],
             "flag": [*rows[:2], flag, *rows[3:]], "place": ["[{", *rows]}
  prints = {name: print_of(name, value) for name, value in changed.items()}
  assert wanted not in prints.values() and len(set(prints.values())) == len(prints)


def test_a_fingerprint_reads_a_bounded_part_of_a_large_mode():
  class Large:
    read = []

    def __len__(self):
      return 10**7

    def __getitem__(self, i):
      self.read.append(i)
      return Record(MODE, i, (ImagePart(bytes(4 * 2**20), True, False, False),))

  assert sources.fingerprint(Large()) == sources.fingerprint(Large())
  assert len(Large.read) <= 20


def tree(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
  """Raised by a test where a process would end."""


def test_a_build_that_is_killed_at_any_file_leaves_all_or_nothing_and_goes_on(
    clean, tmp_path, monkeypatch):
  write_mode(clean, [irgl_rows.good(i) for i in range(3)], MODES[2])
  modes, whole = (MODES[2], MODE), tmp_path / "whole"
  sources.build(clean, whole, modes, shard_bytes=4000)
  count, left = 0, [0]

  def counted(function):
    def call(*arguments, **options):
      left[0] -= 1
      if left[0] < 0:
        raise Killed
      return function(*arguments, **options)
    return call

  while count < 60:
    out = tmp_path / f"killed{count}"
    left[0] = count
    try:
      with monkeypatch.context() as patch:
        for module, name in ((pathlib.Path, "rename"), (os, "replace"), (os, "open")):
          patch.setattr(module, name, counted(getattr(module, name)))
        for module, name in ((shutil, "rmtree"), (pathlib.Path, "unlink"), (pathlib.Path, "rmdir"),
                             (time, "sleep")):
          patch.setattr(module, name, lambda *_, **__: None)  # a killed process cleans nothing up
        sources.build(clean, out, modes, shard_bytes=4000)
    except Killed:
      assert not (out / "irgl").exists(), count
      sources.build(clean, out, modes, shard_bytes=4000)
      assert tree(out) == tree(whole), count
      count += 1
    else:
      break  # it came to its end
  assert 4 < count < 60


@pytest.mark.long
def test_kill_9_and_build_again_gives_what_a_build_gives_that_was_not_stopped(tmp_path):
  """Records, not bytes, are compared: protobuf orders the fields of an example in any way."""
  data, rng = tmp_path / "data", np.random.default_rng()
  write_mode(data, [irgl_rows.good(i) for i in range(300)])
  command = [sys.executable, "-m", "irg_jax", "data", "build", str(data), "--mode", MODE, "--out"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  start = time.monotonic()
  subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True, env=environment)
  took, killed = time.monotonic() - start, 0
  content = lambda out: ({name: len(data) for name, data in tree(out / "irgl").items()},
                         list(sources.open_source(out, MODE)))
  for number in range(40):
    out = tmp_path / f"out{number}"
    process = subprocess.Popen([*command, out], cwd=ROOT, env=environment)
    try:
      process.wait(rng.uniform(0.2, 1) * took)
      took *= 0.8  # the machine is less busy now
    except subprocess.TimeoutExpired:
      process.kill()
      killed += process.wait() == -signal.SIGKILL
    if not (out / "irgl").exists():
      subprocess.run([*command, out], cwd=ROOT, check=True, env=environment)
      assert [p.name for p in out.iterdir()] == ["irgl"]  # nothing of the killed one is left
    assert content(out) == content(tmp_path / "whole")
    if killed == 10:
      return
  assert False, f"only {killed} kills came in time"
