"""The Grain pipeline: a stream depends on its number and the seed alone; exact resumption."""

import collections
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from irg_jax.data import pipeline
from irg_jax.data.batch import BufferSizes, DataSettings, Dropout, pack_row, stack_rows
from irg_jax.data.samples import record_features
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.images import ImageTransform
from irg_jax.tokens import PADDING
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.train.loss import token_losses
from irg_jax.weights import names
from irg_jax.tokenizer import load_tokenizer, write_byte_tokenizer

MODEL = ModelConfig(
    llm=LlmConfig(vocab_size=260, hidden_size=32, mlp_size=32, num_layers=1, num_heads=2,
                  num_kv_heads=1),
    vit=VitConfig(hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, patch_size=4,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=2), max_latent_size=4,
    latent_patch_size=2)
DATA = DataSettings(
    path="", streams=2, workers=0, rows=4, accumulate=1, bins=3, max_sample_tokens=200,
    vae_transform=ImageTransform(16, 4, 4), vit_transform=ImageTransform(16, 4, 4),
    dropout=Dropout(text=0.2, vit=0.2, vae=0.3), posterior="sample", noise_samples=1,
    ce_loss_reweighting=False, max_rejected=0.0)
SIZES = BufferSizes(und=120, gen=40, vit=50, text=80, samples=5)
MIXTURE = {MODES[1]: 0.5, MODES[4]: 1.0, MODES[5]: 0.75}
RECORDS = 40  # of each mode


class Source:
  """Made-up records with moments; remembers which were read."""

  def __init__(self, mode, moments=True, thought=lambda i: "t" * (5 + i)):
    self.mode, self.read = mode, collections.Counter()
    self._moments, self._thought = moments, thought

  def __len__(self):
    return RECORDS

  def __getitem__(self, i):
    self.read[int(i)] += 1
    parts = [TextPart(f"prompt {i}", False), TextPart(self._thought(i), True)]
    if self.mode in (MODES[4], MODES[5]):
      parts.insert(1, self._image(i, need_vae=True, need_vit=True))
    if self.mode == MODES[5]:
      parts.append(self._image(i + 50, need_loss=True))
    return Record(self.mode, int(i), tuple(parts))

  def _image(self, seed, **roles):
    rng = np.random.default_rng(int(seed))
    file, levels = io.BytesIO(), rng.integers(0, 256, (8, 8 + 4 * (seed % 3), 3), np.uint8)
    Image.fromarray(levels).save(file, "png")
    moments = rng.standard_normal((2, 4, levels.shape[1] // 2, 2), np.float32)
    flags = dict.fromkeys(("need_loss", "need_vae", "need_vit"), False) | roles
    return ImagePart(file.getvalue(), **flags, moments=moments if self._moments else None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  write_byte_tokenizer(folder)
  return load_tokenizer(folder, MODEL.llm.vocab_size)


@pytest.fixture
def open_batches(tokenizer):
  """`pipeline.open_batches` on made-up records; closed at the end."""
  opened = []

  def open_(sources=None, mixture=MIXTURE, sizes=SIZES, process=(0, 1), encode=None, seed=3,
            **changes):
    sources = sources or {mode: Source(mode) for mode in MODES}
    data = dataclasses.replace(DATA, **changes)
    opened.append(pipeline.open_batches(
        data, sources, tokenizer, MODEL, mixture=mixture, sizes=sizes, seed=seed,
        process_index=process[0], process_count=process[1], encode=encode))
    return opened[-1]

  yield open_
  for batches in opened:
    batches.close()


def take(batches, n):
  return [next(batches) for _ in range(n)]


def assert_equal(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def samples(batches):
  """(mode, index) of all samples, row by row."""
  return [[(m, i) for m, i in zip(mode.tolist(), index.tolist()) if m >= 0]
          for b in batches for mode, index in zip(b.sample_mode, b.sample_index)]


def per_sample(batch, text_values=None, latent_values=None):
  """Token arrays of every sample that packing must not change, by (mode, index).

  Args:
    text_values, latent_values: further arrays [B, L] and [B, G] to cut up, such as losses.
  """
  got = collections.defaultdict(list)
  for r in range(len(batch.sample_mode)):
    und = batch.text_ids.shape[1]
    for column, key in enumerate(zip(batch.sample_mode[r].tolist(),
                                     batch.sample_index[r].tolist())):
      if key[0] < 0:
        continue
      here = batch.tokens.sample[r] == column
      text, u, g = batch.text_sample[r] == column, here[:und], here[und:]
      vit = batch.vit_index[r][u]
      got[key].append(dict(
          index=batch.tokens.index[r][here], split=batch.tokens.split[r][here],
          kind=batch.tokens.kind[r][here], position=batch.position[r][here],
          ids=batch.text_ids[r][u], patches=batch.vit_patches[r][vit[vit >= 0]],
          patch_place=batch.vit_position[r][vit[vit >= 0]], latents=batch.latents[r][g],
          weight=batch.latent_weight[r][g], place=batch.latent_position[r][g],
          target=batch.text_target[r][text], text_weight=batch.text_weight[r][text],
          predicts=batch.tokens.index[r][batch.text_place[r][text]]))
      if text_values is not None:
        got[key][-1] |= dict(ce=text_values[r][text], mse=latent_values[r][g])
  return got


def test_rows_hold_the_samples_whole_and_nothing_else(open_batches, tokenizer):
  """Every token is compared with what the record alone gives, so with any other packing, too."""
  batches = take(open_batches(), 6)
  assert max(map(len, samples(batches))) > 2
  for batch in batches:
    for (mode, index), found in per_sample(batch).items():
      stream = index % DATA.streams
      lone = [pack_row([record_features(
          Source(MODES[mode])[index], tokenizer, MODEL, DATA,
          np.random.default_rng((3, stream, mode, index, epoch)))], SIZES) for epoch in range(3)]
      lone = per_sample(stack_rows(lone))[mode, index]
      for sample in found:
        assert any(all(np.array_equal(sample[k], want[k]) for k in want) for want in lone)
    used = (batch.sample_mode >= 0).sum(1)
    assert (batch.tokens.sample.max(1) == used - 1).all()
    assert (batch.vit_image[batch.vit_image != PADDING] >= 0).all()


def two_packings(open_batches):
  """The same samples in other rows: a packer of one bin, and one of three."""
  return [take(open_batches(streams=1, bins=bins), 6) for bins in (1, 3)]


def by_sample(batches, *values):
  found = collections.defaultdict(list)
  for i, batch in enumerate(batches):
    for key, samples_ in per_sample(batch, *(v[i] for v in values)).items():
      found[key] += samples_
  return found


def test_two_packings_hold_the_same_tokens(open_batches):
  one, other = two_packings(open_batches)
  assert samples(one) != samples(other)
  one, other = by_sample(one), by_sample(other)
  shared = one.keys() & other.keys()
  assert len(shared) > 20
  for key in shared:  # one epoch's dropout and noise may be seen by one packing only
    fewer, more = sorted((one[key], other[key]), key=len)
    for sample in fewer:
      assert any(all(np.array_equal(sample[k], want[k]) for k in want) for want in more), key


def test_two_packings_have_the_same_losses_of_every_token(open_batches):
  model = UnifiedTransformer(MODEL)

  @jax.jit
  def losses(params, batch, timestep, noise):
    return token_losses(model, params, batch, timestep, noise)

  def timesteps_and_noise(batch):
    """Timesteps and noise that belong to the sample, wherever it stands."""
    noise, time = np.zeros_like(batch.latents), np.zeros_like(batch.latent_weight)
    und = batch.text_ids.shape[1]
    for r, columns in enumerate(batch.tokens.sample[:, und:]):
      for column in set(columns[columns >= 0].tolist()):
        here = columns == column
        rng = np.random.default_rng((batch.sample_mode[r, column], batch.sample_index[r, column]))
        noise[r, here] = rng.standard_normal((here.sum(), noise.shape[-1]))
        time[r, here] = rng.uniform() * batch.latent_weight[r, here]
    return time, noise

  packings = two_packings(open_batches)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) * 0.1,
                        names.abstract_params(MODEL, np.float32)["transformer"])
  found = []
  for batches in packings:
    values = [losses(params, batch, *timesteps_and_noise(batch)) for batch in batches]
    found.append(by_sample(batches, *(np.asarray(v) for v in zip(*values))))
  compared = 0
  for key in found[0].keys() & found[1].keys():
    for a, b in zip(*(f[key] for f in found)):  # in order of epochs
      if all(np.array_equal(a[k], b[k]) for k in ("ids", "latents")):
        np.testing.assert_allclose(a["ce"], b["ce"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a["mse"], b["mse"], rtol=1e-5, atol=1e-5)
        compared += a["ce"].size > 0 and a["ce"].min() > 0
  assert compared > 20


@pytest.mark.parametrize("done", [0, 1, 4])
def test_restored_state_goes_on_bit_for_bit(open_batches, done):
  batches = open_batches()
  take(batches, done)
  state = json.loads(json.dumps(batches.get_state()))
  want = take(batches, 5)
  again = open_batches()
  again.set_state(state)
  assert_equal(take(again, 5), want)
  batches.set_state(state)  # and back in the iterator itself
  assert_equal(take(batches, 5), want)
  assert batches.skipped == again.skipped


def test_worker_processes_change_nothing_and_come_and_go_with_a_restart(open_batches):
  alone = open_batches(streams=4)
  take(alone, 2)
  working = open_batches(streams=4, workers=2)
  working.set_state(alone.get_state())
  assert_equal(take(working, 4), take(alone, 4))
  assert working.get_state() == alone.get_state()  # although the workers are rows ahead
  assert working.skipped == alone.skipped


@pytest.mark.parametrize("streams", [2, 4])
def test_two_processes_yield_together_what_one_yields(open_batches, streams):
  one = take(open_batches(streams=streams), 4)
  two = [take(open_batches(streams=streams, process=(i, 2)), 4) for i in range(2)]
  together = [jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in zip(*two)]
  assert_equal(together, one)


def test_state_is_taken_up_by_another_number_of_processes(open_batches):
  one = open_batches(streams=4)
  take(one, 3)
  state = one.get_state()
  want = take(one, 2)
  two = [open_batches(streams=4, process=(i, 2)) for i in range(2)]
  for batches in two:
    batches.set_state(state)
  got = [jax.tree.map(lambda *x: np.concatenate(x), *p) for p in zip(*(take(b, 2) for b in two))]
  assert_equal(got, want)
  merged = {k: v for batches in two for k, v in batches.get_state().items()}
  again = open_batches(streams=4)
  again.set_state(json.loads(json.dumps(merged)))
  assert again.skipped == one.skipped
  assert_equal(take(again, 2), take(one, 2))


def test_process_reads_only_the_records_of_its_streams(open_batches):
  read = []
  for process in range(2):
    sources = {mode: Source(mode) for mode in MODES}
    take(open_batches(sources, streams=4, process=(process, 2)), 6)
    read.append({mode: set(source.read) for mode, source in sources.items()})
  for process, modes in enumerate(read):
    for mode, records in modes.items():
      assert bool(records) == (mode in MIXTURE)
      assert {i % 4 // 2 for i in records} <= {process}


def test_modes_come_by_weight_and_each_epoch_in_another_order(open_batches):
  batches = take(open_batches(streams=1, rows=1), 70)
  order = [s for row in samples(batches) for s in row]
  share = np.bincount([m for m, _ in order], minlength=6) / len(order)
  weights = np.array([MIXTURE.get(mode, 0) for mode in MODES])
  np.testing.assert_allclose(share, weights / weights.sum(), atol=0.02)
  other = take(open_batches(streams=1, rows=1, seed=4), 10)
  assert samples(other) != samples(batches)[:10]
  seen = collections.Counter(i for m, i in order if m == 4)
  assert len(seen) == RECORDS and max(seen.values()) - min(seen.values()) <= 2


def test_oversized_samples_are_skipped_and_counted_by_mode_and_limit(open_batches):
  long = {4: "x" * 81, 7: "x" * 150}  # too long for the text buffer; for a sample
  thought = lambda i: long.get(int(i), "short")
  sources = {mode: Source(mode, thought=thought) for mode in MODES}
  batches = open_batches(sources, mixture={MODES[1]: 1.0}, streams=1, rows=1,
                         max_sample_tokens=110)
  got = [s for row in samples(take(batches, 40)) for s in row]
  assert {i for _, i in got} == set(range(RECORDS)) - set(long)
  skipped = batches.skipped[MODES[1]]
  assert skipped.keys() == {"text", "max_sample_tokens"}
  epochs = len(got) / (RECORDS - len(long))
  assert all(epochs - 2 <= n <= epochs + 2 for n in skipped.values())


def test_mode_that_never_fits_stops_with_its_limit(open_batches):
  sources = {mode: Source(mode, thought=lambda i: "x" * 81) for mode in MODES}
  with pytest.raises(ValueError, match=rf"{MODES[1]}: not one of 40 samples.*'text': 40"):
    next(open_batches(sources, mixture={MODES[1]: 1.0}, streams=1))


def test_images_without_moments_need_an_encoder(open_batches):
  sources = {mode: Source(mode, moments=False) for mode in MODES}
  with pytest.raises(ValueError, match="encode-latents"):
    next(open_batches(sources))


def test_record_that_cannot_be_laid_out_is_named(open_batches):
  sources = {mode: Source(mode, thought=lambda i: "\ud800") for mode in MODES}
  with pytest.raises(ValueError, match=rf"{MODES[1]}, record \d: .*surrogate"):
    next(open_batches(sources, mixture={MODES[1]: 1.0}))


@pytest.mark.parametrize("changes,message", [
    (dict(streams=3), "rows 4 must be a multiple of data.streams 3"),
    (dict(process=(0, 4)), "2 data streams cannot be shared by 4"),
    (dict(process=(2, 2)), "process 2 of 2"),
    (dict(mixture={MODES[0]: 0.0}), "no mode with a weight"),
    (dict(mixture={"made_up": 1.0}), "made_up"),
    (dict(streams=0, rows=50), "40 records, fewer than the 50 data streams"),
])
def test_settings_that_do_not_divide_are_refused_before_anything_is_read(
    open_batches, changes, message):
  with pytest.raises(ValueError, match=message):
    open_batches(**changes)


def test_moments_of_another_transform_are_refused(open_batches):
  sources = {mode: Source(mode) for mode in MODES}
  sources[MODES[4]].metadata = {"vae_transform": dict(max_size=32, min_size=4, stride=4)}
  with pytest.raises(ValueError, match="encoded with vae_transform"):
    open_batches(sources)


@pytest.mark.parametrize("change,message", [
    (lambda s: s.pop(1), r"lacks streams \[1\]"),
    (lambda s: s[0].update(streams=3), r"\[2, 3\] streams, but there are 2"),
])
def test_state_of_other_streams_is_refused(open_batches, change, message):
  batches = open_batches()
  state = batches.get_state()
  change(state)
  with pytest.raises(ValueError, match=message):
    batches.set_state(state)
