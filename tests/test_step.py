"""The train step: the same on every mesh, normalised over the whole update; frozen parts."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from irg_jax import sharding
from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import BufferSizes, pack_row, stack_rows
from irg_jax.data.records import MODES
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.plan import cost
from irg_jax.train import settings as settings_lib
from irg_jax.train import step as step_lib
from irg_jax.train.settings import Switches
from irg_jax.train.step import init_state
from irg_jax.weights import names
from irg_jax.weights.init import random_params
from irg_jax.tokens import allowed

IRGL = pathlib.Path(__file__).resolve().parents[1] / "configs" / "irgl.py"
CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=32, hidden_size=16, mlp_size=24, num_layers=2, num_heads=4,
                  num_kv_heads=2),
    vit=VitConfig(hidden_size=16, mlp_size=24, num_layers=1, num_heads=2, patch_size=2,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=2), max_latent_size=4)
SPECIAL = SpecialTokens(text_start=28, text_end=29, image_start=30, image_end=31)
SIZES = BufferSizes(und=48, gen=16, vit=16, text=16, samples=2)
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class StandIn:
  """The smallest model with a parameter in every part; compiles fast."""

  config: ModelConfig = CONFIG

  def params(self):
    width = CONFIG.llm.hidden_size
    shapes = {
        "embed/embedding": (CONFIG.llm.vocab_size, width), "vit/patch_embed/kernel": (12, width),
        "vit/post_norm/scale": (width,), "decoder/layers/und/q/kernel": (1, width, width),
        "decoder/layers/gen/q/kernel": (1, width, width), "decoder/und_norm/scale": (width,),
        "decoder/gen_norm/scale": (width,), "latent_embed/kernel": (CONFIG.latent_dim, width),
        "heads/text/kernel": (width, CONFIG.llm.vocab_size),
        "heads/velocity/kernel": (width, CONFIG.latent_dim)}
    rng = np.random.default_rng(0)
    return names.unflatten({path: jnp.asarray(rng.standard_normal(shape, np.float32) * 0.3)
                            for path, shape in shapes.items()})

  def apply(self, variables, *args, method=None):
    p, dtype = variables["params"], jnp.dtype(self.config.dtype)
    if method == "text_logits":
      return (args[0] @ p["heads"]["text"]["kernel"]).astype(jnp.float32)
    batch, latents, timestep = args
    layer = jax.tree.map(lambda x: x[0], p["decoder"]["layers"])
    patches = batch.vit_patches.astype(dtype) @ p["vit"]["patch_embed"]["kernel"]
    seen = jnp.mean(patches, 1, keepdims=True) * p["vit"]["post_norm"]["scale"]
    und = (p["embed"]["embedding"][batch.text_ids] + seen).astype(dtype)
    und = und @ layer["und"]["q"]["kernel"] * p["decoder"]["und_norm"]["scale"]
    gen = latents.astype(dtype) @ p["latent_embed"]["kernel"] + timestep[..., None].astype(dtype)
    gen = gen @ layer["gen"]["q"]["kernel"] * p["decoder"]["gen_norm"]["scale"]
    gen = gen + jnp.mean(und, 1, keepdims=True)
    velocity = gen.astype(dtype) @ p["heads"]["velocity"]["kernel"]
    return und.astype(dtype), velocity.astype(jnp.float32)


@functools.cache
def settings():
  return settings_lib.load(f"{IRGL}:tiny", ["data.path=unused", "stage1.warmup_steps=2"])


@functools.cache
def optimizer():
  return step_lib.make_optimizer(settings().optimizer, settings().stage1)


@functools.cache
def batch(rows=8):
  """Two samples a row, an edited image and a new one; longer texts in later rows."""
  rng = np.random.default_rng(0)
  ids = lambda n: rng.integers(0, 28, n).tolist()
  def image(**roles):
    return ImageSplit(rng.standard_normal((2, 2, CONFIG.latent_dim), np.float32),
                        rng.uniform(-1, 1, (3, 2, 12)).astype(np.float32), **roles)
  def row(r):
    edit = [TextSplit(ids(2)), image(need_vae=True, need_vit=True),
            TextSplit(ids(1 + r // 2), need_loss=True), image(need_loss=True)]
    new = [TextSplit(ids(3)), TextSplit(ids(r // 3), need_loss=True), image(need_loss=True)]
    return pack_row([sample_features(s, CONFIG, SPECIAL, mode=mode, index=r)
                     for s, mode in ((edit, 5), (new, 2))], SIZES)
  return stack_rows([row(r) for r in range(rows)])


def state_on(mesh, params):
  shapes = jax.eval_shape(lambda p: init_state(p, optimizer()), params)
  return jax.jit(lambda p: init_state(p, optimizer()),
                 out_shardings=sharding.parameter_shardings(shapes, mesh))(params)


def new_state():
  return state_on(one_device(), StandIn().params())


def one_device():
  return sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])


def compiled(model, mesh, state, rows, switches):
  """The step `(state, rows, key) -> (state, metrics)`.

  Less optimised than by default: compiling is nearly all that these tests do.
  """
  step = step_lib.make_train_step(model, optimizer(), settings(), mesh, state, rows)
  return step.lower(switches, state, rows, KEY).compile(
      compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def step_on_one_device(switches=Switches(), model=StandIn()):
  return compiled(model, one_device(), new_state(), batch(), switches)


def split(rows):
  """The same rows as two batches of one update."""
  return jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), rows)


def train_the_real_model(mesh, steps=20, attention="auto"):
  """(last state, losses)."""
  state = state_on(mesh, random_params(CONFIG, jax.random.key(0))["transformer"])
  rows = jax.device_put(batch(), step_lib.batch_shardings(batch(), mesh))
  model = UnifiedTransformer(dataclasses.replace(CONFIG, attention=attention))
  step = compiled(model, mesh, state, rows, Switches())
  losses = []
  for _ in range(steps):
    state, metrics = step(state, rows, KEY)
    losses.append(float(metrics["loss"]))
  return state, losses


@functools.cache
def losses_on_one_device():
  return train_the_real_model(one_device())[1]


@pytest.mark.parametrize("shape", [
    {"data": 2, "fsdp": 2, "tensor": 2},
    *(pytest.param(shape, marks=pytest.mark.long) for shape in (
        {"fsdp": 8}, {"fsdp": 4, "sequence": 2}, {"slice": 2, "fsdp": 2, "sequence": 2}, {"slice": 4, "fsdp": 2})),
], ids=lambda shape: "-".join(f"{axis}{n}" for axis, n in shape.items()))
def test_every_mesh_gives_the_same_losses_and_keeps_the_state_in_pieces(shape, capfd):
  want = losses_on_one_device()
  mesh = sharding.make_mesh(shape)
  state, got = train_the_real_model(mesh)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert got[-1] < 0.9 * got[0]
  # XLA warns if it has to make whole arrays between two shardings.
  assert "Involuntary full rematerialization" not in capfd.readouterr().err

  declared = sharding.parameter_shardings(state.params, mesh)
  split_kernels = 0
  adam = state.opt_state[1][0]  # after the clipping
  for kind, tree in {"params": state.params, "ema": state.ema, "mu": adam.mu,
                     "nu": adam.nu}.items():
    def check(path, x, sharding):
      pieces = {s.data.shape for s in x.addressable_shards}
      assert x.sharding == sharding and pieces == {sharding.shard_shape(x.shape)}, (kind, path)
      return pieces != {x.shape}
    split_kernels += sum(jax.tree.leaves(jax.tree.map_with_path(check, tree, declared)))
  assert split_kernels > 4 * 20


@pytest.mark.parametrize("shape", [
    {"data": 2, "sequence": 2, "tensor": 2},
    *(pytest.param(shape, marks=pytest.mark.long) for shape in (
        {"data": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2},
        {"slice": 2, "data": 2, "tensor": 2},
        {"tensor": 8}))], ids=lambda shape: "-".join(f"{axis}{n}" for axis, n in shape.items()))
def test_kernels_give_the_same_losses_on_every_mesh(shape):
  size = np.prod(list(shape.values()))
  _, got = train_the_real_model(sharding.make_mesh(shape, jax.devices()[:size]), steps=4,
                                attention="kernel")
  np.testing.assert_allclose(got, losses_on_one_device()[:4], rtol=1e-5)


def test_a_step_donates_its_state_and_counts():
  state = new_state()
  after, _ = step_on_one_device()(state, batch(), KEY)
  assert int(after.step) == 1
  assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.ema)))


def fixed_noise(batch, key, shift):
  """Noise that does not depend on how rows are batched."""
  return 0.5 * batch.latent_weight, jnp.cos(7 * batch.latents)


def test_accumulation_is_one_large_batch(monkeypatch):
  """Also where the parts have different numbers of targets."""
  monkeypatch.setattr(step_lib, "sample_noise", fixed_noise)
  halves = split(batch()).text_weight.sum((1, 2))
  assert halves[0] != halves[1]
  (one, want), (added, got) = (
      compiled(StandIn(), one_device(), new_state(), rows, Switches())(new_state(), rows, KEY)
      for rows in (batch(), split(batch())))
  assert set(got) == set(want)
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, rtol=1e-5, err_msg=name)
  mean = lambda state: state.opt_state[1][0].mu  # a tenth of the gradient after one update
  for path, x in names.flatten(mean(one)).items():
    assert relative_error(names.flatten(mean(added))[path], x) < 1e-5, path


def two_steps(switches):
  """The first update has a learning rate of 0; the second one moves the parameters."""
  state = new_state()
  for _ in range(2):
    state, metrics = step_on_one_device(switches)(state, batch(), KEY)
  return state, metrics


@pytest.mark.parametrize("name, still", [
    ("gen", r"decoder/layers/gen/|decoder/gen_norm"), ("llm", r"decoder/|embed/|heads/text/")])
def test_frozen_parts_stay_bit_for_bit_and_the_others_learn(name, still):
  state, metrics = two_steps(Switches(frozen=(name,)))
  before = names.flatten(StandIn().params())
  for path, x in names.flatten(state.params).items():
    assert jnp.array_equal(x, before[path]) == bool(re.match(still, path)), path
  assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("name, still", [
    ("und", r"decoder/(layers/und/|und_norm)"), ("gen", r"decoder/(layers/gen/|gen_norm)"),
    ("vit", r"vit/"), ("llm", r"decoder/|embed/|heads/text/")])
def test_freezing_covers_the_parameters_of_the_real_model(name, still):
  real = names.abstract_params(CONFIG, jnp.float32)["transformer"]
  covered = {path for path in names.flatten(real) if re.match(still, path)}
  hit = step_lib.map_frozen(lambda x: "frozen", real, (name,))
  assert {path for path, x in names.flatten(hit).items() if x == "frozen"} == covered
  assert 2 < len(covered) < len(names.flatten(real))


def test_a_loss_that_is_off_is_measured_but_teaches_nothing():
  state, metrics = two_steps(Switches(losses=("mse",)))
  heads, before = state.params["heads"], StandIn().params()["heads"]
  assert jnp.array_equal(heads["text"]["kernel"], before["text"]["kernel"])
  assert not jnp.array_equal(heads["velocity"]["kernel"], before["velocity"]["kernel"])
  assert metrics["ce"] > 1
  np.testing.assert_allclose(metrics["loss"], metrics["ce"] + metrics["mse"], rtol=1e-6)


def test_optimizer_is_adamw_on_clipped_gradients_after_a_warm_up():
  """Compared with the formulas in numpy."""
  s = dataclasses.replace(settings().optimizer, weight_decay=0.01, clip_norm=1.5)
  stage = dataclasses.replace(settings().stage1, learning_rate=0.1, warmup_steps=3)
  opt = step_lib.make_optimizer(s, stage)
  rng = np.random.default_rng(0)
  p = rng.standard_normal(5)
  state = init_state({"kernel": jnp.asarray(p)}, opt)
  m, v, ema = 0.0, 0.0, p
  for i in range(5):
    g = rng.standard_normal(5) * (0.2 if i == 2 else 2.0)
    state = step_lib.update(opt, state, {"kernel": jnp.asarray(g, jnp.float32)}, (), 0.9)
    g = g * min(1, 1.5 / np.linalg.norm(g))
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.95 ** (i + 1))
    p = p - 0.1 * min(1, i / 3) * (m_hat / (np.sqrt(v_hat) + 1e-15) + 0.01 * p)
    ema = 0.9 * ema + 0.1 * p
    np.testing.assert_allclose(state.params["kernel"], p, rtol=1e-5)
    np.testing.assert_allclose(state.ema["kernel"], ema, rtol=1e-5)
  assert int(state.step) == 5


def test_without_warm_up_the_first_update_has_the_whole_learning_rate():
  stage = dataclasses.replace(settings().stage1, learning_rate=0.1, warmup_steps=0)
  schedule = step_lib.make_optimizer(settings().optimizer, stage).schedule
  assert [float(schedule(i)) for i in (0, 1, 100)] == [pytest.approx(0.1)] * 3


def test_the_learning_rate_falls_to_zero_over_the_last_steps():
  stage = dataclasses.replace(settings().stage1, learning_rate=0.1, warmup_steps=2, steps=10,
                              decay_steps=4)
  schedule = step_lib.make_optimizer(settings().optimizer, stage).schedule
  got = [float(schedule(i)) for i in (0, 1, 2, 6, 7, 9, 10)]
  np.testing.assert_allclose(got, [0, 0.05, 0.1, 0.1, 0.075, 0.025, 0], atol=1e-7)


def test_each_image_has_one_time_and_conditions_have_none():
  t, noise = map(np.asarray, step_lib.sample_noise(batch(), KEY, 4.0))
  weight, image = batch().latent_weight, batch().latent_image
  assert not t[weight == 0].any() and noise.shape == batch().latents.shape
  times = [np.unique(t[(image == p) & (weight > 0) & (np.arange(8)[:, None] == r)])
           for r in range(8) for p in np.unique(image[r][weight[r] > 0])]
  assert len(times) == 16 and all(len(x) == 1 and 0 < x[0] < 1 for x in times)
  assert len(set(np.concatenate(times).tolist())) == 16
  other, _ = step_lib.sample_noise(batch(), jax.random.key(4), 4.0)
  assert not np.array_equal(t, other)


def test_times_are_warped_sigmoids_of_normal_samples():
  """The inverse of shift and sigmoid gives standard normal numbers."""
  many = 4096
  targets = dataclasses.replace(
      batch(1), latent_image=np.arange(many)[None], latent_weight=np.ones((1, many), np.float32),
      latents=np.zeros((1, many, 8), np.float32))
  t, noise = (np.asarray(x, np.float64) for x in step_lib.sample_noise(targets, KEY, 4.0))
  u = t / (4 - 3 * t)
  for normal in (np.log(u / (1 - u)), noise):
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1) < 0.05


def test_bfloat16_compute_keeps_float32_master_weights():
  cast = step_lib.cast_kernels(StandIn().params(), "bfloat16")
  for path, x in names.flatten(cast).items():
    matrix = path.endswith(("kernel", "embedding"))
    assert x.dtype == (jnp.bfloat16 if matrix else jnp.float32), path
  model = StandIn(dataclasses.replace(CONFIG, dtype="bfloat16"))
  state, short = step_on_one_device(model=model)(new_state(), batch(), KEY)
  _, full = step_on_one_device()(new_state(), batch(), KEY)
  assert {x.dtype for x in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
  for name in ("loss", "grad_norm"):
    assert 1e-6 < abs(short[name] / full[name] - 1) < 0.03, name


def test_metrics_count_tokens_targets_and_the_use_of_the_buffers():
  _, metrics = step_on_one_device()(new_state(), batch(), KEY)
  rows = batch()
  vit = 6 * 8
  und = int((rows.tokens.sample[:, :SIZES.und] >= 0).sum())
  predicted = int((rows.text_weight > 0).sum())
  pairs = int(allowed(rows.tokens, rows.tokens).sum())
  patch_pairs = int((rows.vit_image[:, :, None] == rows.vit_image[:, None])[
      rows.vit_image >= 0].sum())
  want = {"tokens/text": und - vit, "tokens/vit": vit, "tokens/latent": 12 * 8,
          "tokens/predicted": predicted, "packing/und": und / (8 * 48), "packing/gen": 12 / 16,
          "packing/vit": 6 / 16, "packing/text": predicted / (8 * 16),
          "packing/pairs": pairs / (8 * 64**2), "packing/vit_pairs": patch_pairs / (8 * 16**2),
          "learning_rate": 0.0}
  for name, value in want.items():
    assert float(metrics[name]) == pytest.approx(value), name
  assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
  for loss, weight in (("ce", rows.text_weight), ("mse", rows.latent_weight)):
    by_mode = [(float(metrics[f"{loss}/{m}"]), float(metrics[f"weight/{loss}/{m}"])) for m in MODES]
    assert sum(w for _, w in by_mode) == weight.sum()
    mean = sum(x * w for x, w in by_mode) / weight.sum()
    assert mean == pytest.approx(float(metrics[loss]), rel=1e-5)


def test_only_a_change_of_switches_compiles_again(monkeypatch):
  """Counts traces: each compilation has one."""
  traced = []
  monkeypatch.setattr(step_lib, "train_step", lambda model, optimizer, switches, settings, state,
                      batch, key: (state, traced.append(switches) or {}))
  state = new_state()
  step = step_lib.make_train_step(
      StandIn(), optimizer(), settings(), one_device(), state, batch())
  for frozen in ((), (), ("gen",), ("gen",)):
    state, _ = step(Switches(frozen=frozen), state, batch(), KEY)
  assert traced == [Switches(), Switches(frozen=("gen",))]


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.long), 3])
def test_gradients_cross_the_slices_once_an_update_however_many_batches_it_has(parts):
  mesh = sharding.make_mesh({"slice": 2, "fsdp": 4})
  state = jax.eval_shape(lambda p: init_state(p, optimizer()), StandIn().params())
  rows = jax.tree.map(lambda x: np.stack([x] * parts), batch()) if parts > 1 else batch()
  step = step_lib.make_train_step(StandIn(), optimizer(), settings(), mesh, state, rows)
  text = step.lower(Switches(), state, rows, KEY).compile().as_text()
  across = sum(size for key, size in cost.count_traffic(text).items()
               if key[0] == "sent" and len({i // 4 for i in key[2]}) > 1)
  held = sum(x.size for x in jax.tree.leaves(state.params)) / 4 * 4  # float32, over fsdp
  assert 0.5 * held < across < 1.5 * held
