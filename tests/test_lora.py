"""Adapters: what they change and what stays, on every mesh; a run of them; PEFT's files."""

import dataclasses
import filecmp
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import test_step
import train_runs
from conftest import relative_error
from test_step import CONFIG, KEY, batch, one_device
from train_runs import cache, data

from irg_jax import commands, sharding, weights
from irg_jax.generate import generator
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train import checkpoints
from irg_jax.train import run as train_run
from irg_jax.train import settings as settings_lib
from irg_jax.train import step as step_lib
from irg_jax.train.loss import loss_sums, token_losses
from irg_jax.train.settings import Switches
from irg_jax.weights import init, lora, names, peft
from irg_jax.weights.lora import LoraSettings

LORA = LoraSettings(rank=4, alpha=6.0, targets=("und", "gen", "vit", "heads/velocity"))
MODEL = UnifiedTransformer(CONFIG)


@functools.cache
def base():
  return init.random_params(CONFIG, jax.random.key(0))["transformer"]


def random_adapters(settings=LORA, config=CONFIG, size=0.1):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: size * rng.standard_normal(x.shape, np.float32),
                      lora.abstract_adapters(config, settings))


def losses(params):
  """Both losses of a batch, with noise that is always the same."""
  noise = step_lib.sample_noise(batch(), KEY, 1.0)
  sums = loss_sums(*token_losses(MODEL, params, batch(), *noise), batch())
  return sums["ce"] / sums["weight/ce"] + sums["mse"] / sums["weight/mse"]


def losses_beside(adapters, scale):
  with lora.applied(scale):
    return losses(lora.beside(base(), adapters))


def copied(tree):
  return jax.tree.map(jnp.array, tree)


def merge(params, adapters, scale):
  return names.unflatten({path: lora.merge_one(f"transformer/{path}", x, adapters, scale)
                          for path, x in names.flatten(params).items()})


# --- arithmetic


def test_merged_and_unmerged_weights_give_the_same_losses():
  merged = merge(copied(base()), random_adapters(), LORA.scale)
  want, got = jax.jit(losses)(merged), jax.jit(losses_beside)(random_adapters(), LORA.scale)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert abs(got / jax.jit(losses)(base()) - 1) > 1e-3  # they do change something


def test_every_target_and_nothing_else_is_merged():
  merged = names.flatten(merge(copied(base()), random_adapters(), LORA.scale))
  before, parts = names.flatten(base()), names.flatten(random_adapters())
  for path, x in merged.items():
    a, b = (parts.get(path.replace("kernel", name)) for name in (lora.A, lora.B))
    want = before[path] if a is None else before[path] + LORA.scale * (a @ b)
    np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-7, err_msg=path)
  assert len(parts) == 2 * (7 + 7 + 7 + 1)  # both experts; the ViT with its embedding; the head


def test_new_adapters_change_no_bit():
  zero = lora.new_adapters(CONFIG, LORA, 0)
  for dtype in (jnp.float32, jnp.bfloat16):
    params = jax.tree.map(lambda x: x.astype(dtype), base())
    merged = merge(copied(params), zero, LORA.scale)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_full_width_reproduces_the_direction_of_a_full_step():
  """On the embedding of latents alone: a step of gradient descent on A and B, and one on W."""
  settings = LoraSettings(rank=CONFIG.latent_dim, alpha=16.0, targets=("latent_embed",))
  latents = jax.random.normal(KEY, (20, CONFIG.latent_dim))

  def loss(params):
    got = MODEL.apply({"params": params}, latents, jnp.float32(0.5), jnp.int32(3),
                      method="embed_latents")
    return jnp.mean(jnp.square(got - 1) * jnp.arange(20)[:, None])

  def loss_beside(adapters):
    with lora.applied(settings.scale):
      return loss(lora.beside(base(), adapters))

  adapters = lora.new_adapters(CONFIG, settings, 0)
  full = jax.grad(loss)(base())["latent_embed"]["kernel"]
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, adapters, jax.grad(loss_beside)(adapters))
  after = merge(copied(base()), moved, settings.scale)["latent_embed"]["kernel"]
  change = after - base()["latent_embed"]["kernel"]
  assert relative_error(change, -0.1 * settings.scale**2 * full) < 1e-4


# --- the train step


@functools.cache
def settings():
  return dataclasses.replace(test_step.settings(), lora=LORA)


def train(mesh, steps=20, rows=None, adapters=None):
  """(last state, losses, base) of adapters on a mesh."""
  optimizer, rows = test_step.optimizer(), batch() if rows is None else rows
  state = test_step.state_on(mesh, adapters or lora.new_adapters(CONFIG, LORA, 0))
  rows = jax.device_put(rows, step_lib.batch_shardings(rows, mesh))
  params = jax.device_put(base(), sharding.parameter_shardings(base(), mesh))
  step = step_lib.make_train_step(MODEL, optimizer, settings(), mesh, state, rows, params)
  step = step.lower(Switches(), state, rows, KEY, params).compile(
      compiler_options={"xla_backend_optimization_level": 0})
  found = []
  for _ in range(steps):
    state, metrics = step(state, rows, KEY, params)
    found.append(float(metrics["loss"]))
  return state, found, params


@functools.cache
def trained_on_one_device():
  return train(one_device())


def test_only_adapters_have_gradients_moments_and_an_average_and_the_rest_keeps_every_bit():
  state, found, params = trained_on_one_device()
  assert found[-1] < 0.99 * found[0]
  jax.tree.map(np.testing.assert_array_equal, params, base())
  adam = state.opt_state[1][0]
  for tree in (state.params, state.ema, adam.mu, adam.nu):
    assert {path.rsplit("/", 1)[1] for path in names.flatten(tree)} == {lora.A, lora.B}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree))
  start = names.flatten(lora.new_adapters(CONFIG, LORA, 0))
  assert all(not np.array_equal(x, start[path]) for path, x in names.flatten(state.params).items())


@pytest.mark.parametrize("shape", [
    {"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 8}, marks=pytest.mark.long),
    pytest.param({"fsdp": 4, "sequence": 2}, marks=pytest.mark.long),
], ids=lambda shape: "-".join(f"{axis}{n}" for axis, n in shape.items()))
def test_twenty_steps_on_eight_devices_have_the_losses_of_one(shape, capfd):
  state, got, params = train(sharding.make_mesh(shape))
  np.testing.assert_allclose(got, trained_on_one_device()[1], rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, params, base())
  assert "Involuntary full rematerialization" not in capfd.readouterr().err
  kernels, cuts = names.flatten(params), set()
  for path, x in names.flatten(state.params).items():  # each lies like its side of the kernel
    kernel = kernels[path.replace(lora.A, "kernel").replace(lora.B, "kernel")]
    side = -2 if path.endswith(lora.A) else -1
    pieces = [y.shape[side] // y.sharding.shard_shape(y.shape)[side] for y in (x, kernel)]
    assert pieces[0] == pieces[1], path
    cuts.add(pieces[0])
  assert max(cuts) > 1


def test_accumulation_is_one_large_batch_for_adapters_too(monkeypatch):
  monkeypatch.setattr(step_lib, "sample_noise", test_step.fixed_noise)
  (one, want, _), (added, got, params) = (
      train(one_device(), 1, rows, random_adapters()) for rows in (batch(), test_step.split(batch())))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, params, base())
  mean = lambda state: names.flatten(state.opt_state[1][0].mu)  # a tenth of the gradient
  for path, x in mean(one).items():
    assert np.abs(x).max() > 0 and relative_error(mean(added)[path], x) < 1e-4, path


def test_a_run_s_first_adapters_lie_on_its_mesh_in_pieces():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  run = types.SimpleNamespace(settings=dataclasses.replace(settings(), model=CONFIG), mesh=mesh)
  checkpoints_of_none = types.SimpleNamespace(restore=lambda abstract: None)
  step, state, data = train_run.first_state(run, checkpoints_of_none, test_step.optimizer(), None)
  assert (step, data) == (0, None)
  want = lora.new_adapters(CONFIG, LORA, 0)
  jax.tree.map(np.testing.assert_array_equal, state.params, want)
  jax.tree.map(lambda x, place: np.testing.assert_equal(x.sharding, place), state.ema,
               sharding.parameter_shardings(want, mesh))


def test_freezing_an_expert_freezes_its_adapters():
  hit = step_lib.map_frozen(lambda x: "frozen", lora.abstract_adapters(CONFIG, LORA), ("gen",))
  for path, x in names.flatten(hit).items():
    assert (x == "frozen") == path.startswith("decoder/layers/gen/"), path


@pytest.mark.parametrize("fields, message", [
    (["lora.rank=-1"], "'lora.rank' is -1"),
    (["lora.rank=8", "lora.targets=('gne',)"],
     r"'lora.targets' has 'gne', which is part of no matrix's path; known: connector, decoder"),
    (["lora.rank=8", "lora.targets=('latent_embd',)"], r"did you mean latent_embed\?"),
    (["lora.rank=8", "lora.targets=()"], "nothing to train"),
    (["lora.rank=33"], r"'lora.rank' is 33, more than the shorter side of "
                       r"decoder/layers/und/k/kernel \(64, 32\)"),
])
def test_a_rank_or_target_that_cannot_be_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    settings_lib.load(f"{test_step.IRGL}:tiny", ["data.path=unused", *fields])


# --- a run


FIELDS = {"lora__rank": 3, "stage1__steps": 4, "stage2__steps": 2, "random_weights": False}


def run(data, out, checkpoint, **fields) -> int:
  return commands.main(train_runs.flags(data, out, checkpoint=checkpoint, **FIELDS | fields))


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
  """A base checkpoint in bfloat16, while the run computes in float32."""
  folder = tmp_path_factory.mktemp("start")
  read = settings_lib.load(train_runs.flags(data, folder)[2])
  init.write_random_checkpoint(folder / "long", read.model, 0)
  weights.convert(folder / "long", folder / "base", to="published", dtype="bfloat16")
  return folder / "base"


@pytest.fixture(scope="module")
def finished(data, start, cache, on_one_device, tmp_path_factory):
  out = tmp_path_factory.mktemp("lora") / "out"
  assert run(data, out, start) == 0
  return out / "stage1"


@pytest.mark.long
def test_stage_two_goes_on_with_the_average_of_the_adapters_of_stage_one(finished):
  first, second = (safetensors.numpy.load_file(folder / "adapters" / "adapter_model.safetensors")
                   for folder in (finished, finished.with_name("stage2")))
  for key, x in first.items():
    assert 0 < relative_error(second[key], x) < 0.5, key


@pytest.mark.long
def test_two_processes_train_the_adapters_of_one(finished, data, start, cache, tmp_path):
  mesh, fields = {"data": 2, "fsdp": 2, "tensor": 2}, FIELDS | {"run_stages": "stage1"}
  flags = train_runs.flags(data, tmp_path / "out", mesh, checkpoint=start, **fields)
  for worker in train_runs.two_processes(flags, cache):
    text, _ = worker.communicate(timeout=500)
    assert worker.returncode == 0, text
  got, want = train_runs.steps(tmp_path / "out"), train_runs.steps(finished.parent)
  for place, line in got.items():
    assert line["samples"] == want[place]["samples"]
    np.testing.assert_allclose(line["loss"], want[place]["loss"], rtol=1e-5)
  assert len(got) == 4
  pair, one = (safetensors.numpy.load_file(folder / "adapters" / "adapter_model.safetensors")
               for folder in (tmp_path / "out" / "stage1", finished))
  for key, x in one.items():
    assert relative_error(pair[key], x) < 1e-2, key


def test_a_checkpoint_holds_the_adapters_alone(finished):
  sums = json.loads((finished / "checkpoints" / "4" / "run" / "metadata").read_text())["sums"]
  held = {name.rsplit("/", 1)[1] for name in sums if "/layers/" in name}
  assert held == {lora.A, lora.B}


def test_a_run_that_goes_on_after_a_kill_ends_in_the_same_bits(finished, data, start, tmp_path):
  out = tmp_path / "out"
  shutil.copytree(finished.parent, out)
  for folder in ("stage2", "stage1/checkpoints/4", "stage1/weights", "stage1/adapters"):
    shutil.rmtree(out / folder)
  assert run(data, out, start) == 0
  assert checkpoints.steps_in(out / "stage1" / "checkpoints") == [2, 4]
  for file in ("stage1/weights/ema.safetensors", "stage1/adapters/adapter_model.safetensors",
               "stage1/checkpoints/4/run/metadata", "stage2/weights/ema.safetensors",
               "stage2/checkpoints/2/run/metadata"):
    assert filecmp.cmp(out / file, finished.parent / file, False), file


def test_the_export_has_merged_targets_and_the_base_s_bits_elsewhere(finished, start):
  read = lambda folder, file: safetensors.numpy.load_file(folder / file)
  adapters = read(finished / "adapters", "adapter_model.safetensors")
  before, after = read(start, "ema.safetensors"), read(finished / "weights", "ema.safetensors")
  changed = {key for key in before if not np.array_equal(before[key], after[key])}
  for key in sorted(changed):
    a, b = (adapters[f"base_model.model.{key.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
    want = before[key].astype(np.float32) + 16 / 3 * (b @ a)
    np.testing.assert_allclose(after[key].astype(np.float32), want, rtol=2**-8, err_msg=key)
  assert len(changed) == len(adapters) // 2 == 14 and after.keys() == before.keys()
  assert filecmp.cmp(start / "ae.safetensors", finished / "weights" / "ae.safetensors", False)


def test_every_way_to_the_merged_weights_gives_the_same_bits(finished, start, tmp_path, capsys):
  kept = str(finished / "checkpoints" / "4")
  convert = lambda *words: commands.main(["convert", *map(str, words)])
  assert convert(kept, tmp_path / "merged", "--to", "published") == 0
  assert convert(kept, tmp_path / "adapters", "--to", "peft") == 0
  assert convert(start, tmp_path / "again", "--to", "published", "--lora",
                 tmp_path / "adapters") == 0
  for folder in ("merged", "again"):
    for path in (finished / "weights").iterdir():
      assert filecmp.cmp(path, tmp_path / folder / path.name, False), (folder, path.name)
  for path in (finished / "adapters").iterdir():
    assert filecmp.cmp(path, tmp_path / "adapters" / path.name, False), path.name
  assert convert(start, tmp_path / "none", "--to", "peft") == 2
  assert f"{start}: holds no adapters" in capsys.readouterr().err


def test_other_base_weights_are_refused(finished, data, start, tmp_path, capsys):
  other, out = tmp_path / "other", tmp_path / "out"
  shutil.copytree(start, other)
  shutil.copytree(finished.parent, out)
  assert run(data, out, other) == 0  # a copy of them
  tensors = safetensors.numpy.load_file(other / "ema.safetensors")
  tensors["llm2vae.bias"] = tensors["llm2vae.bias"] + 1
  safetensors.numpy.save_file(tensors, other / "ema.safetensors")
  assert run(data, out, other) == 2
  assert (f"--checkpoint {other}: has the fingerprint {weights.fingerprint(other)}, but the run's "
          f"adapters belong to ") in capsys.readouterr().err
  assert commands.main(["convert", str(out / "stage1" / "checkpoints" / "4"),
                        str(tmp_path / "merged"), "--to", "published"]) == 2
  assert f"{other}: has the fingerprint" in capsys.readouterr().err


def test_another_rank_is_refused(finished, data, start, capsys):
  assert run(data, finished.parent, start, lora__rank=4) == 2
  assert "started with lora.rank=3, not 4" in capsys.readouterr().err


def test_adapters_are_merged_on_load_as_much_as_their_scale_says(finished, start):
  load = functools.partial(generator.load, start, mesh={"data": 1}, dtype="float32")
  loads = [load(), *(load(lora=finished / "adapters", lora_scale=x) for x in (0.0, 0.5, 1.0))]
  plain, none, half, whole = (
      names.flatten(found.params["transformer"])["decoder/layers/gen/q/kernel"] for found in loads)
  np.testing.assert_array_equal(none, plain)
  assert relative_error(half - plain, (whole - plain) / 2) < 1e-3
  assert not np.array_equal(whole, plain)
  assert len({found.fingerprint for found in loads}) == 4
  assert repr(loads[3].adapters.folder) == repr(finished / "adapters")


# --- PEFT's files


@pytest.fixture
def folder(tmp_path):
  """Adapters in PEFT's files."""
  peft.save(tmp_path / "peft", random_adapters(), CONFIG, LORA, "weights/base")
  return tmp_path / "peft"


def test_files_of_peft_are_read_back_bit_for_bit(folder):
  adapters, scale = peft.load(folder, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, adapters, random_adapters())
  assert scale == LORA.scale
  fields = json.loads((folder / peft.CONFIG).read_text())
  assert fields["base_model_name_or_path"] == "weights/base" and fields["r"] == 4
  tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  key = "base_model.model.language_model.model.layers.1.mlp_moe_gen.down_proj"
  assert tensors[f"{key}.lora_A.weight"].shape == (4, 24)
  assert tensors[f"{key}.lora_B.weight"].shape == (16, 4)


def test_peft_itself_merges_the_same_weights_and_what_it_writes_is_read(folder, tmp_path):
  """On linear layers with the published names."""
  torch = pytest.importorskip("torch", reason="no torch")
  theirs = pytest.importorskip("peft", reason="no peft")
  model, want = torch.nn.Module(), {}
  merged = names.flatten(merge(copied(base()), random_adapters(), LORA.scale))
  for row in lora.kernel_rows(CONFIG):
    before, after = (tree[row.path.removeprefix("transformer/")]
                     for tree in (names.flatten(base()), merged))
    for i, key in enumerate(row.keys):
      *parents, name, _ = key.split(".")
      module = model
      for parent in parents:
        if parent not in dict(module.named_children()):
          module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
      linear = torch.nn.Linear(*row.layer_shape, bias=False)
      linear.weight.data = torch.tensor(np.array(before[i] if row.layers else before).T)
      module.add_module(name, linear)
      want[key] = np.array(after[i] if row.layers else after).T
  adapted = theirs.PeftModel.from_pretrained(model, folder)
  adapted.save_pretrained(tmp_path / "again")
  adapters, scale = peft.load(tmp_path / "again", CONFIG)
  jax.tree.map(np.testing.assert_array_equal, adapters, random_adapters())
  assert scale == LORA.scale
  found = adapted.merge_and_unload().state_dict()
  assert found.keys() == want.keys()
  for key, x in want.items():
    np.testing.assert_allclose(found[key].numpy(), x, rtol=1e-5, atol=1e-6, err_msg=key)


def test_an_adapter_s_name_in_keys_and_the_scale_of_rslora_are_read(folder):
  change(folder, use_rslora=True)
  path = folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({key.replace(".weight", ".default.weight"): x
                               for key, x in tensors.items()}, path)
  adapters, scale = peft.load(folder, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, adapters, random_adapters())
  assert scale == 6.0 / 2


def change(folder, **fields):
  path = folder / peft.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(folder, edit):
  path = folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


HEAD = "base_model.model.llm2vae.lora_"


@pytest.mark.parametrize("damage, message", [
    (lambda f: change(f, r=8),
     r"adapter_model.safetensors: \S+lora_A.weight has shape \(4, 24\), but the model's matrix and r "
     r"of adapter_config.json ask for \(8, "),
    (lambda f: change(f, r="4"), "adapter_config.json: r is 4"),
    (lambda f: change(f, lora_alpha=None), "adapter_config.json: lora_alpha is None"),
    (lambda f: change(f, use_dora=True), "adapter_config.json: use_dora is True; only False"),
    (lambda f: change(f, modules_to_save=["lm_head"]), "modules_to_save is "),
    (lambda f: change(f, init_lora_weights="pissa_niter_4"), "init_lora_weights is pissa_niter_4"),
    (lambda f: change(f, lora_bias=True), "lora_bias is True; only False"),
    (lambda f: change(f, rank_pattern={"q_proj": 2}), "rank_pattern is "),
    (lambda f: (f / peft.CONFIG).unlink(), "adapter_config.json: no such file"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such f"),
    (lambda f: retensor(f, lambda t: t.pop(HEAD + "B.weight")),
     "adapter_model.safetensors: lacks base_model.model.llm2vae.lora_B.weight"),
    (lambda f: retensor(f, lambda t: t.update({HEAD + "C.weight": t[HEAD + "A.weight"]})),
     "llm2vae.lora_C.weight: of no matrix of this model"),
    (lambda f: retensor(f, lambda t: t.update({HEAD + "A.weight": np.full((4, 16), np.nan,
                                                                         np.float32)})),
     "llm2vae.lora_A.weight has NaN"),
    (lambda f: retensor(f, dict.clear), "holds no adapter"),
])
def test_files_that_do_not_fit_are_refused_with_the_file_and_the_key(folder, damage, message):
  damage(folder)
  with pytest.raises(weights.CheckpointError, match=message):
    peft.load(folder, CONFIG)


def test_adapters_of_another_model_are_refused(folder):
  wider = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, mlp_size=32))
  with pytest.raises(weights.CheckpointError, match=r"down_proj.lora_A.weight has shape \(4, 24\)"):
    peft.load(folder, wider)


@pytest.mark.parametrize("argv, message", [
    (["--lora", "nowhere"], "--lora nowhere: no such folder"),
    (["--lora-scale", "nan"], "nan is not a finite number"),
])
def test_flags_of_adapters_are_checked_before_weights_are_read(argv, message, capsys):
  try:
    assert commands.main(["generate", "a fox", *argv]) == 2
  except SystemExit as e:
    assert e.code == 2
  assert message in capsys.readouterr().err
