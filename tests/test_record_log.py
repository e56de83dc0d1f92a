"""The append-only file behind the judge's and the detector's caches."""

import json
import threading

import pytest

from irg_jax.evaluate.record_log import RecordLog


def test_records_come_back_and_the_later_of_a_name_counts(tmp_path):
  with RecordLog(tmp_path / "new" / "log.jsonl", "name") as log:
    for i in range(5):
      log.append({"name": f"n{i % 3}", "value": f"é{i}\n"})
    assert log.get("n0") == {"name": "n0", "value": "é3\n"} and log.get("none") is None
  with RecordLog(tmp_path / "new" / "log.jsonl", "name") as log:
    assert len(log) == 3 and log.lost == 0
    assert [log.get(f"n{i}")["value"] for i in range(3)] == ["é3\n", "é4\n", "é2\n"]


def test_a_file_cut_at_any_byte_keeps_every_whole_record_and_goes_on(tmp_path):
  path = tmp_path / "log.jsonl"
  with RecordLog(path, "name") as log:
    for i in range(3):
      log.append({"name": str(i), "value": "x" * i})
  whole = path.read_bytes()
  for cut in range(1, len(whole) + 1):
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    with RecordLog(path, "name") as log:
      assert len(log) == complete and log.lost == (not whole[:cut].endswith(b"\n"))
      log.append({"name": "last"})
    lines = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert lines == [str(i) for i in range(complete)] + ["last"]


def test_a_damaged_line_in_the_middle_costs_that_record_alone(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_bytes(b'{"name": "a"}\n\x00\x00\xff\n{"other": 1}\n{"name": "b"}\n')
  with RecordLog(path, "name") as log:
    assert len(log) == 2 and log.lost == 2 and log.get("b") == {"name": "b"}


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"id": 1}\n{"id": 2}\n'])
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path, content):
  path = tmp_path / "notes.txt"
  path.write_text(content)
  with pytest.raises(ValueError, match="notes.txt.*another file"):
    RecordLog(path, "name")
  assert path.read_text() == content


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path):
  path = tmp_path / "log.jsonl"
  with RecordLog(path, "name") as log:
    log.append({"name": "a"})
    with pytest.raises(ValueError, match="another process"):
      RecordLog(path, "name")
  RecordLog(path, "name").close()


def test_threads_write_whole_lines(tmp_path):
  with RecordLog(tmp_path / "log.jsonl", "name") as log:
    def write(t):
      for i in range(50):
        log.append({"name": f"{t}-{i}", "value": "x" * 500})
    threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert all(log.get(f"{t}-{i}") for t in range(4) for i in range(50))
  lines = (tmp_path / "log.jsonl").read_text().splitlines()
  assert len({json.loads(line)["name"] for line in lines}) == len(lines) == 200
