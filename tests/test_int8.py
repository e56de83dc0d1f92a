"""int8 weights: arithmetic, files, and what is refused."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_model
from conftest import ROOT, relative_error
from safetensors.numpy import load_file, save_file
from test_weights import CONFIG, assert_same, read_tensors
from test_weights_errors import edit, refuse

import irg_jax
from irg_jax import commands, sharding, weights
from irg_jax.config import LlmConfig
from irg_jax.data.batch import BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.mini import benchmark
from irg_jax.model.layers import SCALE
from irg_jax.weights import CheckpointError, init, int8, lora, names, orbax, peft, published
from irg_jax.weights.lora import LoraSettings

Q0 = "language_model.model.layers.0.self_attn.q_proj.weight"
HEAD = "language_model.lm_head.weight"
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def as_int8(params, **form):
  """Parameters as `load_checkpoint(weights="int8")` makes them."""
  form, leaves = int8.Form("int8", **form), {}
  for path, x in names.flatten(params).items():
    leaves |= form.finish(path, jnp.array(x))
  return names.unflatten(leaves)


def as_float(params):
  """The kernels that int8 ones stand for, float32."""
  leaves = names.flatten(params)
  for path in [path for path in leaves if path.endswith(SCALE)]:
    kernel = path.removesuffix("_scale")
    leaves[kernel] = int8.dequantize(leaves[kernel], leaves.pop(path), "float32")
  return names.unflatten(leaves)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  """A published folder in bfloat16."""
  folder = tmp_path_factory.mktemp("good") / "in"
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init.random_params(CONFIG,
                                                                             jax.random.key(0)))
  published.save(folder, params, CONFIG)
  return folder


@pytest.fixture(scope="module")
def small(good):
  """That folder in int8."""
  weights.convert(good, good.with_name("int8"), to="published", dtype="int8")
  return good.with_name("int8")


@pytest.fixture
def folder(small, tmp_path):
  return shutil.copytree(small, tmp_path / "in")


# --- arithmetic


def test_no_number_moves_by_more_than_half_a_step_and_the_largest_by_none():
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((3, 40, 7)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, (3, 1, 7))
  kernel[1, :, 2] = 0
  whole, scale = map(np.asarray, int8.quantize(jnp.asarray(kernel)))
  assert whole.dtype == np.int8 and scale.shape == (3, 7) and (scale > 0).all()
  apart = np.abs(whole * scale[:, None] - kernel)
  assert (apart <= 0.5001 * scale[:, None]).all()
  assert (np.abs(whole).max(1) == np.where(kernel.any(1), 127, 0)).all()


def test_layers_multiply_by_what_the_integers_stand_for():
  params = as_int8({"transformer": test_model.random_params()})
  batch = test_model.one_row(test_model.samples())
  both = [test_model.outputs(p["transformer"], batch, batch.latents)
          for p in (params, as_float(params))]
  for got, want in zip(*both):
    assert relative_error(got, want) < 1e-5


def test_velocity_and_logits_in_bfloat16_are_near_those_of_wide_float_weights():
  wide = dataclasses.replace(test_model.CONFIG, llm=LlmConfig(
      vocab_size=32, hidden_size=256, mlp_size=768, num_layers=4, num_heads=4, num_kv_heads=2))
  params = init.random_params(wide, jax.random.key(0))
  batch = test_model.one_row(test_model.samples())
  logits, velocity = test_model.outputs(params["transformer"], batch, batch.latents, config=wide)
  got = test_model.outputs(as_int8(params)["transformer"], batch, batch.latents,
                           config=dataclasses.replace(wide, dtype="bfloat16"))
  assert 0 < relative_error(got[0], logits) < 0.01
  assert 0 < relative_error(got[1], velocity) < 0.02


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
  """A published folder in float32 whose sizes fsdp 8 divides."""
  folder = tmp_path_factory.mktemp("even") / "in"
  published.save(folder, init.random_params(test_model.CONFIG, jax.random.key(0)),
                 test_model.CONFIG)
  return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_quantize_and_multiply_as_one_does(mesh, wide_folder):
  mesh = sharding.make_mesh(mesh)
  place = lambda tree: sharding.parameter_shardings(tree, mesh)
  config, one = weights.load_checkpoint(wide_folder, weights="int8")
  _, many = weights.load_checkpoint(wide_folder, weights="int8", shardings_fn=place)
  assert_same(many, one)
  for x, want in zip(jax.tree.leaves(many), jax.tree.leaves(place(many))):
    assert x.sharding.is_equivalent_to(want, x.ndim)
  gate = many["transformer"]["decoder"]["layers"]["und"]["gate"]
  assert not gate["kernel"].sharding.is_fully_replicated
  assert gate[SCALE].sharding.is_fully_replicated == (mesh.shape["tensor"] == 1)
  batch = test_model.one_row(test_model.samples())
  want = test_model.outputs(one["transformer"], batch, batch.latents, config=config)
  with jax.set_mesh(mesh):
    got = test_model.outputs(many["transformer"], batch, batch.latents, config=config)
  for a, b in zip(got, want):
    assert relative_error(a, b) < 1e-5


def test_the_packaged_model_has_nearly_the_same_outputs():
  float_, whole = irg_jax.load(), irg_jax.load(weights="int8")
  assert float_.fingerprint != whole.fingerprint
  assert sum(x.nbytes for x in jax.tree.leaves(whole.params["transformer"])) < 0.4 * sum(
      x.nbytes for x in jax.tree.leaves(float_.params["transformer"]))
  config, rng = float_.model.config, np.random.default_rng(0)
  words = float_.tokenizer
  image = ImageSplit(rng.standard_normal((4, 4, config.latent_dim), np.float32), None,
                     need_loss=True)
  row = sample_features([TextSplit(words.encode("two red circles left of a blue star")), image],
                        config, words.special)
  batch = stack_rows([pack_row([row], BufferSizes(und=40, gen=16, vit=0, text=1, samples=1))])
  (logits, velocity), got = (test_model.outputs(
      g.params["transformer"], batch, batch.latents, config=config) for g in (float_, whole))
  print([relative_error(*pair) for pair in zip(got, (logits, velocity))])
  assert 0 < relative_error(got[0], logits) < 0.01
  assert 0 < relative_error(got[1], velocity) < 0.02


@pytest.mark.long
@pytest.mark.usefixtures("on_one_device")
def test_the_packaged_model_thinks_nearly_always_the_same():
  """Its plans choose among places that are nearly as likely.

  Of all 264 test prompts, 244 thoughts are the same (here 37 of 40); of every second one 125 of 132,
  and with float weights and bfloat16 arithmetic 128.
  """
  items = benchmark.MINI.read()
  prompts = [item.prompt for item in items[::len(items) // 40]][:40]
  thoughts = []
  for form in (None, "int8"):
    drawn = irg_jax.load(weights=form).generate(
        prompts, batch_size=40, rounds=1, steps=2, temperature=0.0)
    thoughts.append([result.thoughts[0] for result in drawn])
  same = np.mean([a == b for a, b in zip(*thoughts)])
  print(f"{same:.1%} of {len(prompts)} thoughts are the same")
  assert len(prompts) == 40 and same >= 0.9


# --- files


def test_files_hold_published_names_with_a_scale_a_row_and_leave_the_rest_as_it_was(good, small):
  before, after = read_tensors(good), read_tensors(small)
  matrices = {key for row in names.rows(CONFIG) if names.may_be_int8(row.path) for key in row.keys}
  assert after.keys() == before.keys() | {f"{key}_scale" for key in matrices}
  for key, x in before.items():
    if key not in matrices:
      assert after[key].dtype == x.dtype and np.array_equal(after[key], x), key
      continue
    whole, scale = after[key], after[f"{key}_scale"]
    assert (whole.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, x.shape[:1])
    np.testing.assert_allclose(scale, np.abs(x.astype(np.float32)).max(1) / 127, rtol=1e-6)
  for name in ("llm_config.json", "vit_config.json"):
    assert (good / name).read_text() == (small / name).read_text()


@pytest.mark.long
def test_each_way_into_int8_has_the_same_integers_and_scales(good, small, tmp_path):
  _, want = weights.load_checkpoint(good, weights="int8")
  weights.convert(small, tmp_path / "again", to="published")
  weights.convert(small, tmp_path / "orbax", to="orbax")
  weights.convert(good, tmp_path / "direct", to="orbax", dtype="int8")
  weights.convert(tmp_path / "orbax", tmp_path / "back", to="published")
  for folder in (small, *(tmp_path / name for name in ("again", "orbax", "direct", "back"))):
    for dtype in (None, "float32"):  # of the others
      got = weights.load_checkpoint(folder, dtype=dtype)[1]
      if dtype is None:
        assert_same(got, want)
      q, w = (tree["transformer"]["decoder"]["layers"]["gen"]["down"] for tree in (got, want))
      assert_same(q, w)
  assert_same(read_tensors(tmp_path / "back"), read_tensors(small))
  weights.convert(good, tmp_path / "float", to="orbax")
  assert_same(weights.load_checkpoint(tmp_path / "float", weights="int8")[1], want)


def test_int8_weights_become_floats_again(small, good, tmp_path):
  weights.convert(small, tmp_path / "orbax", to="orbax")
  for number, source in enumerate((small, tmp_path / "orbax")):
    out = tmp_path / f"out{number}"
    weights.convert(source, out, to="published", dtype="bfloat16")
    found, before = read_tensors(out), read_tensors(small)
    assert found.keys() == read_tensors(good).keys()
    want = (before[Q0].astype(np.float32) * before[f"{Q0}_scale"][:, None])
    assert np.array_equal(found[Q0], want.astype(ml_dtypes.bfloat16))


def test_saving_in_another_dtype_keeps_integers(small, tmp_path):
  config, params = weights.load_checkpoint(small)
  published.save(tmp_path / "out", params, config, dtype="float32")
  found, before = read_tensors(tmp_path / "out"), read_tensors(small)
  assert np.array_equal(found[Q0], before[Q0]) and found[Q0].dtype == np.int8
  assert found[HEAD].dtype == np.float32


@pytest.mark.parametrize("shape", [(), (1,), "rows, 1"])
def test_int8_weights_of_others_are_read_with_scales_of_other_shapes(folder, shape):
  path = folder / "ema.safetensors"
  tensors = load_file(path)
  rows = len(tensors[Q0])
  scale = np.full((rows, 1) if shape == "rows, 1" else shape, 0.25, np.float32)
  save_file(tensors | {f"{Q0}_scale": scale}, path)
  got = published.load(folder)["transformer"]["decoder"]["layers"]["und"]["q"]
  assert np.array_equal(got["kernel"][0], tensors[Q0].T)
  assert np.array_equal(got[SCALE][0], np.full(rows, 0.25))


def test_int8_where_the_model_computes_in_floats_becomes_bfloat16(folder):
  def change(tensors):
    rows = len(tensors[HEAD])
    tensors[HEAD] = np.ones_like(tensors[HEAD], np.int8)
    tensors[f"{HEAD}_scale"] = np.arange(1, rows + 1, dtype=np.float32)
    tensors[Q0] = (tensors[Q0] * tensors.pop(f"{Q0}_scale")[:, None]).astype(ml_dtypes.bfloat16)
  edit(folder / "ema.safetensors", change)
  got = published.load(folder)["transformer"]
  head = got["heads"]["text"]["kernel"]
  assert head.dtype == jnp.bfloat16 and np.array_equal(
      head[0], np.arange(1, head.shape[1] + 1).astype(ml_dtypes.bfloat16))
  q = got["decoder"]["layers"]["und"]["q"]  # one of its layers is bfloat16, so all of them are
  assert q["kernel"].dtype == jnp.bfloat16 and SCALE not in q
  np.testing.assert_array_equal(q["kernel"][0], load_file(folder / "ema.safetensors")[Q0].T)


@pytest.mark.parametrize("change, named", [
    (lambda t: t.pop(f"{Q0}_scale"), [Q0, "int8 and has no scale", f"{Q0}_scale"]),
    (lambda t: t.update({f"{Q0}_scale": np.ones(5, np.float32)}), [f"{Q0}_scale", "shape (5,)"]),
    (lambda t: t.update({f"{Q0}_scale": np.ones((2, 2), np.float32)}),
     [f"{Q0}_scale", "shape (2, 2)"]),
    (lambda t: t[f"{Q0}_scale"].__setitem__(3, 0), [f"{Q0}_scale", "scale of 0.0"]),
    (lambda t: t[f"{Q0}_scale"].__setitem__(3, -1), [f"{Q0}_scale", "scale of -1.0"]),
    (lambda t: t[f"{Q0}_scale"].__setitem__(3, np.nan), [f"{Q0}_scale", "scale of nan"]),
    (lambda t: t[f"{Q0}_scale"].__setitem__(3, np.inf), [f"{Q0}_scale", "scale of inf"]),
    (lambda t: t.update({HEAD: t[HEAD].astype(np.int8)}), [HEAD, "int8 and has no scale"]),
    (lambda t: t.update({f"{HEAD}_scale": np.ones(264, np.float32)}),
     [f"surplus: {HEAD}_scale"]),
    (lambda t: t.update({f"{Q0}_scale_inv": np.ones(32, np.float32)}),
     [f"surplus: {Q0}_scale_inv"]),
    (lambda t: t.update({Q0: t[Q0].astype(np.int16)}), [Q0, "I16", "bfloat16"])])
def test_a_file_that_lacks_scales_or_has_wrong_ones_is_refused_by_key(folder, change, named):
  edit(folder / "ema.safetensors", change)
  refuse(folder, "ema.safetensors", *named)


def edit_leaf(params, path, change):
  leaves = names.flatten(params)
  leaves[path] = change(leaves[path])
  return names.unflatten(leaves)


@pytest.mark.parametrize("name, change, named", [
    ("kernel", lambda x: x.astype(jnp.float32), "surplus: {}_scale"),
    (SCALE, lambda x: x[:, :3], "{}_scale has shape"),
    (SCALE, lambda x: x.at[0, 0].set(-1), "{}_scale has a scale of -1.0")])
def test_an_orbax_folder_with_wrong_scales_is_refused_by_name(small, tmp_path, name, change, named,
                                                              monkeypatch):
  kernel = "transformer/decoder/layers/gen/up/kernel"
  path = kernel.replace("kernel", name)
  params = edit_leaf(published.load(small), path, change)
  with monkeypatch.context() as patch:
    patch.setattr(names, "check_params", lambda params, config: names.flatten(params))
    orbax.save(tmp_path / "bad", params, CONFIG)
  with pytest.raises(CheckpointError, match=named.format(kernel)):
    weights.load_checkpoint(tmp_path / "bad")


def test_parameters_without_scales_or_with_int8_elsewhere_are_not_saved(small, tmp_path):
  params = published.load(small)
  leaves = names.flatten(params)
  leaves.pop("transformer/vit/layers/fc1/kernel_scale")
  with pytest.raises(CheckpointError, match="missing: transformer/vit/layers/fc1/kernel_scale"):
    published.save(tmp_path / "out", names.unflatten(leaves), CONFIG)
  wrong = edit_leaf(params, "transformer/heads/text/kernel", lambda x: x.astype(jnp.int8))
  with pytest.raises(CheckpointError, match="heads/text/kernel is int8"):
    orbax.save(tmp_path / "out", wrong, CONFIG)
  assert not (tmp_path / "out").exists()


def test_another_form_of_weights_is_refused(good):
  with pytest.raises(ValueError, match="weights 'int4': must be int8"):
    weights.load_checkpoint(good, weights="int4")


# --- adapters and training


LORA = LoraSettings(rank=4, alpha=8.0, targets=("gen/q", "heads/velocity"))


@pytest.mark.parametrize("source", ["published", "orbax"])
def test_adapters_are_merged_in_float_and_the_sum_quantized(good, small, tmp_path, source):
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32),
                          lora.abstract_adapters(CONFIG, LORA))
  peft.save(tmp_path / "adapters", adapters, CONFIG, LORA)
  if source == "orbax":
    weights.convert(small, tmp_path / "orbax", to="orbax")
    small = tmp_path / "orbax"
  mine = peft.Source(tmp_path / "adapters")
  _, merged = weights.load_checkpoint(good, adapters=mine)
  for found in (weights.load_checkpoint(good, adapters=mine, weights="int8")[1],
                weights.load_checkpoint(small, adapters=mine)[1]):
    want, got = names.flatten(as_int8(merged)), names.flatten(found)
    assert want.keys() == got.keys()
    apart = np.abs(np.asarray(want["transformer/decoder/layers/gen/q/kernel"], np.int32)
                   - np.asarray(got["transformer/decoder/layers/gen/q/kernel"], np.int32))
    assert apart.max() <= 2
    assert_same({"head": got["transformer/heads/velocity/kernel"]},
                {"head": want["transformer/heads/velocity/kernel"]})
  untouched = "transformer/decoder/layers/und/q/kernel"
  assert np.array_equal(got[untouched], names.flatten(weights.load_checkpoint(small)[1])[untouched])


def test_adapters_beside_int8_weights_add_to_them_once():
  params = as_int8({"transformer": test_model.random_params()})
  settings = LoraSettings(rank=2, alpha=4.0)
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32),
                          lora.abstract_adapters(test_model.CONFIG, settings))
  batch = test_model.one_row(test_model.samples())
  outputs = lambda params: test_model.outputs.__wrapped__(params, batch, batch.latents)
  with lora.applied(settings.scale):
    got = outputs(lora.beside(params["transformer"], adapters))
  merged = {path: lora.merge_one(path, x, adapters, settings.scale)
            for path, x in names.flatten(as_float(params)).items()}
  for a, b in zip(got, outputs(names.unflatten(merged)["transformer"])):
    assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("to", ["published", "orbax"])
def test_training_from_int8_weights_is_refused_before_anything_is_written(tmp_path, capsys, to):
  tiny = ["--config", str(ROOT / "configs" / "irgl.py:tiny"), "--config.random_weights=false"]
  assert commands.main(["init", "--config", str(ROOT / "configs" / "tiny.py"), "--out",
                        str(tmp_path / "tiny")]) == 0
  assert commands.main(["convert", str(tmp_path / "tiny"), str(tmp_path / "int8"), "--to", to,
                        "--dtype", "int8"]) == 0
  out = tmp_path / "out"
  assert commands.main(["train", *tiny, "--checkpoint", str(tmp_path / "int8"), "--out", str(out)])
  message = capsys.readouterr().err
  assert "its weights are int8" in message and "lora.rank" in message
  assert not out.exists()


@pytest.mark.long
@pytest.mark.usefixtures("on_one_device")
def test_adapters_train_beside_int8_weights_which_stay_so(tmp_path):
  run = lambda *words: commands.main([*map(str, words)])
  assert run("init", "--config", ROOT / "configs" / "tiny.py", "--out", tmp_path / "tiny") == 0
  assert run("convert", tmp_path / "tiny", tmp_path / "int8", "--to", "published", "--dtype",
             "int8") == 0
  changes = {"random_weights": "false", "run_stages": "stage2", "stage2.steps": 3,
             "stage2.learning_rate": 0.1, "stage2.warmup_steps": 0, "eval_every": 0,
             "lora.rank": 4, "lora.targets": "('gen',)"}
  assert run("train", "--config", ROOT / "configs" / "irgl.py:tiny", "--checkpoint",
             tmp_path / "int8", "--out", tmp_path / "run",
             *(f"--config.{name}={value}" for name, value in changes.items())) == 0
  before = names.flatten(published.load(tmp_path / "int8"))
  for folder in ("weights", "checkpoints/3"):
    _, after = weights.load_checkpoint(tmp_path / "run" / "stage2" / folder)
    after = names.flatten(after)
    assert after.keys() == before.keys()
    for path, x in after.items():
      adapted = "/layers/gen/" in path and path.endswith(("kernel", SCALE))
      assert x.dtype == before[path].dtype
      assert adapted or np.array_equal(x, before[path]), path
      assert not (adapted and path.endswith("kernel") and np.array_equal(x, before[path])), path


@pytest.mark.parametrize("verb", ["generate", "ask", "serve", "eval generate", "plan", "convert"])
def test_help_names_int8(verb, capsys):
  with pytest.raises(SystemExit):
    commands.main([*verb.split(), "--help"])
  assert "int8" in capsys.readouterr().out
