"""The sqlite3 cache behind the judge, the detector and the scoring function; old caches in it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

from judge_server import cached
import pytest

from irg_jax.evaluate.records import Cache


def write_lines(path, records):
  """A cache as older versions wrote it."""
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def test_records_come_back_and_the_later_of_a_name_counts(tmp_path):
  with Cache(tmp_path / "new" / "cache.sqlite") as cache:
    for i in range(5):
      cache.add({"digest": f"n{i % 3}", "value": f"é{i}\n"})
    assert cache.get("n0") == {"digest": "n0", "value": "é3\n"} and cache.get("none") is None
  with Cache(tmp_path / "new" / "cache.sqlite") as cache:
    assert cache.lost == 0
    assert [cache.get(f"n{i}")["value"] for i in range(3)] == ["é3\n", "é4\n", "é2\n"]
  assert [r["value"] for r in cached(cache.path)] == [f"é{i}\n" for i in range(5)]


def test_killed_at_any_moment_it_keeps_every_record_that_was_added(tmp_path):
  path, root = tmp_path / "cache.sqlite", pathlib.Path(__file__).resolve().parents[1]
  code = ("import itertools, sys\nfrom irg_jax.evaluate.records import Cache\n"
          "cache = Cache(sys.argv[1])\n"
          "new = (i for i in itertools.count() if cache.get(str(i)) is None)\n"
          "for i in new:\n"
          "  cache.add({'digest': str(i), 'value': 'x' * 3000})\n"
          "  print(i, flush=True)\n")
  last = -1
  for enough in (1, 7, 40):
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONPATH": str(root)})
    for _ in range(enough):
      process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    last = int(said[-1]) if said else last + enough
    with Cache(path):
      pass
    kept = [int(record["digest"]) for record in cached(path)]
    assert kept == list(range(len(kept))) and len(kept) - 1 >= last
    last = len(kept) - 1


def test_an_old_cache_cut_at_any_byte_is_imported_with_every_whole_record(tmp_path):
  whole = write_lines(tmp_path / "whole", [{"digest": str(i), "value": "x" * i}
                                           for i in range(3)]).read_bytes()
  for cut in range(1, len(whole) + 1):
    path = tmp_path / f"{cut}.jsonl"
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    with Cache(path) as cache:
      assert cache.lost == (not whole[:cut].endswith(b"\n"))
      cache.add({"digest": "last"})
    assert [r["digest"] for r in cached(cache.path)] == [str(i) for i in range(complete)] + ["last"]
    assert path.read_bytes() == whole[:cut]


@pytest.mark.parametrize("old, given", [
    ("cache.jsonl", "cache.sqlite"), ("cache.jsonl", "cache.jsonl"), ("answers", "answers")])
def test_an_old_cache_at_or_beside_the_path_is_imported_once(tmp_path, old, given):
  lines = [{"digest": "a", "asks": 1}, {"digest": "b"}, {"digest": "a", "asks": 2}]
  write_lines(tmp_path / old, lines)
  for added in (1, 2):
    with Cache(tmp_path / given) as cache:
      assert cache.path.suffix == ".sqlite"
      assert cache.get("a") == {"digest": "a", "asks": 2}
      cache.add({"digest": "b"})
    assert cached(cache.path) == lines + [{"digest": "b"}] * added


def test_a_damaged_line_in_the_middle_of_an_old_cache_costs_that_record_alone(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_bytes(b'{"digest": "a"}\n\x00\x00\xff\n{"other": 1}\n{"digest": "b"}\n')
  with Cache(path) as cache:
    assert cache.lost == 2 and cache.get("b") == {"digest": "b"}
  with Cache(path) as cache:
    assert cache.lost == 0  # told once
  assert cached(cache.path) == [{"digest": "a"}, {"digest": "b"}]


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"id": 1}\n{"id": 2}\n'])
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path, content):
  path = tmp_path / "notes.txt"
  path.write_text(content)
  with pytest.raises(ValueError, match="notes.txt.*another file"):
    Cache(path)
  assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_a_damaged_database_is_refused_and_left_as_it_is(tmp_path):
  path = tmp_path / "cache.sqlite"
  path.write_bytes(content := b"SQLite format 3\0" + b"nonsense" * 99)
  with pytest.raises(ValueError, match="cache.sqlite.*another file"):
    Cache(path)
  assert path.read_bytes() == content


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path):
  path = tmp_path / "cache.sqlite"
  with Cache(path) as cache:
    cache.add({"digest": "a"})
    with pytest.raises(ValueError, match="another process"):
      Cache(path)
  with Cache(path) as cache:
    assert cache.get("a")


def test_threads_add_whole_records(tmp_path):
  with Cache(tmp_path / "cache.sqlite") as cache:
    def write(t):
      for i in range(50):
        cache.add({"digest": f"{t}-{i}", "value": "x" * 500})
    threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert all(cache.get(f"{t}-{i}") for t in range(4) for i in range(50))
  assert len(cached(cache.path)) == 200
