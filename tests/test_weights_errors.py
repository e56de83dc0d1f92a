"""Unusable checkpoints: messages name file and key, and nothing is written."""

import gc
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from test_weights import CONFIG
from irg_jax import config as config_lib
from irg_jax import weights
from irg_jax.weights import CheckpointError, init, names, orbax, published
from irg_jax.weights import safetensors as tensor_files

Q1 = "language_model.model.layers.1.self_attn.q_proj.weight"
TABLE = "latent_pos_embed.pos_embed"


@pytest.fixture(scope="module")
def params():
  return init.random_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def good(tmp_path_factory, params):
  folder = tmp_path_factory.mktemp("good")
  published.save(folder, params, CONFIG)
  published.save(folder / "sharded", params, CONFIG, max_shard_bytes=60_000)
  orbax.save(folder / "orbax", params, CONFIG)
  return folder


@pytest.fixture
def folder(good, tmp_path):
  shutil.copytree(good, tmp_path / "bad", ignore=shutil.ignore_patterns("sharded", "orbax"))
  return tmp_path / "bad"


@pytest.fixture
def sharded(good, tmp_path):
  return shutil.copytree(good / "sharded", tmp_path / "bad")


def refuse(folder, *named):
  """`folder` is refused, every one of `named` is in the message, and no output appears."""
  out = folder.parent / "out"
  with pytest.raises(CheckpointError) as caught:
    weights.convert(folder, out, to="published")
  for text in named:
    assert text in str(caught.value)
  assert not [p for p in folder.parent.iterdir() if "out" in p.name]


def edit(path, change):
  """Applies `change` to the dict of a file's tensors, with the library's own writer."""
  found = safetensors.numpy.load_file(path)
  change(found)
  safetensors.numpy.save_file(found, path)


def edit_json(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def set_number(key, value, where=0):
  return lambda found: found[key].reshape(-1).__setitem__(where, value)


@pytest.mark.parametrize("key, change, named", [
    (Q1, lambda t: t.pop(Q1), "missing: " + Q1),
    (TABLE, lambda t: t.pop(TABLE), "lacks " + TABLE),
    ("extra.weight", lambda t: t.update({"extra.weight": t[Q1]}), "surplus: extra.weight"),
    (Q1, lambda t: t.update({Q1: t[Q1][:, :-1].copy()}), "(32, 31), but (32, 32)"),
    (Q1, lambda t: t.update({Q1: t[Q1].reshape(-1)}), "shape (1024,)"),
    (Q1, lambda t: t.update({Q1: t[Q1].astype(np.int32)}), "dtype I32"),
    (Q1, lambda t: t.update({Q1: t[Q1].astype(ml_dtypes.bfloat16)}), "is bfloat16"),
    ("llm2vae.weight", lambda t: t.update({"llm2vae.weight": t["llm2vae.weight"].astype(float)}),
     "float64"),
    (Q1, set_number(Q1, np.nan), "NaN"),
    ("connector.fc1.bias", set_number("connector.fc1.bias", -np.inf, 3), "NaN or infinite"),
    (TABLE, set_number(TABLE, 0.5, 40), "first at row 1"),
    (TABLE, set_number(TABLE, np.nan, 40), "NaN"),
    (TABLE, lambda t: t.update({TABLE: t[TABLE][:-1].copy()}), "square grid"),
    ("vit_pos_embed.pos_embed",
     lambda t: t.update({"vit_pos_embed.pos_embed": np.zeros((36, 32), np.float32)}), "sin-cos"),
    ("vit_pos_embed.pos_embed",
     lambda t: t.update({"vit_pos_embed.pos_embed": np.zeros((35, 32), np.float32)}), "(36, 32)"),
])
def test_a_wrong_tensor_is_named(key, change, named, folder):
  edit(folder / "ema.safetensors", change)
  refuse(folder, "ema.safetensors", key, named)


def test_rows_and_columns_swapped_in_a_table_are_seen(folder):
  swap = lambda t: t[TABLE].reshape(5, 5, 32).swapaxes(0, 1).reshape(25, 32).copy()
  edit(folder / "ema.safetensors", lambda t: t.update({TABLE: swap(t)}))
  refuse(folder, TABLE, "row 1)")


def test_a_wrong_tensor_of_the_autoencoder_is_named(folder):
  edit(folder / "ae.safetensors", lambda t: t.pop("decoder.conv_in.bias"))
  refuse(folder, "ae.safetensors", "missing: decoder.conv_in.bias")


def test_numbers_too_large_for_the_dtype_asked_for(folder, params, tmp_path):
  edit(folder / "ema.safetensors", set_number(Q1, 1e6))
  with pytest.raises(CheckpointError, match=f"{re.escape(Q1)} has numbers too large for float16"):
    published.load(folder, dtype="float16")
  wide = published.load(folder)
  with pytest.raises(CheckpointError, match=f"{re.escape(Q1)}.*too large for float16"):
    published.save(tmp_path / "out", wide, CONFIG, dtype="float16")
  assert [p.name for p in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:100], lambda data: data + b"\0", lambda data: b"",
    lambda data: b"<!DOCTYPE html>" * 9])
def test_a_damaged_file_is_named(name, damage, folder):
  path = folder / name
  path.write_bytes(damage(path.read_bytes()))
  refuse(folder, name, "not a complete safetensors file")


@pytest.mark.parametrize("name", [
    "ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"])
def test_a_missing_file_is_named(name, folder):
  (folder / name).unlink()
  refuse(folder, name)


def test_a_key_twice_in_one_header_is_named(folder):
  entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
  header = b"{" + entry + b"," + entry + b"}"
  (folder / "ae.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
  refuse(folder, "ae.safetensors", "holds a twice")


def shards_of(folder):
  index = json.loads((folder / "ema.safetensors.index.json").read_text())["weight_map"]
  return index, sorted(set(index.values()))


def test_a_key_in_two_shards_is_named(sharded):
  index, (first, *_, last) = shards_of(sharded)
  key = next(k for k, name in index.items() if name == first)
  tensor = safetensors.numpy.load_file(sharded / first)[key]
  edit(sharded / last, lambda t: t.update({key: tensor}))
  refuse(sharded, last, key, f"is in {first} too")


def test_a_shard_that_lacks_a_key_of_the_index_is_named(sharded):
  index, (first, *_) = shards_of(sharded)
  key = next(k for k, name in index.items() if name == first)
  edit(sharded / first, lambda t: t.pop(key))
  refuse(sharded, first, key)


def test_a_key_that_the_index_does_not_name_is_named(sharded):
  edit(sharded / shards_of(sharded)[1][0], lambda t: t.update(extra=np.zeros(1, np.float32)))
  refuse(sharded, "index.json", "extra")


def test_a_missing_shard_is_named(sharded):
  name = shards_of(sharded)[1][1]
  (sharded / name).unlink()
  refuse(sharded, name, "ema.safetensors.index.json")


@pytest.mark.parametrize("text, named", [
    ("{", "not readable as JSON"), ("{}", "no weight_map"), ("[]", "expected a JSON object"),
    ('{"weight_map": {"a": "../ema.safetensors"}}', "expected a file name"),
    ('{"weight_map": {"a": "x", "a": "y"}}', "holds a twice")])
def test_a_broken_index_is_named(text, named, sharded):
  (sharded / "ema.safetensors.index.json").write_text(text)
  refuse(sharded, "ema.safetensors.index.json", named)


def test_a_file_beside_an_index_is_refused(sharded, good):
  shutil.copy(good / "ema.safetensors", sharded)
  refuse(sharded, "both ema.safetensors and ema.safetensors.index.json")


@pytest.mark.parametrize("name, field, value, named", [
    ("llm_config.json", "num_hidden_layers", 4, "makes 4 layers, the file has 3"),
    ("llm_config.json", "num_hidden_layers", 2, "makes 2 layers, the file has 3"),
    ("llm_config.json", "hidden_size", 64, "follows from"),
    ("llm_config.json", "hidden_size", 30, "multiple of 4"),
    ("llm_config.json", "hidden_size", "32", "whole number"),
    ("llm_config.json", "hidden_size", None, "whole number"),
    ("llm_config.json", "intermediate_size", 40, "mlp.gate_proj"),
    ("llm_config.json", "vocab_size", 300, "embed_tokens"),
    ("llm_config.json", "num_attention_heads", 3, "must divide 32"),
    ("llm_config.json", "num_attention_heads", 32, "even"),
    ("llm_config.json", "num_attention_heads", 2, "k_proj"),
    ("llm_config.json", "num_key_value_heads", 3, "must divide 4"),
    ("llm_config.json", "num_key_value_heads", 4, "k_proj"),
    ("llm_config.json", "num_key_value_heads", True, "whole number"),
    ("llm_config.json", "head_dim", 16, "head_dim"),
    ("llm_config.json", "tie_word_embeddings", True, "only false"),
    ("llm_config.json", "hidden_act", "gelu", "only \"silu\""),
    ("llm_config.json", "rope_scaling", {"type": "yarn"}, "only null"),
    ("llm_config.json", "rope_theta", float("nan"), "a number"),
    ("vit_config.json", "num_hidden_layers", 2, "makes 1 layers, the file has 2"),
    ("vit_config.json", "num_hidden_layers", 1, "at least 2"),
    ("vit_config.json", "image_size", 13, "multiple of patch_size"),
    ("vit_config.json", "image_size", 14, "position_embedding"),
    ("vit_config.json", "num_attention_heads", 5, "must divide 16"),
    ("vit_config.json", "hidden_act", "relu", "gelu_pytorch_tanh"),
    ("ae_config.json", "ch", 64, "follows from"),
    ("ae_config.json", "ch_mult", [1, 2, 2], "downsample"),
    ("ae_config.json", "ch_mult", 2, "a list"),
    ("ae_config.json", "num_res_blocks", 2, "block"),
    ("ae_config.json", "z_channels", 3, "square grid"),
    ("ae_config.json", "out_ch", 4, "only 3"),
])
def test_a_config_that_contradicts_is_named(name, field, value, named, folder):
  edit_json(folder / name, lambda c: c.update({field: value}))
  refuse(folder, name, named)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_named(text, folder):
  (folder / "vit_config.json").write_bytes(text.encode("latin-1"))
  refuse(folder, "vit_config.json", "JSON")


def test_nothing_is_read_before_all_headers_are_checked(folder, monkeypatch):
  edit(folder / "ae.safetensors", lambda t: t.pop("decoder.conv_in.bias"))
  monkeypatch.setattr(tensor_files.Tensor, "read_into", lambda *_: pytest.fail("read a tensor"))
  refuse(folder, "decoder.conv_in.bias")


def test_a_folder_that_is_no_checkpoint_says_what_it_holds(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "notes.txt").write_text("")
  refuse(tmp_path / "in", "llm_config.json", "model_config.json", "found notes.txt")
  refuse(tmp_path / "absent", "no such folder")


def test_a_folder_that_holds_something_is_not_written_to(good, tmp_path, monkeypatch):
  monkeypatch.setattr(weights, "load_checkpoint", lambda *_, **__: pytest.fail("read first"))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("")
  with pytest.raises(FileExistsError, match="not an empty folder"):
    weights.convert(good, tmp_path / "out", to="orbax")
  with pytest.raises(ValueError, match="unknown layout 'torch'"):
    weights.convert(good, tmp_path / "new", to="torch")
  assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_interrupted_write_leaves_nothing(params, tmp_path):
  bad = jax.tree.map(np.array, params)
  bad["vae"]["decoder"]["up_0"]["block_0"]["conv1"]["kernel"][0, 0, 0, 0] = np.nan
  with pytest.raises(CheckpointError, match="vae/decoder/up_0/block_0/conv1/kernel .*NaN"):
    published.save(tmp_path / "out", bad, CONFIG)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [published.save, orbax.save])
def test_parameters_that_do_not_fit_the_config_are_not_saved(save, params, tmp_path):
  leaves = names.flatten(params)
  del leaves["transformer/heads/text/kernel"]
  with pytest.raises(CheckpointError, match="missing: transformer/heads/text/kernel"):
    save(tmp_path / "out", names.unflatten(leaves), CONFIG)
  leaves["transformer/heads/text/kernel"] = np.zeros((32, 1), np.float32)
  with pytest.raises(CheckpointError, match=r"heads/text/kernel has shape \(32, 1\)"):
    save(tmp_path / "out", names.unflatten(leaves), CONFIG)
  assert not list(tmp_path.iterdir())


def test_shardings_of_another_structure_are_refused(good):
  where = {"vae": {"kernel": jax.sharding.SingleDeviceSharding(jax.devices()[0])}}
  with pytest.raises(ValueError, match="shardings do not have the structure"):
    published.load(good, shardings=where)


def test_nan_in_an_orbax_checkpoint_is_named(params, tmp_path):
  leaves = names.flatten(params)
  name = "transformer/connector/fc1/bias"
  leaves[name] = leaves[name].at[0].set(np.nan)
  orbax.save(tmp_path / "a", names.unflatten(leaves), CONFIG)
  refuse(tmp_path / "a", "NaN or infinite", name)


def test_an_orbax_checkpoint_of_another_config_is_refused(good, tmp_path):
  shutil.copytree(good / "orbax", tmp_path / "a")
  edit_json(tmp_path / "a" / orbax.CONFIG, lambda c: c["llm"].update(vocab_size=300))
  refuse(tmp_path / "a", "transformer/embed/embedding", "(300, 32)")
  edit_json(tmp_path / "a" / orbax.CONFIG, lambda c: c["llm"].update(layers=3))
  refuse(tmp_path / "a", orbax.CONFIG, "llm.layers")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_a_damaged_orbax_checkpoint_is_refused(good, tmp_path):
  shutil.copytree(good / "orbax", tmp_path / "a")
  largest = max((tmp_path / "a").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  refuse(tmp_path / "a", "params")
  gc.collect()  # Orbax drops its other reads, and says so here rather than in a later test
  shutil.rmtree(tmp_path / "a" / "params")
  refuse(tmp_path / "a", "params", "not an Orbax checkpoint")


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
  small = config_lib.ModelConfig(llm=config_lib.LlmConfig(vocab_size=259))
  with pytest.raises(CheckpointError, match="vocab_size is 259.* at least 260"):
    init.write_random_checkpoint(tmp_path / "a", small, 0)
