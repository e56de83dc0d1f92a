"""`irg eval` in a bucket: images, scores and reports of a local run, and answers paid for once."""

import contextlib
import json
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import sys
import time

import bucket_server
import pytest
import test_eval_generate
import test_judging
from bucket_server import broken, bucket
from judge_server import JudgeServer
from test_eval_generate import checkpoint, engine, files, tree

from irg_jax import commands, evaluate, leases, runs, storage, stores
from irg_jax.commands import eval as eval_verb
from irg_jax.evaluate import judge, records, score
from irg_jax.evaluate import generate as runner

pytestmark = [bucket_server.needed, pytest.mark.usefixtures("on_one_device")]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  """The user's folder for caches; nothing but what is stated may be left there."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache"


def at(name):
  return storage.path(f"gs://{bucket_server.BUCKET}/{name}")


def uploaded(path, name):
  """A copy of a file or folder in the bucket."""
  for file in path.rglob("*") if path.is_dir() else [path]:
    if file.is_file():
      place = at(name) / file.relative_to(path).as_posix() if path.is_dir() else at(name)
      place.write_bytes(file.read_bytes())
  return at(name)


def generate(checkpoint, benchmark, out, *argv):
  return commands.main(["eval", "generate", benchmark, "--checkpoint", str(checkpoint), "--out",
                        str(out), *test_eval_generate.TINY[:2], "--size", "64", *map(str, argv)])


def texts(out, *names):
  """Content of files without the name of the folder that they are in, and without times."""
  found = [(out / name).read_text(encoding="utf-8").replace(str(out), "OUT") for name in names]
  return [re.sub(r'"seconds":? [\d.]+', "", text) for text in found]


def nothing_left(bucket, cache_folder):
  assert not [n for n in bucket.names() if ".lock" in n or ".aside" in n or ".probe" in n]
  left = [p for p in cache_folder.rglob("*") if p.is_file() and "programs" not in p.parts]
  assert not left


# --- images, scores, reports


def test_prompts_in_a_bucket_are_those_of_disk(bucket, files):
  for name, path in files.items():
    if path:
      there = uploaded(path, f"prompts/{path.name}")
      assert evaluate.get(name).read(there) == evaluate.get(name).read(path)
  with pytest.raises(ValueError, match="--prompts gs://bucket/nowhere: no such file"):
    evaluate.get("wise").read(at("nowhere"))


def test_a_benchmark_in_a_bucket_ends_in_the_files_of_one_on_disk(
    bucket, checkpoint, engine, tmp_path, cache_folder, capsys):
  weights, places = uploaded(checkpoint, "weights"), (tmp_path / "out", at("out"))
  for place, model in zip(places, (checkpoint, weights)):
    assert generate(model, "mini", place, "--limit", 2, "--batch-size", 3) == 0
    assert commands.main(["eval", "score", "mini", "--out", str(place)]) == 0
    assert commands.main(["eval", "report", str(place), "--to", str(place.parent / "report")]) == 0
  here, there = (runs.read(place / "run.json") for place in places)
  assert here["settings"] == there["settings"]
  for place, record in zip(places, (here, there)):
    scores = json.loads((place / score.SCORES).read_text())
    assert scores["run"] == record
    (place / score.SCORES).write_text(json.dumps(scores | {"run": None}))
  names = (score.SCORES, score.ITEMS)
  assert texts(places[0], *names) == texts(places[1], *names)
  pages = [texts(place.parent / "report", "pages/mini-001.html")[0] for place in places]
  assert pages[0] == pages[1] and 'src="../../out/round1/' in pages[1]
  for place in places:
    for name in names:
      (place / name).unlink()
  assert tree(places[0]) == tree(places[1])
  nothing_left(bucket, cache_folder)


def test_generation_that_was_killed_in_a_bucket_goes_on_and_draws_nothing_twice(
    bucket, checkpoint, engine, tmp_path, monkeypatch):
  assert generate(checkpoint, "oneig", tmp_path / "whole", *oneig_of(tmp_path)) == 0
  stop = KeyboardInterrupt
  write, writes = runner.OutFolder.write, []

  def interrupted(self, *args):
    writes.append(args[0])
    if len(writes) == 10:
      raise stop
    write(self, *args)

  monkeypatch.setattr(runner.OutFolder, "write", interrupted)
  assert generate(checkpoint, "oneig", at("killed"), *oneig_of(tmp_path)) != 0
  monkeypatch.setattr(runner.OutFolder, "write", write)
  (at("killed") / ".aside" / "0-of-1.lock").write_bytes(bucket_server.dead_holder())
  engine.batches.clear()
  assert generate(checkpoint, "oneig", at("killed"), *oneig_of(tmp_path)) == 0
  assert 0 < sum(map(len, engine.batches)) < 12
  assert tree(at("killed")) == tree(tmp_path / "whole")


def oneig_of(folder):
  (folder / "OneIG-Bench.csv").write_text(
      "category,id,prompt_en,type,prompt_length,class\n"
      "Portrait,000,a man,NP,short,\nAnime_Stylization,000,a fox,NP,short,\n"
      "Anime_Stylization,001,rain,NP,short,\n")
  return "--prompts", folder / "OneIG-Bench.csv", "--subset"


def test_another_process_of_the_same_number_is_refused(bucket, checkpoint, engine, capsys):
  with runs.locked(at("busy") / ".aside" / "0-of-1.lock", "busy"):
    assert generate(checkpoint, "mini", at("busy"), "--limit", 1) == 2
  assert "is at work in it" in capsys.readouterr().err and not engine.batches


def test_a_report_elsewhere_has_copies_of_the_images(bucket, checkpoint, engine, tmp_path):
  assert generate(checkpoint, "mini", at("far"), "--limit", 1) == 0
  assert commands.main(["eval", "score", "mini", "--out", str(at("far"))]) == 0
  assert commands.main(["eval", "report", str(at("far")), "--to", str(tmp_path / "report")]) == 0
  pages = tmp_path / "report" / "pages"
  linked = set(re.findall(r'src="(mini/[^"]+)"', (pages / "mini-001.html").read_text()))
  assert len(linked) == 8
  for name in linked:
    assert (pages / name).read_bytes() == (at("far") / name.removeprefix("mini/")).read_bytes()


def test_an_image_that_the_store_does_not_give_ends_scoring_and_is_not_called_missing(
    bucket, checkpoint, engine, capsys):
  assert generate(checkpoint, "mini", at("denied"), "--limit", 1) == 0
  with broken(bucket, lambda _, name: 403 if name.endswith("00002.png") else None):
    assert commands.main(["eval", "score", "mini", "--out", str(at("denied"))]) == 2
  assert "00002.png: access denied by the store" in capsys.readouterr().err
  assert not (at("denied") / score.SCORES).exists()


@pytest.mark.parametrize("verb", [["mini", "report", "--out"],
                                  ["plan", "--topology", "h100:8", "--config"]])
def test_verbs_for_this_machine_alone_say_so(verb, capsys):
  with pytest.raises(SystemExit):
    commands.main([*verb, "gs://bucket/x"])
  assert "a path on this machine is wanted" in capsys.readouterr().err


# --- the judge's answers


@pytest.fixture
def wise(bucket, tmp_path):
  """Folders of images and a prompt file, (on disk, in the bucket)."""
  test_judging.make_wise(tmp_path)
  at("wise").rmtree()
  return ((tmp_path / "images", tmp_path / "wise.json"),
          (uploaded(tmp_path / "images", "wise/images"), uploaded(tmp_path / "wise.json", "wise/p")))


def scored(server, out, prompts, *more):
  return commands.main(["eval", "score", "wise", "--out", str(out), "--prompts", str(prompts),
                        "--judge-url", server.url, "--judge-model", "m", *more])


def answers(path, tmp_path):
  """{digest: text} of a database of answers."""
  (tmp_path / "copy").write_bytes(storage.read_file(path))
  with contextlib.closing(sqlite3.connect(tmp_path / "copy")) as db:
    found = [json.loads(record) for record, in db.execute("SELECT record FROM records")]
  assert len({r["digest"] for r in found}) == len(found)
  return {r["digest"]: r["text"] for r in found}


def test_answers_about_images_in_a_bucket_are_kept_there_and_scores_are_those_of_disk(
    bucket, wise, tmp_path, cache_folder):
  (here, there), count = wise, 23
  with JudgeServer(test_judging.answer) as server:
    assert scored(server, *here) == 0 == scored(server, *there)
    assert len(server.bodies) == 2 * count
    (there[0] / score.SCORES).unlink()
    assert scored(server, *there) == 0 and len(server.bodies) == 2 * count
    elsewhere = ("--judge-cache", str(at("shared/answers.sqlite")))
    assert scored(server, *there, *elsewhere) == 0 == scored(server, *here, *elsewhere)
    assert len(server.bodies) == 3 * count
  names = (score.SCORES, score.ITEMS)
  assert texts(here[0], *names) == texts(there[0], *names)
  kept = [answers(place[0] / judge.CACHE, tmp_path) for place in (here, there)]
  assert kept[0] == kept[1] and len(kept[0]) == count
  nothing_left(bucket, cache_folder)


_KILLED = """
import sys
from irg_jax import commands
from irg_jax import leases
leases._PAUSE = 0.01
commands.main(sys.argv[1:])
"""


def test_a_kill_pays_twice_for_nothing_that_was_copied(bucket, wise, tmp_path, cache_folder):
  (_, (out, prompts)), root = wise, pathlib.Path(__file__).parents[1]
  with JudgeServer(test_judging.answer, seconds=0.05) as server:
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, "eval", "score", "wise", "--out", str(out), "--prompts",
         str(prompts), "--judge-url", server.url, "--judge-model", "m", "--concurrency", "1"],
        env=os.environ | {"PYTHONPATH": str(root)})
    while process.poll() is None and not (
        (out / judge.CACHE).is_file() and len(answers(out / judge.CACHE, tmp_path)) > 3):
      time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, asked = len(answers(out / judge.CACHE, tmp_path)), len(server.bodies)
    assert 3 < kept < 23 and (out / f".{judge.CACHE}.lock").is_file()
    assert scored(server, out, prompts) == 0
    assert len(server.bodies) - asked == 23 - kept
  assert len(answers(out / judge.CACHE, tmp_path)) == 23
  nothing_left(bucket, cache_folder)


def test_two_processes_cannot_write_one_database(bucket, wise, capsys):
  _, there = wise
  with records.Cache(there[0] / judge.CACHE), JudgeServer(test_judging.answer) as server:
    assert scored(server, *there) == 2
  assert "another process is writing it: process" in capsys.readouterr().err


def test_answers_that_the_store_does_not_take_are_kept_here_and_the_file_is_named(
    bucket, wise, tmp_path, cache_folder, monkeypatch, capsys):
  _, there = wise
  monkeypatch.setattr(stores, "PATIENCE", 0.1)
  monkeypatch.setattr(stores, "_LAST", 0.1)
  with JudgeServer(test_judging.answer) as server, broken(
      bucket, lambda method, name: 503 if method == "POST" and name.endswith(judge.CACHE) else None):
    assert scored(server, *there) == 2
    said = capsys.readouterr().err
    kept = pathlib.Path(re.search(r"newest content is in (\S+\.sqlite)", said)[1])
    assert kept.parent == cache_folder / "irg_jax" / "unsaved"
    paid = len(server.bodies)
    assert "copy that to gs://bucket/wise/images/judge_cache.sqlite" in said
    assert len(answers(kept, tmp_path)) == paid > 0
  with JudgeServer(test_judging.answer) as server:
    (there[0] / judge.CACHE).upload(kept)
    assert scored(server, *there) == 0 and len(server.bodies) == 23 - paid


def test_a_database_of_an_older_version_in_a_bucket_is_imported(bucket, tmp_path):
  (at("old") / "judge_cache.jsonl").write_bytes(b'{"digest": "a", "text": "x"}\n')
  with records.Cache(at("old") / "judge_cache.sqlite") as opened:
    assert opened.get("a")["text"] == "x"
    opened.add({"digest": "b", "text": "y"})
  assert answers(at("old") / "judge_cache.sqlite", tmp_path) == {"a": "x", "b": "y"}


def test_what_comes_while_a_copy_is_made_is_in_the_next_one(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(leases, "_PAUSE", 0.0)
  with records.Cache(at("busy.sqlite")) as opened, broken(bucket, lambda *_: ("slow", 0.05)):
    for number in range(30):
      opened.add({"digest": str(number), "text": "x"})
      time.sleep(0.01)
  assert len(answers(at("busy.sqlite"), tmp_path)) == 30
