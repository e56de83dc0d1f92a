"""Checkpoints as other programs write them: read as they are meant, or a message says how."""

import json
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from test_weights import CONFIG
from test_weights_errors import edit, edit_json, refuse
from irg_jax import sharding, tokenizer, weights
from irg_jax.generate import settings
from irg_jax.generate.generator import load_model
from irg_jax.weights import init, names, published
from irg_jax.weights import safetensors as tensor_files

FP8 = ml_dtypes.float8_e4m3fn
Q0 = "language_model.model.layers.0.self_attn.q_proj"
ROPE = "language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  folder = tmp_path_factory.mktemp("good") / "in"
  published.save(folder, init.random_params(CONFIG, jax.random.key(0)), CONFIG)
  return folder


@pytest.fixture
def folder(good, tmp_path):
  return shutil.copytree(good, tmp_path / "in")


def rename(folder, change, file="ema"):
  path = folder / f"{file}.safetensors"
  save_file({change(key): x for key, x in load_file(path).items()}, path)


def same(folder, good):
  """Both folders hold the same model, bit for bit."""
  got, want = (names.flatten(published.load(f)) for f in (folder, good))
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert x.dtype == got[name].dtype and np.array_equal(np.asarray(x), np.asarray(got[name])), name


@pytest.mark.parametrize("change", [
    lambda k: "module." + k, lambda k: "_fsdp_wrapped_module." + k, lambda k: "_orig_mod." + k,
    lambda k: "module._orig_mod." + k, lambda k: "model." + k, lambda k: "ema_model.module." + k,
    lambda k: k.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    lambda k: k.replace(".mlp", "._checkpoint_wrapped_module.mlp")])
def test_prefixes_of_wrappers_are_left_out_with_a_note(folder, good, change, capsys):
  rename(folder, change)
  same(folder, good)
  assert "prefixes of" in capsys.readouterr().err


def test_a_prefix_of_the_autoencoder_is_left_out_too(folder, good):
  rename(folder, lambda k: "first_stage_model." + k, "ae")
  same(folder, good)


def test_a_prefix_of_some_keys_alone_is_named_as_surplus(folder):
  rename(folder, lambda k: "x." + k if k.startswith("connector.fc1") else k)
  refuse(folder, "surplus: x.connector.fc1.bias", "missing: connector.fc1.bias")


def test_keys_too_many_are_not_to_be_completed(folder):
  edit(folder / "ema.safetensors", lambda t: t.update({"vit_model.vision_model.head.probe": np.ones(2)}))
  refuse(folder, "missing: none; surplus: vit_model.vision_model.head.probe; leave out what is no")


def test_a_key_with_and_without_a_prefix_is_refused(folder):
  edit(folder / "ema.safetensors", lambda t: t.update({"module.llm2vae.bias": t["llm2vae.bias"]}))
  refuse(folder, "llm2vae.bias is there twice")


@pytest.mark.parametrize("name, read", [
    ("generate.json", settings.read_defaults), ("ae_config.json", published.read_config),
    ("tokenizer.json", lambda f: tokenizer.load_tokenizer(f, 300))])
@pytest.mark.parametrize("make", [lambda p: p.symlink_to("gone"), os.mkfifo, pathlib.Path.mkdir])
def test_a_file_beside_the_weights_that_cannot_be_read_is_no_missing_one(folder, name, read, make):
  (folder / name).unlink(missing_ok=True)
  make(folder / name)
  with pytest.raises(ValueError, match=name):
    read(folder)


@pytest.mark.parametrize("extra", [
    {ROPE.format(i): np.ones(4, np.float32) for i in range(3)},
    {"language_model.model.rotary_emb.inv_freq": np.ones(4, np.float16)},
    {"vit_model.vision_model.embeddings.position_ids": np.arange(9, dtype=np.int64)[None]},
    {"module.vit_model.vision_model.embeddings.position_ids": np.arange(9, dtype=np.int32)},
    {"language_model.model.rotary_emb.cos_cached": np.ones((4, 4), np.float32)}])
def test_buffers_of_older_libraries_are_passed_over_with_a_note(folder, good, extra, capsys):
  edit(folder / "ema.safetensors", lambda t: t.update(extra))
  same(folder, good)
  assert min(extra) in capsys.readouterr().err


@pytest.mark.parametrize("key", ["language_model.model.inv_freq2", "position_ids_of_mine.weight"])
def test_keys_that_only_look_like_buffers_are_surplus(folder, key):
  edit(folder / "ema.safetensors", lambda t: t.update({key: np.ones(4, np.float32)}))
  refuse(folder, f"surplus: {key}")


def test_the_name_model_is_read_where_ema_is_not_there(folder, good, tmp_path):
  (folder / "ema.safetensors").rename(folder / "model.safetensors")
  same(folder, good)
  other = init.random_params(CONFIG, jax.random.key(1))
  published.save(tmp_path / "other", other, CONFIG)
  shutil.copy(tmp_path / "other" / "ema.safetensors", folder)  # both, as training saves them
  got = published.load(folder, part="transformer")["transformer"]["connector"]["fc1"]["kernel"]
  assert np.array_equal(got, other["transformer"]["connector"]["fc1"]["kernel"])


@pytest.mark.parametrize("name", ["ema-FP8.safetensors", "pytorch_model.bin", "consolidated.pt"])
def test_weights_of_another_name_are_named(folder, name):
  (folder / "ema.safetensors").rename(folder / name)
  refuse(folder, "ema.safetensors: no such file", name)


@pytest.mark.parametrize("change, fine", [
    (lambda v: "./" + v, True), (lambda v: "x/" + v, False), (lambda v: "../in/" + v, False),
    (lambda v: "/" + v, False), (lambda v: "", False), (lambda v: "..", False)])
def test_files_of_an_index_stand_beside_it(good, tmp_path, change, fine):
  published.save(tmp_path / "in", published.load(good), CONFIG, max_shard_bytes=60_000)
  index = tmp_path / "in" / "ema.safetensors.index.json"
  edit_json(index, lambda c: c.update(weight_map={k: change(v)
                                                  for k, v in c["weight_map"].items()}))
  if fine:
    same(tmp_path / "in", good)
  else:
    refuse(tmp_path / "in", "index.json")


def test_a_vit_that_is_missing_is_taken_from_the_base(folder, good, tmp_path, capsys):
  vit = ("vit_model.", "connector.", "vit_pos_embed.")
  edit(folder / "ema.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith(vit)])
  refuse(folder, "no ViT", "visual_und", str(folder / "vit.safetensors"))
  (folder / "vit.safetensors").symlink_to(good / "ema.safetensors")
  same(folder, good)
  assert "vit.safetensors" in capsys.readouterr().err
  weights.convert(folder, tmp_path / "out", to="published")
  assert (tmp_path / "out" / "ema.safetensors").read_bytes() == (
      good / "ema.safetensors").read_bytes()
  edit(folder / "ema.safetensors", lambda t: t.update(
      {"connector.fc1.bias": np.zeros(32, np.float32)}))
  shutil.rmtree(tmp_path / "out")
  refuse(folder, "missing: connector.fc1.weight")


def quantized(tensors, dtype=FP8, vectors=False):
  keep = lambda key, x: "pos_embed" in key or (x.ndim < 2 and not vectors)
  return {k: x if keep(k, x) else x.astype(dtype) for k, x in tensors.items()}


@pytest.mark.parametrize("dtype", [FP8, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("vectors", [False, True])
def test_weights_of_8_bits_are_computed_in_bfloat16(folder, dtype, vectors):
  path = folder / "ema.safetensors"
  save_file(quantized(load_file(path), dtype, vectors), path)
  mesh = sharding.generation_mesh(None, CONFIG.llm)
  model, params = load_model(folder, mesh, None, lambda _: None)
  assert model.config.dtype == "bfloat16"
  leaves = names.flatten(params)
  assert leaves["transformer/heads/text/kernel"].dtype == dtype
  assert leaves["transformer/decoder/und_norm/scale"].dtype != dtype  # no arithmetic in 8 bits
  assert load_model(folder, mesh, "float32", lambda _: None)[0].config.dtype == "float32"


def test_other_dtypes_are_computed_in_their_own(folder):
  mesh = sharding.generation_mesh(None, CONFIG.llm)
  for dtype in ("float32", "bfloat16"):
    path = folder / "ema.safetensors"
    save_file({k: x.astype(dtype) for k, x in load_file(path).items()}, path)
    assert load_model(folder, mesh, None, lambda _: None)[0].config.dtype == dtype


@pytest.mark.parametrize("form", ["{}.scale_weight", "{}.weight_scale", "{}.weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), "rows", "rows, 1"])
def test_scales_of_8_bit_weights_are_multiplied_in(folder, form, shape):
  path, rng = folder / "ema.safetensors", np.random.default_rng(0)
  tensors, want = load_file(path), {}
  for key in [k for k in tensors if k.endswith("_proj.weight") or "down_proj_" in k]:
    x = tensors[key]
    rows = {"rows": (len(x),), "rows, 1": (len(x), 1)}.get(shape, shape)
    scale = np.asarray(rng.uniform(0.5, 3, rows), np.float32)
    tensors[key] = x.astype(FP8)
    tensors[form.format(key.removesuffix(".weight"))] = scale
    column = scale.reshape(-1, 1)
    want[key] = (tensors[key].astype(np.float32) * column).astype(ml_dtypes.bfloat16)
  tensors[f"{Q0}.input_scale"] = np.ones((), np.float32)
  tensors["scaled_fp8"] = np.zeros(2, FP8)
  save_file(tensors, path)
  got = published.load(folder)
  for row in names.rows(CONFIG):
    for layer, key in enumerate(row.keys):
      if key in want:
        x = np.asarray(names.flatten(got)[row.path])
        assert x.dtype == ml_dtypes.bfloat16
        assert np.array_equal(row.to_published(x[layer] if row.layers else x), want[key])


def test_scales_of_blocks_are_refused_by_name(folder):
  def change(t):
    t[f"{Q0}.weight"] = t[f"{Q0}.weight"].astype(FP8)
    t[f"{Q0}.weight_scale_inv"] = np.ones((2, 2), np.float32)
  edit(folder / "ema.safetensors", change)
  refuse(folder, f"{Q0}.weight_scale_inv", "shape (2, 2)", "bfloat16")


def test_a_scale_that_overflows_is_named(folder):
  def change(t):
    t[f"{Q0}.weight"] = t[f"{Q0}.weight"].astype(FP8)
    t[f"{Q0}.scale_weight"] = np.float32([np.inf])
  edit(folder / "ema.safetensors", change)
  with pytest.raises(weights.CheckpointError, match=f"{Q0}.weight has"):
    published.load(folder, dtype="bfloat16")


@pytest.mark.parametrize("file, field, value", [
    ("llm_config.json", "num_hidden_layers", 10**6),
    ("llm_config.json", "num_hidden_layers", 10**12),
    ("llm_config.json", "rope_theta", 0), ("llm_config.json", "rope_theta", 1e39),
    ("llm_config.json", "rms_norm_eps", -1e-6), ("llm_config.json", "vocab_size", 10**9),
    ("vit_config.json", "num_hidden_layers", 10**6), ("vit_config.json", "layer_norm_eps", -1.0),
    ("ae_config.json", "num_res_blocks", 10**6), ("ae_config.json", "scale_factor", 0),
    ("ae_config.json", "ch_mult", [1] * 40), ("ae_config.json", "ch_mult", [])])
def test_sizes_without_bounds_are_refused_with_file_and_field(folder, file, field, value):
  edit_json(folder / file, lambda c: c.update({field: value}))
  refuse(folder, file, field)


def test_numbers_too_large_for_any_float_are_refused_with_their_field(folder):
  for text in ("1e999", "-1e999", "1" + "0" * 500):
    content = json.loads((folder / "llm_config.json").read_text())
    data = json.dumps(content | {"rope_theta": "HERE"}).replace('"HERE"', text)
    (folder / "llm_config.json").write_text(data)
    refuse(folder, "llm_config.json", "rope_theta")


def test_a_header_of_very_many_tensors_is_refused_at_once(folder):
  entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
  header = json.dumps({f"language_model.model.layers.{i}.x.weight": entry for i in range(20_000)})
  data = header.encode()
  (folder / "ae.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
  refuse(folder, "ae.safetensors", "surplus")
  with pytest.raises(weights.CheckpointError, match="header would have"):
    (folder / "ae.safetensors").write_bytes((2**22 + 8).to_bytes(8, "little") + b" " * 2**23)
    tensor_files.read_header(folder / "ae.safetensors")
