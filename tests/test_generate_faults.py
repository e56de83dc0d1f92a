"""`irg generate` and `irg eval generate` that are killed, started twice, or find the disk full.

All runs on stand-ins for the engine; at the end for real.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import test_eval_generate
import train_runs
from test_cli_run import SHORT, checkpoint

from irg_jax import commands
from irg_jax.generate import generator, irg

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = types.SimpleNamespace(config=types.SimpleNamespace(dtype="float32"))
PROMPTS = {"one": ["a fox"], "several": ["a fox", "two dogs", "rain"]}
EVENTS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.utime"}


def arguments(checkpoint, out, *prompts):
  return ["generate", *prompts, "--checkpoint", str(checkpoint), "--out", str(out), *SHORT,
          "--batch-size", "2"]


def stand_in(model, params, tokenizer, prompts, *, images=None, done=(), on_result=None,
             **options):
  """Tells what it makes, as `irg.generate` does, and checks what it is given as done."""
  whole = test_eval_generate.Engine()(model, params, tokenizer, prompts, **options)
  rounds, told = [list(rows) for rows in zip(*(t.rounds for t in whole))], []
  blank = lambda rows: [dataclasses.replace(row, image=None) for row in rows]
  for number, rows in enumerate(rounds):
    told += [[*rounds[:number], blank(rows)], rounds[:number + 1]]
  plain = lambda rounds: [[(row.thought.text, row.image is not None and row.image.tolist())
                           for row in rows] for rows in rounds]
  known = list(map(plain, told)).index(plain(done)) + 1 if done else 0
  for rounds in told[known:-1] if on_result else ():
    on_result(rounds)
  return whole


@pytest.fixture
def engine(monkeypatch):
  monkeypatch.setattr(irg, "generate", stand_in)
  monkeypatch.setattr(generator, "load_model", lambda *_: (MODEL, None))


def content(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes()
          for p in sorted(folder.rglob("*")) if p.is_file()}


# --- killed


def child(argv, root, nth, count=None) -> int:
  """Runs a command in a fork that is killed before its nth change below `root`.

  The process that forks has imported JAX, but not started it. `count`: file for the number of
  changes of a fork that came to its end.
  """
  pid = os.fork()
  if pid:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  made = [0]

  def hook(event, args):
    if event not in EVENTS or not any(str(root) in str(x) for x in args[:2]):
      return
    if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
      return
    made[0] += 1
    if made[0] == nth:
      os.kill(os.getpid(), signal.SIGKILL)

  irg.generate = stand_in
  generator.load_model = lambda *_: (MODEL, None)
  sys.addaudithook(hook)
  status = commands.main(argv)
  if count:
    count.write_text(str(made[0]))
  os._exit(status)


def sweep(checkpoint, folder, kind, kills):
  """Kills a command at so many of its changes of files, evenly spread, and starts it again."""
  folder = pathlib.Path(folder)
  (folder / "whole").mkdir()
  root, counted = folder / "killed", folder / "count"
  assert child(arguments(checkpoint, folder / "whole" / "out", *PROMPTS[kind]), folder, 0,
               counted) == 0
  want, total = content(folder / "whole"), int(counted.read_text())
  kills = min(kills, total)
  for nth in sorted({1 + i * (total - 1) // (kills - 1) for i in range(kills)}):
    root.mkdir()
    argv = arguments(checkpoint, root / "out", *PROMPTS[kind])
    assert child(argv, root, nth) == -signal.SIGKILL, nth
    check_left(content(root), want)
    assert child(argv, root, 0) == 0
    assert content(root) == want, nth  # and nothing hidden is left
    root.rename(folder / f"done{nth}")
  print(total)


def check_left(left, want):
  """Checks that files of a killed run are those of a whole one, or rounds that begin it."""
  shown = {name for name in left if not any(p.startswith(".") for p in name.split("/"))}
  for name in (name for name in shown if not name.endswith("trace.html")):
    if left[name] == want[name]:
      continue
    assert name.endswith("trace.json"), name
    got, whole = json.loads(left[name]), json.loads(want[name])
    assert got["unfinished"] and len(got["rounds"]) <= len(whole["rounds"])
    for a, b in zip(got["rounds"], whole["rounds"]):
      assert a["think"] == b["think"]
      if a["picture"]:
        assert a["sha256"] == b["sha256"]
        assert name.replace("trace.json", a["picture"]) in shown
  for name in shown:  # a folder of a trace appears with its record
    assert name.endswith("index.html") or f"{name.rpartition('/')[0]}/trace.json" in shown, name


def in_forks(*arguments):
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  code = "import sys, test_generate_faults as t; t.sweep(*sys.argv[1:4], int(sys.argv[4]))"
  done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True,
                        env=os.environ | {"PYTHONPATH": path}, capture_output=True)
  assert done.returncode == 0, done.stderr
  return int(done.stdout.split()[-1])


@pytest.mark.parametrize("kind, kills", [
    ("one", 3), ("several", 3), pytest.param("one", 99, marks=pytest.mark.long),
    pytest.param("several", 99, marks=pytest.mark.long)])
def test_killed_before_while_or_after_it_writes_a_trace_leaves_whole_ones_and_goes_on(
    checkpoint, tmp_path, kind, kills):
  assert in_forks(checkpoint, tmp_path, kind, kills) > 12


@pytest.mark.long
def test_ten_kills_at_any_moment_of_real_runs_end_in_the_images_of_a_run_that_was_not_killed(
    checkpoint, tmp_path):
  start = lambda name: train_runs.process(
      arguments(checkpoint, tmp_path / name / "out", *PROMPTS["several"]), tmp_path / "cache")
  for name in ("compiled", "whole"):
    begun = time.monotonic()
    text, _ = (process := start(name)).communicate()
    assert process.returncode == 0, text
  took, kills, dice = time.monotonic() - begun, 0, random.Random(0)
  shown = lambda tree: {name: data for name, data in tree.items() if not name.endswith(
      ("trace.json", "trace.html"))}  # those have times
  want = content(tmp_path / "whole")
  while kills < 10 or process.returncode:
    process = start("killed")
    if kills < 10:
      time.sleep(took * dice.uniform(0.2, 1))
      process.kill()
    text, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), text
    kills += process.returncode != 0
    if process.returncode == 0:  # it came to its end
      got = content(tmp_path / "killed")
      assert shown(got) == shown(want) and got.keys() == want.keys()
      shutil.rmtree(tmp_path / "killed")


@pytest.mark.parametrize("kind", PROMPTS)
def test_an_interrupt_keeps_what_was_made_says_so_and_the_same_command_goes_on(
    engine, checkpoint, tmp_path, capsys, monkeypatch, kind):
  argv = lambda name: arguments(checkpoint, tmp_path / name / "out", *PROMPTS[kind])
  assert commands.main(argv("whole")) == 0
  want, made = content(tmp_path / "whole"), []

  def interrupted(*args, on_result, **options):
    def told(rounds):
      on_result(rounds)
      made.append(len(rounds))
      if len(made) == 1 or made[-2:] == [1, 2]:
        raise KeyboardInterrupt
    return stand_in(*args, on_result=told, **options)

  monkeypatch.setattr(irg, "generate", interrupted)
  capsys.readouterr()
  for status in (130, 130, 0) if kind == "one" else (130, 130, 130, 0):
    assert commands.main(argv("stopped")) == status
    out, error = tmp_path / "stopped" / "out", capsys.readouterr().err
    if status:
      assert f"what was made is in {out}; the same command with --out {out} goes on" in error
      check_left(content(tmp_path / "stopped"), want)
      assert any("Not finished" in path.read_text() for path in out.rglob("trace.html"))
  assert content(tmp_path / "stopped") == want


def test_a_complete_trace_is_kept_by_the_same_command_and_replaced_by_another(
    engine, checkpoint, tmp_path, capsys, monkeypatch):
  out = tmp_path / "out"
  argv = arguments(checkpoint, out, "a fox")
  assert commands.main(argv) == 0
  want, calls = content(out), []
  monkeypatch.setattr(irg, "generate", lambda *args, **options: (
      calls.append(options["done"]) or stand_in(*args, **options)))
  assert commands.main(argv) == 0 and not calls and content(out) == want
  (out / "round2.png").write_bytes(want["round1.png"])  # not what the record says
  assert commands.main(argv) == 0 and content(out) == want
  assert [[row[0].image is not None for row in done] for done in calls] == [[True, False]]
  record = json.loads(want["trace.json"])
  for broken in ("", "[]", "{}", json.dumps(record | {"rounds": 3}),
                 json.dumps(record | {"rounds": [{}]}), json.dumps(record | {"seed": 1})):
    (out / "trace.json").write_text(broken)
    assert commands.main(argv) == 0 and content(out) == want and calls[-1] == []
  assert commands.main([*argv, "--seed", "1"]) == 0 and calls[-1] == []
  assert content(out)["round1.png"] != want["round1.png"]


# --- started twice


@pytest.mark.parametrize("kind", ["one", "several", "one into an old folder"])
def test_a_second_generate_into_the_same_folder_is_refused_and_writes_nothing(
    engine, checkpoint, tmp_path, capsys, monkeypatch, kind):
  argv = arguments(checkpoint, tmp_path / "out", *PROMPTS[kind.split()[0]])
  if "old" in kind:
    assert commands.main([*argv, "--seed", "5"]) == 0
  tries = []

  def draw(*args, **options):
    before = content(tmp_path)
    tries.append([commands.main(argv[:1] + prompts + argv[1 + len(PROMPTS[kind.split()[0]]):])
                  for prompts in PROMPTS.values()])  # while the first is at work
    assert content(tmp_path) == before
    return stand_in(*args, **options)

  monkeypatch.setattr(irg, "generate", draw)
  assert commands.main(argv) == 0
  assert tries and all(statuses == [2, 2] for statuses in tries)
  error = capsys.readouterr().err
  assert f"--out {tmp_path / 'out'}: another irg generate is at work in it: process " in error
  assert f"process {os.getpid()} on " in error
  assert not [p for p in tmp_path.rglob(".*")]


@pytest.mark.parametrize("kind", PROMPTS)
def test_without_out_commands_of_the_same_second_have_folders_of_their_own(
    engine, checkpoint, tmp_path, capsys, monkeypatch, kind):
  argv = [a for a in arguments(checkpoint, "x", *PROMPTS[kind]) if a not in ("--out", "x")]
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(time, "strftime", lambda *_: "20260101-120000")
  inside = []

  def draw(*args, **options):
    if not inside:  # another one, while this one is at work and nothing is written yet
      inside.append(None)
      assert not content(pathlib.Path("out", "20260101-120000")).keys() - {".lock"}
      assert commands.main(argv) == 0
    return stand_in(*args, **options)

  monkeypatch.setattr(irg, "generate", draw)
  assert commands.main(argv) == 0 and commands.main(argv) == 0
  assert commands.main([*argv, "--steps", "0"]) == 2  # refused: leaves nothing
  names = [f"20260101-120000{end}" for end in ("", "-2", "-3")]
  assert sorted(p.name for p in pathlib.Path("out").iterdir()) == names
  assert len({tuple(content(pathlib.Path("out", name))) for name in names}) == 1
  said = capsys.readouterr().out
  assert all(f"open out/{name}/" in said for name in names)


def eval_arguments(checkpoint, out):
  return ["eval", "generate", "geneval", "--checkpoint", str(checkpoint), "--out", str(out),
          *test_eval_generate.TINY, "--limit", "1"]


def test_a_second_eval_generate_into_the_same_folder_is_refused_and_writes_nothing(
    engine, checkpoint, tmp_path, capsys, monkeypatch):
  argv, drawn = eval_arguments(checkpoint, tmp_path / "out"), []

  def draw(*args, **options):
    before = content(tmp_path)
    drawn.append(commands.main(argv))
    assert content(tmp_path) == before
    return stand_in(*args, **options)

  monkeypatch.setattr(irg, "generate", draw)
  assert commands.main(argv) == 0
  assert drawn and set(drawn) == {2}
  assert f"is at work in it: process {os.getpid()} on " in capsys.readouterr().err
  assert not [p for p in tmp_path.rglob(".*")]


# --- a full disk


@contextlib.contextmanager
def full(size):
  """Files of this process may not be larger: each writer fails as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def said(argv, capsys):
  """The lines of a command that fails, but for those of its progress."""
  assert commands.main(argv) == 2
  lines = capsys.readouterr().err.splitlines()
  assert "error: " in lines[-1] and not any("Traceback" in line for line in lines)
  return lines[-1]


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("size", [0, 1000, 6000])
def test_generate_names_its_folder_and_leaves_nothing_half_written(
    engine, checkpoint, tmp_path, capsys, kind, size):
  argv = arguments(checkpoint, tmp_path / "out", *PROMPTS[kind])
  with full(size):
    line = said(argv, capsys)
  assert str(tmp_path / "out") in line or str(tmp_path / ".out.lock") in line
  assert line.endswith("File too large") and not content(tmp_path)
  assert commands.main(argv) == 0


@pytest.mark.parametrize("size", [0, 1000, 3000])
def test_eval_generate_and_score_name_the_file_and_go_on_when_there_is_space(
    engine, checkpoint, tmp_path, capsys, size):
  out = tmp_path / "out"
  with full(size):
    line = said(eval_arguments(checkpoint, out), capsys)
  assert str(out) in line and line.endswith("File too large")
  assert commands.main(eval_arguments(checkpoint, out)) == 0
  boxes = tmp_path / "boxes.jsonl"
  boxes.write_text("".join(json.dumps(
      {"filename": str(p.relative_to(out)), "detections": {}}) + "\n"
      for p in sorted(out.rglob("*.png"))))
  score = ["eval", "score", "geneval", "--out", str(out), "--detections", str(boxes)]
  before = content(out)
  with full(min(size, 200)):
    line = said(score, capsys)
  assert str(out / "items.jsonl") in line and line.endswith("File too large")
  assert content(out) == before
  assert commands.main(score) == 0
