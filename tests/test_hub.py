"""Checkpoints and datasets by name: the hub's own client against a stand-in server on loopback."""

import argparse
import json
import pathlib
import shutil

import bucket_server
import hub_server
import jax
import pytest
import yaml
from bucket_server import bucket
from conftest import ROOT
from huggingface_hub import constants

import irg_jax
from irg_jax import commands, hub, storage, weights
from irg_jax.data import sources
from irg_jax.generate import generator
from irg_jax.storage import SHIPPED
from irg_jax.weights import card

TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
SHARDS = ["ema.safetensors.index.json", "ema-00001-of-00002.safetensors",
          "ema-00002-of-00002.safetensors"]
NEEDED = ["ae.safetensors", "ae_config.json", "ema.safetensors", "generate.json", "llm_config.json",
          "tokenizer.json", "vit_config.json"]


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A hub with the model of the package and a few rows of data; caches go to `tmp_path`."""
  root = tmp_path / "hub"
  shutil.copytree(SHIPPED, root / "models/owner/tiny")
  (root / "models/owner/tiny/notes.pdf").write_bytes(b"x")
  (root / "models/owner/words").mkdir()
  (root / "models/owner/words/README.md").write_text("words")
  with hub_server.serving(root) as served:
    for name, value in (("ENDPOINT", served.url), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", served.url + TEMPLATE),
                        ("HF_HUB_DOWNLOAD_TIMEOUT", 5), ("HF_HUB_ETAG_TIMEOUT", 5)):
      monkeypatch.setattr(constants, name, value)
    monkeypatch.chdir(tmp_path)
    yield served


def fetched(server):
  """Names of the files whose content was asked for."""
  return sorted(a.rpartition("/")[2] for a in server.asked if a.startswith("GET") and "resolve" in a)


def test_only_the_files_of_the_checkpoint_are_fetched_and_only_once(server, capsys):
  for name in ("owner/tiny", "owner/tiny@v1", f"owner/tiny@{hub_server.SHA}"):
    folder = hub.fetch(name, weights.needed)
    assert sorted(p.name for p in folder.iterdir()) == NEEDED
  assert fetched(server) == NEEDED
  assert "revision 0123456789ab: 7 of 10 files" in capsys.readouterr().err


def test_a_checkpoint_on_the_hub_is_loaded_by_its_name(server, monkeypatch):
  monkeypatch.setattr(generator, "load_model", lambda folder, *_: (None, folder))
  there, here = irg_jax.load("owner/tiny"), irg_jax.load()
  assert (there.fingerprint, there.defaults) == (here.fingerprint, here.defaults)
  assert sorted(p.name for p in there.params.iterdir()) == NEEDED


def test_without_the_hub_its_cache_serves_and_what_is_not_there_is_named(
    server, monkeypatch, capsys):
  folder = hub.fetch("owner/tiny", weights.needed)
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
  assert hub.fetch("owner/tiny", weights.needed) == folder
  assert "the hub cannot be reached" in capsys.readouterr().err
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  before = len(server.asked)
  assert hub.fetch("owner/tiny", weights.needed) == folder
  with pytest.raises(ValueError, match="owner/words: no such folder here, and it is not in the "
                                       "cache of the hub"):
    hub.fetch("owner/words", weights.needed)
  assert len(server.asked) == before


@pytest.mark.parametrize("name, message", [
    ("owner/none", "no such repository on the hub, or a private one"),
    ("owner/tiny@nope", "has no such revision"),
    ("owner/gated", "is gated: ask for access"),
    ("owner/words", "holds no checkpoint that irg reads")])
def test_what_cannot_be_fetched_is_one_line_with_the_flag_and_the_mend(
    server, capsys, name, message):
  assert commands.main(["generate", "a fox", "--checkpoint", name, "--out", "out"]) == 2
  error, = [s for s in capsys.readouterr().err.splitlines() if "error:" in s]
  assert "--checkpoint " + name in error and message in error
  assert not pathlib.Path("out").exists()


@pytest.mark.parametrize("faults", [["503"], ["cut", "cut"], ["503", "cut", "503"]])
def test_a_server_that_stumbles_never_gives_a_torn_file(server, faults):
  server.faults[:] = faults
  for _ in range(3):
    try:
      folder = hub.fetch("owner/tiny", weights.needed)
    except ValueError as e:
      assert "owner/tiny" in str(e)
  for name in NEEDED:
    assert (folder / name).read_bytes() == (SHIPPED / name).read_bytes()


@bucket_server.needed
def test_fetch_writes_into_a_bucket_and_leaves_nothing_here(server, bucket, capsys):
  assert commands.main(["fetch", "owner/tiny", "--to", "gs://bucket/weights"]) == 0
  assert bucket.names() == [f"weights/{name}" for name in NEEDED]
  assert bucket.content("weights/ema.safetensors") == (SHIPPED / "ema.safetensors").read_bytes()
  assert not list(storage.cache_folder("scratch").glob("*"))
  assert commands.main(["fetch", "owner/tiny", "--to", "gs://bucket/weights"]) == 2
  assert "exists and is not an empty folder" in capsys.readouterr().err


def test_fetch_writes_a_folder_and_goes_on(server, capsys):
  assert commands.main(["fetch", "owner/tiny", "--to", "weights"]) == 0
  assert pathlib.Path(capsys.readouterr().out.strip()) == pathlib.Path("weights").absolute()
  names = {p.name for p in pathlib.Path("weights").glob("[!.]*")}
  assert names == set(NEEDED)
  pathlib.Path("weights/llm_config.json").unlink()
  del server.asked[:]
  assert commands.main(["fetch", "owner/tiny", "--to", "weights"]) == 0
  assert "ema.safetensors" not in fetched(server)
  assert pathlib.Path("weights/llm_config.json").is_file()


def test_a_dataset_is_checked_and_built_by_its_name(server):
  assert commands.main(["data", "sample", "--out", "sample"]) == 0
  shutil.copytree("sample", server.root / "datasets/owner/rows")
  (server.root / "datasets/owner/rows/films.mp4").write_bytes(b"x")
  assert commands.main(["data", "check", "owner/rows", "--out", "check.html"]) == 0
  assert commands.main(["data", "build", "owner/rows", "--out", "built",
                        "--max-rejected", "0.2"]) == 0
  assert pathlib.Path("built/irgl").is_dir()
  assert fetched(server) and not any(name.endswith(".mp4") for name in fetched(server))


@pytest.mark.parametrize("argv, name", [
    (["train", "--config", "irgl.py:tiny", "--checkpoint", "owner/tiny"], "owner/tiny"),
    (["train", "--config", "irgl.py:tiny", "--config.checkpoint=owner/tiny@v1"], "owner/tiny@v1"),
    (["train", "--config", "irgl.py:tiny", "--data", "owner/rows"], "owner/rows"),
    (["train", "--config", "irgl.py:tiny", "--config.data.path=owner/rows"], "owner/rows"),
    (["convert", "owner/tiny", "there", "--to", "orbax"], "owner/tiny"),
    (["eval", "generate", "mini", "--checkpoint", "owner/tiny", "--out", "o"], "owner/tiny"),
    (["data", "encode-latents", "owner/rows", "--checkpoint", "owner/tiny", "--out", "o"],
     "owner/rows")])
def test_every_verb_that_reads_weights_or_data_takes_a_name(
    argv, name, monkeypatch, tmp_path, capsys):
  asked = []

  def fetch(text, *_):
    asked.append(text)
    raise ValueError(f"{text}: stopped here")

  monkeypatch.chdir(tmp_path)
  for file in ("irgl.py", "tiny.py"):
    shutil.copy(ROOT / "configs" / file, tmp_path)
  monkeypatch.setattr(hub, "fetch", fetch)
  assert commands.main(argv) == 2
  assert asked == [name] and f"{name}: stopped here" in capsys.readouterr().err


def test_a_folder_goes_first_and_paths_are_no_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert hub.is_name("owner/tiny") and hub.is_name("owner/tiny@refs/pr/1")
  pathlib.Path("owner/tiny").mkdir(parents=True)
  assert not hub.is_name("owner/tiny")
  for text in ("tiny", "/owner/tiny", "./owner/tiny", "../owner", "a/b/c", "owner/tiny/", "", "~/x",
               "owner/ti ny", "owner/tiny@", "gs://owner/tiny"):
    assert not hub.is_name(text), text
  with pytest.raises((argparse.ArgumentTypeError, SystemExit)):
    commands.main(["fetch", "owner/tiny"])


@pytest.mark.parametrize("files, want", [
    ([*NEEDED, "README.md", "optimizer.pt"], NEEDED),
    (["llm_config.json", *SHARDS, "model.safetensors", "vit.safetensors"],
     ["llm_config.json", *SHARDS, "vit.safetensors"]),
    (["llm_config.json", "model.safetensors", "ae.safetensors"],
     ["llm_config.json", "model.safetensors", "ae.safetensors"]),
    (["model_config.json", "params/d/1", ".gitattributes"], ["model_config.json", "params/d/1"]),
    (["config.json", "model.safetensors"], [])])
def test_the_files_of_a_checkpoint_are_known_by_their_names(files, want):
  assert weights.needed(files) == want


def test_the_files_of_a_mode_are_known_by_their_folders():
  mode = sources.MODES[0]
  files = [f"{mode}/a.parquet", f"irgl/{mode}/1.0.0/x.array_record", f"{mode}/.b.parquet", "README.md",
           "other/a.parquet"]
  assert sources.needed(files) == files[:2]


def test_a_converted_checkpoint_gets_a_card_for_the_hub(tmp_path, capsys):
  argv = ["convert", str(SHIPPED), str(tmp_path / "irg-shapes"), "--to", "published", "--card"]
  assert commands.main(argv) == 0
  text = (tmp_path / "irg-shapes/README.md").read_text()
  _, head, body = text.split("---\n", 2)
  assert yaml.safe_load(head)["library_name"] == "irg_jax"
  count = sum(x.size for x in jax.tree.leaves(irg_jax.load().params))
  assert f"| parameters | {count:,} |" in body and "--checkpoint irg-shapes" in body
  assert "Say here what the weights were trained on" in body
  assert commands.main([*argv[:2], str(tmp_path / "orbax"), "--to", "orbax", "--card"]) == 2
  assert "--card: a model card is for --to published" in capsys.readouterr().err
  assert not (tmp_path / "orbax").exists()


def test_the_card_of_a_training_checkpoint_says_how_it_was_trained(tmp_path):
  base = "/cache/models--owner--bagel-7b/snapshots/0123"
  run = tmp_path / "run.json"
  run.write_text(json.dumps({"base": base, "settings": {"seed": 7, "mesh": {}}}))
  (tmp_path / "out").mkdir()
  card.write(tmp_path / "out", weights.read_config(SHIPPED), "bfloat16", run)
  text = (tmp_path / "out/README.md").read_text()
  assert "base_model: owner/bagel-7b" in text and '"seed": 7' in text and "mesh" not in text
