"""Checkpoints: round trips in every layout, dtype, split and sharding."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from irg_jax import config as config_lib
from irg_jax import sharding, weights
from irg_jax.weights import init, names, orbax, published
from irg_jax.weights import safetensors as tensor_files
from irg_jax.weights.configs import sincos_table
from irg_jax.tokenizer import load_tokenizer

CONFIG = config_lib.ModelConfig(
    llm=config_lib.LlmConfig(vocab_size=264, hidden_size=32, mlp_size=48, num_layers=3,
                             num_heads=4, num_kv_heads=2),
    vit=config_lib.VitConfig(hidden_size=16, mlp_size=24, num_layers=2, num_heads=2,
                             patch_size=2, grid_size=6),
    vae=config_lib.VaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    max_latent_size=5)
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def params():
  return init.random_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights") / "published"
  init.write_random_checkpoint(folder, CONFIG, seed=0)
  return folder


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor of a published folder, as other tools read them."""
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    found |= safetensors.numpy.load_file(path)
  return found


def assert_same(got, want):
  """Same names, dtypes and bits, for parameter trees or dicts of tensors."""
  got, want = names.flatten(got), names.flatten(want)
  assert got.keys() == want.keys()
  for name in want:
    a, b = np.asarray(got[name]), np.asarray(want[name])
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def test_reference_comes_back_bit_for_bit_with_its_config(reference, tmp_path):
  weights.convert(reference.folder, tmp_path / "orbax", to="orbax")
  weights.convert(tmp_path / "orbax", tmp_path / "published", to="published")
  weights.convert(reference.folder, tmp_path / "direct", to="published")
  assert_same(read_tensors(tmp_path / "published"), read_tensors(reference.folder))
  assert_same(read_tensors(tmp_path / "direct"), read_tensors(reference.folder))
  for name in ("llm_config.json", "vit_config.json"):
    got = json.loads((tmp_path / "direct" / name).read_text())
    assert got | reference.json(name) == got
  config = published.read_config(reference.folder)
  assert config.vit.num_layers == reference.json("vit_config.json")["num_hidden_layers"] - 1
  assert published.read_config(tmp_path / "published") == config
  assert orbax.read_config(tmp_path / "orbax") == config


def test_every_published_key_has_one_row_of_its_shape(reference):
  config = published.read_config(reference.folder)
  want = {k: x.shape for k, x in read_tensors(reference.folder).items() if "pos_embed" not in k}
  got = {key: row.published_shape for row in names.rows(config) for key in row.keys}
  assert got == want
  assert sum(len(row.keys) for row in names.rows(config)) == len(want)


def test_real_sizes_have_the_published_number_of_parameters():
  rows = [r for r in names.rows(config_lib.ModelConfig()) if r.path.startswith("transformer/")]
  count = sum(int(np.prod(r.shape)) for r in rows if "/vit/" not in r.path)
  assert 14.1e9 < count < 14.2e9  # docs/spec.md, section 2


def test_layers_are_stacked_and_kernels_turned(folder):
  stored = read_tensors(folder)
  params = published.load(folder)
  kernel = params["transformer"]["decoder"]["layers"]["gen"]["q"]["kernel"]
  key = "language_model.model.layers.2.self_attn.q_proj_moe_gen.weight"
  np.testing.assert_array_equal(kernel[2], stored[key].T)
  conv = params["vae"]["encoder"]["down_1"]["block_0"]["shortcut"]["kernel"]
  want = stored["encoder.down.1.block.0.nin_shortcut.weight"]
  np.testing.assert_array_equal(conv, np.einsum("oihw->hwio", want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trips_are_bit_exact(dtype, folder, tmp_path):
  weights.convert(folder, tmp_path / "a", to="published", dtype=dtype)
  weights.convert(tmp_path / "a", tmp_path / "b", to="orbax")
  weights.convert(tmp_path / "b", tmp_path / "c", to="published")
  stored = read_tensors(tmp_path / "a")
  assert {x.dtype for x in stored.values()} == {jnp.dtype(dtype)}
  assert_same(read_tensors(tmp_path / "c"), stored)
  for name in ("ema.safetensors", "ae.safetensors", "tokenizer.json", "llm_config.json"):
    assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_mixed_dtypes_are_kept_and_library_files_read(params, tmp_path):
  mixed = params | {"vae": jax.tree.map(lambda x: x.astype("bfloat16"), params["vae"])}
  published.save(tmp_path / "a", mixed, CONFIG)
  for path in (tmp_path / "a").glob("*.safetensors"):
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
  assert_same(published.load(tmp_path / "a"), mixed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_on_load_is_the_cast_of_the_parameters(dtype, folder, params):
  want = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)
  assert_same(published.load(folder, dtype=dtype), want)


def test_sharded_load_equals_single_and_is_sharded(folder, params, mesh):
  config, got = weights.load_checkpoint(
      folder, shardings_fn=lambda p: sharding.parameter_shardings(p, mesh))
  assert config == CONFIG
  assert_same(got, params)
  want = sharding.parameter_shardings(params, mesh)
  assert jax.tree.map(lambda x: x.sharding, got) == want
  kernel = got["transformer"]["decoder"]["layers"]["und"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_sharded_load_asks_for_its_part_only(folder, mesh, monkeypatch):
  read = []
  original = tensor_files.Tensor.read_into

  def spy(self, out, index=None):
    read.append((self.key, out.size))
    original(self, out, index)

  monkeypatch.setattr(tensor_files.Tensor, "read_into", spy)
  shardings = sharding.parameter_shardings(names.abstract_params(CONFIG, "float32"), mesh)
  published.load(folder, shardings=shardings)
  size = {key: int(np.prod(r.layer_shape)) for r in names.rows(CONFIG) for key in r.keys}
  total = {key: sum(n for k, n in read if k == key) for key in size}
  assert total == size  # no number is read twice, though some parameters have copies
  assert ("language_model.model.layers.0.mlp.up_proj.weight", 32 * 48 // 4) in read


def test_pieces_of_a_tensor_are_read_across_chunks(folder, monkeypatch):
  monkeypatch.setattr(tensor_files, "ROWS", 5)
  key = "language_model.lm_head.weight"
  tensor = tensor_files.find_tensors(folder, "ema")[key]
  want = read_tensors(folder)[key]
  for index in (np.s_[0:264, 0:32], np.s_[3:17, 8:9], np.s_[1:2, :4]):
    out = np.empty(want[index].T.shape, np.float32)
    tensor.read_into(out.T, index)
    np.testing.assert_array_equal(out.T, want[index])


@pytest.mark.parametrize("stem", ["ema", "model"])
def test_files_split_by_an_index_are_one_checkpoint(stem, params, tmp_path):
  limit, index = 20_000, "ema.safetensors.index.json"
  published.save(tmp_path / "a", params, CONFIG, max_shard_bytes=limit)
  shards = sorted((tmp_path / "a").glob("ema-*.safetensors"))
  assert len(shards) > 3 and not (tmp_path / "a" / "ema.safetensors").exists()
  for path in shards:
    found = safetensors.numpy.load_file(path)
    assert len(found) == 1 or sum(x.nbytes for x in found.values()) <= limit
  (tmp_path / "a" / index).rename(tmp_path / "a" / index.replace("ema", stem))
  assert_same(published.load(tmp_path / "a"), params)


def test_sharded_parameters_are_saved_as_whole_ones(folder, params, mesh, tmp_path):
  placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
  published.save(tmp_path / "a", placed, CONFIG)
  assert_same(read_tensors(tmp_path / "a"), read_tensors(folder))


def test_orbax_restores_onto_a_mesh_and_casts(params, mesh, tmp_path):
  orbax.save(tmp_path / "a", params, CONFIG)
  config, got = weights.load_checkpoint(
      tmp_path / "a", dtype="bfloat16", compute_dtype="bfloat16",
      shardings_fn=lambda p: sharding.parameter_shardings(p, mesh))
  assert config.dtype == "bfloat16"
  assert_same(got, jax.tree.map(lambda x: x.astype("bfloat16"), params))
  assert jax.tree.map(lambda x: x.sharding, got) == sharding.parameter_shardings(params, mesh)


def test_folders_carry_their_tokenizer_and_further_fields(folder, tmp_path):
  published.save(tmp_path / "b", published.load(folder), CONFIG, source=folder)
  weights.convert(folder, tmp_path / "c", to="orbax")
  for where in (folder, tmp_path / "b", tmp_path / "c"):
    tokenizer = load_tokenizer(where, CONFIG.llm.vocab_size)
    assert tokenizer.decode(tokenizer.encode("déjà vu")) == "déjà vu"
  path = tmp_path / "b" / "llm_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 77}))
  weights.convert(tmp_path / "b", tmp_path / "d", to="published")
  again = json.loads((tmp_path / "d" / "llm_config.json").read_text())
  assert again["max_position_embeddings"] == 77


def test_qk_norm_is_on_whatever_the_config_says(folder, tmp_path):
  weights.convert(folder, tmp_path / "a", to="published")
  path = tmp_path / "a" / "llm_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"qk_norm": False}))
  assert published.read_config(tmp_path / "a") == CONFIG


def test_table_encodes_column_then_row_sine_then_cosine():
  table = sincos_table(8, 3)
  row, column = 2, 1
  want = [f(x * s) for x in (column, row) for f in (np.sin, np.cos) for s in (1, 0.01)]
  np.testing.assert_allclose(table[row * 3 + column], want, rtol=1e-6)
  assert table.shape == (9, 8) and table.dtype == np.float32


def test_random_parameters_depend_on_the_key_alone(params):
  assert_same(init.random_params(CONFIG, jax.random.key(0)), params)
  other = init.random_params(CONFIG, jax.random.key(1))
  kernel = lambda p: np.asarray(p["transformer"]["heads"]["text"]["kernel"])
  assert not np.array_equal(kernel(other), kernel(params))
  abstract = names.abstract_params(CONFIG, jnp.float32)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
      lambda x: (x.shape, x.dtype), abstract)
