"""VAE moments: the same beforehand and during training; encoding can be interrupted."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from irg_jax import commands, weights
from irg_jax.images import ImageTransform, to_pixels
from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from irg_jax.data import latents, pipeline, sources
from irg_jax.data.batch import BufferSizes, DataSettings, Dropout
from irg_jax.data.samples import posterior_latents
from irg_jax.data.latents import Encoder
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.data.sources import open_source
from irg_jax.model.vae import Vae, encode_levels, patchify_latents, sample_latents
from irg_jax.weights import init
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer

MODEL = ModelConfig(
    llm=LlmConfig(vocab_size=260, hidden_size=32, mlp_size=32, num_layers=1, num_heads=2,
                  num_kv_heads=1),
    vit=VitConfig(hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, patch_size=4,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=2), max_latent_size=8,
    latent_patch_size=2)
TRANSFORM = ImageTransform(16, 4, 4)
DATA = DataSettings(
    path="", streams=1, workers=0, rows=1, accumulate=1, bins=2, max_sample_tokens=200,
    vae_transform=TRANSFORM, vit_transform=TRANSFORM, dropout=Dropout(text=0.0, vit=0.0, vae=0.2),
    posterior="sample", noise_samples=1, ce_loss_reweighting=False, max_rejected=0.0)
SIZES = BufferSizes(und=60, gen=20, vit=20, text=30, samples=1)
MODE = MODES[5]


class Source:
  """Five records of mode improving_full with images of two sizes."""

  mode, metadata = MODE, {"rows": 5}

  def __len__(self):
    return 5

  def __getitem__(self, i):
    return Record(MODE, int(i), (
        TextPart("draw", False), image(i, need_vae=True, need_vit=True),
        TextPart("look", True), image(i + 10, need_loss=True)))


def image(seed, **roles):
  rng, file = np.random.default_rng(int(seed)), io.BytesIO()
  levels = rng.integers(0, 256, (8, 8 + 4 * (seed % 2), 3), np.uint8)
  Image.fromarray(levels).save(file, "png")
  flags = dict.fromkeys(("need_loss", "need_vae", "need_vit"), False) | roles
  return ImagePart(file.getvalue(), **flags)


@pytest.fixture(scope="module")
def params():
  rng, pixels = np.random.default_rng(0), np.zeros((1, 8, 8, 3), np.float32)
  shapes = jax.eval_shape(Vae(MODEL.vae).init, jax.random.key(0), pixels)["params"]
  return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 10, shapes)


@pytest.fixture(scope="module")
def encoder(params):
  return Encoder(MODEL, params, encode_levels, jax.local_devices()[:2])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  write_byte_tokenizer(folder)
  return load_tokenizer(folder, MODEL.llm.vocab_size)


def batches(source, tokenizer, encoder=None, **changes):
  data = dataclasses.replace(DATA, **changes)
  opened = pipeline.open_batches(data, {MODE: source}, tokenizer, MODEL, mixture={MODE: 1.0},
                                 sizes=SIZES, seed=0, encode=encoder)
  return [next(opened) for _ in range(4)]


def test_moments_are_those_of_each_image_alone(encoder, params):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (8, width, 3), np.uint8) for width in (8, 12, 8)]
  alone = jax.jit(lambda pixels: Vae(MODEL.vae).apply({"params": params}, pixels, method="encode"))
  for levels, got in zip(images, encoder.moments(images), strict=True):
    want = alone(to_pixels(levels)[None])
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-4, atol=1e-5)


def test_a_group_holds_only_what_fits_the_devices(encoder, monkeypatch):
  monkeypatch.setattr("irg_jax.data.latents._GROUP_PIXELS", 64)  # one image a device
  images = [np.full((8, 8, 3), 50 * i, np.uint8) for i in range(5)]
  sizes, group = [], encoder._group
  monkeypatch.setattr(encoder, "_group", lambda p: sizes.append(len(p)) or group(p))
  got = encoder.moments(images)
  assert sizes == [2, 2, 1]
  np.testing.assert_allclose(got[4], encoder.moments(images[4:])[0], rtol=1e-4, atol=1e-5)
  assert np.abs(got[4] - got[3]).max() > 1e-3


def test_latents_are_those_of_the_model(params):
  rng = np.random.default_rng(1)
  moments = rng.standard_normal((2, 4, 6, 2), np.float32)
  noise = rng.standard_normal((1, 4, 6, 2), np.float32)
  tokens = lambda z: np.asarray(patchify_latents(z, 2)).reshape(2, 3, 8)
  want = tokens(sample_latents(MODEL.vae, moments[:1], moments[1:], noise))
  np.testing.assert_allclose(posterior_latents(moments, tokens(noise), MODEL), want, rtol=1e-5)
  want = tokens(sample_latents(MODEL.vae, moments[:1], moments[1:]))
  np.testing.assert_allclose(posterior_latents(moments, 0 * want, MODEL), want, rtol=1e-5)


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_latents_encoded_beforehand_and_on_the_fly_agree(tmp_path, encoder, tokenizer, posterior):
  latents.encode_dataset({MODE: Source()}, tmp_path, encoder, TRANSFORM, shard_records=2)
  before = batches(open_source(tmp_path, MODE), tokenizer, posterior=posterior)
  fly = batches(Source(), tokenizer, encoder, posterior=posterior)
  assert np.abs(before[0].latents).sum(-1).any()
  for a, b in zip(before, fly):
    np.testing.assert_allclose(a.latents, b.latents, rtol=1e-4, atol=1e-5)
    same = lambda x: dataclasses.replace(x, latents=np.zeros(0))
    jax.tree.map(np.testing.assert_array_equal, same(a), same(b))
  other = batches(Source(), tokenizer, encoder, posterior={"sample": "mean", "mean": "sample"}[
      posterior])
  assert np.abs(other[0].latents - fly[0].latents).max() > 0.01


def test_float16_moments_differ_by_rounding_only(tmp_path, encoder):
  for dtype in ("float32", "float16"):
    latents.encode_dataset({MODE: Source()}, tmp_path / dtype, encoder, TRANSFORM, dtype=dtype,
                          shard_records=2)
  full, half = (open_source(tmp_path / d, MODE)[1].parts[1].moments for d in ("float32", "float16"))
  assert full.dtype == np.float32 and half.dtype == np.float16
  np.testing.assert_allclose(half, full, rtol=1e-3, atol=1e-4)


def test_processes_share_the_files_and_the_last_one_completes_them(tmp_path, encoder):
  run = lambda i: latents.encode_dataset(
      {MODE: Source()}, tmp_path, encoder, TRANSFORM, shard_records=2, process_index=i,
      process_count=2)[MODE]
  assert run(1) == "waiting"
  assert not (tmp_path / "irgl").exists()
  assert run(0) == "written"
  assert run(1) == "there"
  source = open_source(tmp_path, MODE)
  assert [source[i] for i in range(5)] == [Source()[i] for i in range(5)]
  for record in (source[i] for i in range(5)):
    assert [p.moments is not None for p in record.parts if isinstance(p, ImagePart)] == [True] * 2
  assert source.metadata["rows"] == 5
  assert source.metadata["vae_transform"] == dataclasses.asdict(TRANSFORM)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["irgl"]


def test_interrupted_encoding_goes_on_with_what_is_missing(tmp_path, encoder, monkeypatch):
  run = lambda: latents.encode_dataset({MODE: Source()}, tmp_path, encoder, TRANSFORM,
                                      shard_records=2)[MODE]
  write, written = sources.write_shard, []

  def killed(path, records):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(path)
    return write(path, records)

  monkeypatch.setattr(sources, "write_shard", killed)
  with pytest.raises(KeyboardInterrupt):
    run()
  monkeypatch.setattr(sources, "write_shard", lambda p, r: written.append(p) or write(p, r))
  assert run() == "written"
  assert len(written) == len(set(written)) == 3
  assert len(open_source(tmp_path, MODE)) == 5


@pytest.mark.parametrize("complete", [False, True], ids=["files of", "a complete"])
def test_other_settings_do_not_mix_with_what_is_there(tmp_path, encoder, complete):
  run = lambda **changes: latents.encode_dataset(
      {MODE: Source()}, tmp_path, encoder, changes.pop("transform", TRANSFORM), shard_records=2,
      process_count=1 if complete else 2, **changes)
  run()
  other = type("Turned", (Source,), {"__getitem__": lambda self, i: Source()[4 - i]})()
  with pytest.raises(ValueError, match="started with source=.*, not "):
    latents.encode_dataset({MODE: other}, tmp_path, encoder, TRANSFORM, shard_records=2)
  for changes, message in (
      (dict(dtype="float16"), "started with moments=float32, not float16"),
      (dict(transform=ImageTransform(12, 4, 4)), "started with vae_transform.max_size=.*, not 12")):
    with pytest.raises(ValueError, match=message):
      run(**changes)


def test_moments_that_are_not_finite_name_the_record(tmp_path, encoder, monkeypatch):
  monkeypatch.setattr(Encoder, "moments", lambda self, images: [
      np.full((2, 4, 4, 2), np.nan, np.float32) for _ in images])
  with pytest.raises(ValueError, match=rf"{MODE}, record 0: .*float16"):
    latents.encode_dataset({MODE: Source()}, tmp_path, encoder, TRANSFORM, dtype="float16")


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
  init.write_random_checkpoint(folder, MODEL, 0)
  return folder


def test_only_the_vae_is_read_when_asked_for(checkpoint_folder):
  _, both = weights.load_checkpoint(checkpoint_folder)
  _, vae = weights.load_checkpoint(checkpoint_folder, part="vae")
  assert vae.keys() == {"vae"}
  jax.tree.map(np.testing.assert_array_equal, vae["vae"], both["vae"])


def test_command_encodes_a_built_dataset(tmp_path, checkpoint_folder, capsys, monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
  folder = sources.mode_folder(tmp_path / "data", MODE)
  folder.mkdir(parents=True)
  count, size = sources.write_shard(
      sources.shard_path(folder, 0, 1), (Source()[i] for i in range(5)))
  sources.write_info(tmp_path / "data", MODE, [count], size, {})
  argv = ["data", "encode-latents", str(tmp_path / "data"), "--checkpoint", str(checkpoint_folder),
          "--out", str(tmp_path / "out"), "--mode", MODE, "--size", "4", "16", "4"]
  monkeypatch.setattr("irg_jax.data.latents._GROUP_PIXELS", 64)
  assert commands.main(argv) == 0
  assert f"{MODE}: written" in capsys.readouterr().out
  got = open_source(tmp_path / "out", MODE)[2].parts[1]
  assert got.moments.shape == (2, 4, 4, 2)
  assert commands.main(argv + ["--size", "4", "16", "2"]) == 2
  assert "stride 2 is not a multiple of the 4 pixels" in capsys.readouterr().err
  assert commands.main(argv + ["--process-id", "3"]) == 2
  assert "--process-id 3" in capsys.readouterr().err
