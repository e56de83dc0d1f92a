"""Locks of run folders: one holder at a time, on any file system, whatever was killed."""

import contextlib
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from irg_jax import holders, runs

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from irg_jax import holders, runs
runs.TOUCHED = 0.05
with runs.locked(sys.argv[1], "busy"):
  print("held", flush=True)
  time.sleep(60)
"""


def start(code, *arguments):
  return subprocess.Popen(
      [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@contextlib.contextmanager
def holder(path):
  """A living process that holds the lock."""
  process = start(HOLD, path)
  assert process.stdout.readline() == "held\n"
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def test_a_living_holder_is_named_and_its_lock_left_alone(tmp_path):
  lock = tmp_path / "a" / ".lock"
  with holder(lock) as process:
    before = lock.read_bytes()
    start = time.monotonic()
    with pytest.raises(runs.Held, match=rf"--out a is busy: process {process.pid} on \S+, since "
                       r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d; wait for it to end, or choose another"):
      with runs.locked(lock, "--out a is busy"):
        pass
    assert time.monotonic() - start < 1
    assert lock.read_bytes() == before and [p.name for p in lock.parent.iterdir()] == [".lock"]


def test_a_lock_is_given_back_with_the_folders_that_were_made_for_it(tmp_path):
  lock = tmp_path / "a" / "b" / ".lock"
  for error in (None, ValueError("x"), KeyboardInterrupt()):
    with contextlib.suppress(ValueError, KeyboardInterrupt):
      with runs.locked(lock, "busy"):
        with pytest.raises(runs.Held):  # not even the same process gets it twice
          with runs.locked(lock, "busy"):
            pass
        if error:
          raise error
    assert not list(tmp_path.iterdir())
  with runs.locked(lock, "busy"):
    (lock.parent / "result").touch()
  assert [p.name for p in lock.parent.iterdir()] == ["result"]


def left_behind(lock, **changed):
  """A lock as a killed process leaves it, with some of its entries changed."""
  with holder(lock) as process:
    content = json.loads(lock.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
  lock.write_text(json.dumps(content | changed))


@pytest.mark.parametrize("changed", [
    {}, {"pid": 1}, {"pid": os.getpid()}, {"pid": os.getppid(), "started": 3}, {"pid": 2**70},
    {"pid": "x"}, {"pid": None, "started": None}])
def test_a_killed_command_does_not_block_the_next_one_though_process_numbers_repeat(
    tmp_path, changed):
  lock = tmp_path / ".lock"
  left_behind(lock, **changed)
  start = time.monotonic()
  with runs.locked(lock, "busy"):
    assert json.loads(lock.read_text())["pid"] == os.getpid()
  assert time.monotonic() - start < 1 and not list(tmp_path.iterdir())


def test_a_child_that_was_killed_and_not_yet_waited_for_holds_nothing(tmp_path):
  lock = tmp_path / ".lock"
  process = start(HOLD, lock)
  process.stdout.readline()
  process.kill()
  while pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
  with runs.locked(lock, "busy"):
    pass
  process.communicate()


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(runs, "TOUCHED", 0.05)
  monkeypatch.setattr(runs, "VOID", 0.5)


def elsewhere(lock, **changed):
  """As if the holder of a lock, which stays alive, were on another machine."""
  content = json.loads(lock.read_text()) | {"machine": "other", "host": "far"} | changed
  beside = lock.with_name("new")
  beside.write_text(json.dumps(content))
  return content, beside


def test_a_holder_on_another_machine_is_known_by_its_signs_of_life(tmp_path, quick, monkeypatch):
  # Here the machine that asks is the other one: the holder goes on as it was.
  lock = tmp_path / ".lock"
  monkeypatch.setattr(holders, "machine", lambda: "elsewhere")
  with holder(lock) as process:
    with pytest.raises(runs.Held, match=rf"process {process.pid} on "):
      with runs.locked(lock, "busy"):
        pass
    process.kill()
    start = time.monotonic()
    with runs.locked(lock, "busy"):
      assert time.monotonic() - start < 2
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, age", [
    *((x, 3600) for x in (b"", b"[]", b"\xff", b'{"key": "../../x"}', b"1" * 9000, b"[" * 99999)),
    (b"{", 0), (b"{", -3600)], ids=range(8))
def test_a_lock_that_says_nothing_is_void_once_nobody_touches_it(tmp_path, quick, content, age):
  lock = tmp_path / ".lock"
  lock.write_bytes(content)
  os.utime(lock, (time.time() - age,) * 2)  # also by a clock that is wrong
  start = time.monotonic()
  with runs.locked(lock, "busy"):
    assert (time.monotonic() - start < 0.4) == (age == 3600)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_it_holds_on_a_file_system_without_hard_links(tmp_path, monkeypatch, number):
  def link(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, "link", link)
  lock = tmp_path / ".lock"
  with holder(lock):
    with pytest.raises(runs.Held):
      with runs.locked(lock, "busy"):
        pass
  with runs.locked(lock, "busy"):  # the holder was killed
    with pytest.raises(runs.Held):
      with runs.locked(lock, "busy"):
        pass
  assert not list(tmp_path.iterdir())


def test_a_process_that_was_taken_for_dead_ends_when_it_wakes(tmp_path):
  lock = tmp_path / ".lock"
  with holder(lock) as process:
    process.send_signal(signal.SIGSTOP)
    content, beside = elsewhere(lock, key="0" * 32, pid=7)
    os.replace(beside, lock)
    process.send_signal(signal.SIGCONT)
    assert process.wait(10) == 2
    assert "taken over by process 7 on far" in process.stderr.read()
  assert json.loads(lock.read_text()) == content


# Holds the lock again and again, and is killed at some of the moments.
RACE = """
import os, random, signal, sys, time
from irg_jax import holders, runs
lock, log, seed, machine = sys.argv[1:]
runs.TOUCHED, runs.VOID = 0.02, 3
if machine != "same":
  holders.machine = lambda: machine
dice, end = random.Random(int(seed)), time.monotonic() + 3
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
say = lambda what: os.write(out, f"{what} {seed}\\n".encode())
real, calls = os.link, [dice.randint(2, 40)]
def link(*args):  # killed while it takes the lock
  real(*args)
  calls[0] -= 1
  if not calls[0]:
    os.kill(os.getpid(), signal.SIGKILL)
os.link = link
while time.monotonic() < end:
  try:
    with runs.locked(lock, "busy"):
      say("in")
      time.sleep(dice.random() / 50)
      if dice.random() < 0.04:
        say("out")  # dead before anybody else can have it
        os.kill(os.getpid(), signal.SIGKILL)
      say("out")
  except runs.Held:
    time.sleep(dice.random() / 100)
"""


@pytest.mark.parametrize("machines", [
    ("same",) * 6,
    pytest.param(("same", "b", "same", "c", "same", "b"), marks=pytest.mark.long)])
def test_of_many_processes_that_are_killed_now_and_then_one_at_a_time_holds_it(
    tmp_path, quick, machines):
  lock, log = tmp_path / "x" / ".lock", tmp_path / "log"
  processes = [start(RACE, lock, log, i, machine) for i, machine in enumerate(machines)]
  for process in processes:
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), said
  lines = [line.split() for line in log.read_text().splitlines()]
  assert len(lines) > 10 and len({who for _, who in lines}) > 2
  for (a, who), (b, other) in zip(lines[::2], lines[1::2]):
    assert (a, b, who) == ("in", "out", other)
  with runs.locked(lock, "busy"):
    pass
  left = [p.name for p in (tmp_path / "x").iterdir()] if lock.parent.exists() else []
  assert all(re.fullmatch(r"\.[0-9a-f]{8}\.partial|\.lock-.*", name) for name in left)


OWN = """
import pathlib, sys, time
from irg_jax import runs
with runs.own_folder(pathlib.Path(sys.argv[1])) as own:
  print(own.name, flush=True)
  sys.stdin.readline()
  if sys.argv[2] == "make":
    own.mkdir()
"""


def test_a_name_that_no_user_chose_is_given_once_to_processes_of_one_moment(tmp_path):
  processes = [subprocess.Popen(
      [sys.executable, "-c", OWN, tmp_path / "x" / "now", what], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
      for what in ("make", "leave", "make", "kill")]
  names = [process.stdout.readline().strip() for process in processes]
  assert sorted(names) == ["now", "now-2", "now-3", "now-4"]
  processes[3].kill()
  for process in processes:
    process.communicate("\n")
  made = {names[0], names[2]}
  assert {p.name for p in (tmp_path / "x").glob("[!.]*")} == made
  with runs.own_folder(tmp_path / "x" / "now") as own:  # what is left, and what was killed, is free
    assert own.name not in made and own.name in names and not own.exists()
  runs.remove_void(tmp_path / "x")
  assert {p.name for p in (tmp_path / "x").iterdir()} == made


def test_a_refusal_while_a_name_is_held_is_not_taken_for_a_name_that_is_taken(tmp_path):
  with pytest.raises(runs.Held, match="^the body's own"):
    with runs.own_folder(tmp_path / "x" / "now"):
      raise runs.Held("the body's own")
  assert not list(tmp_path.iterdir())


def test_void_locks_beside_a_folder_are_removed_and_those_of_others_stay(tmp_path):
  left_behind(tmp_path / ".a.lock")
  left_behind(tmp_path / ".b.lock", machine="other")
  (tmp_path / ".c.lock").write_text("of another program")
  (tmp_path / ".d.lock").mkdir()
  with holder(tmp_path / ".e.lock"):
    runs.remove_void(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{x}.lock" for x in "bcde"]
