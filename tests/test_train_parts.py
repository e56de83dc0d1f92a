"""Units of a training run: rows by process, FLOPs, the log."""

import errno
import io
import json
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from irg_jax import chips, sharding
from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import BufferSizes, pack_row, stack_rows
from irg_jax.data.samples import TextSplit, sample_features
from irg_jax.train import feed, logs
from irg_jax.train.step import row_flops, unit_flops
from irg_jax.weights import names

MODEL = ModelConfig(
    llm=LlmConfig(vocab_size=300, hidden_size=16, mlp_size=40, num_layers=3, num_heads=4,
                  num_kv_heads=2),
    vit=VitConfig(hidden_size=8, mlp_size=24, num_layers=2, num_heads=2, patch_size=2,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=2), max_latent_size=4)
SIZES = BufferSizes(und=30, gen=20, vit=10, text=15, samples=2)
SPECIAL = SpecialTokens(text_start=296, text_end=297, image_start=298, image_end=299)


# --- rows and processes


class Device(NamedTuple):
  id: int
  process_index: int


def rows_of(processes, monkeypatch, rows=8, mesh=None):
  """`row_blocks` with a piece of the rows on each device i, of process `processes[i]`."""
  each = rows // len(processes)
  devices = {Device(i, p): (slice(i * each, (i + 1) * each),) for i, p in enumerate(processes)}
  monkeypatch.setattr(feed, "_row_sharding", lambda *_: types.SimpleNamespace(
      devices_indices_map=lambda shape: devices))
  shape = {"slice": 1, "data": 1, "fsdp": len(processes)} | (mesh or {})
  return feed.row_blocks(rows, types.SimpleNamespace(shape=shape))


@pytest.mark.parametrize("processes, blocks", [
    ([0, 0, 0, 0], [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ([0, 0, 1, 1], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([1, 1, 0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([0, 1, 0, 1], [[0, 1, 4, 5], [2, 3, 6, 7]]),  # possible on a TPU slice
])
def test_every_row_is_fed_by_the_processes_that_hold_it(processes, blocks, monkeypatch):
  assert rows_of(processes, monkeypatch) == blocks


def test_a_mesh_whose_hosts_share_some_rows_is_refused(monkeypatch):
  with pytest.raises(ValueError, match="'data.rows' is 8, .* multiple of the 16 devices"):
    rows_of([0, 0, 1, 1], monkeypatch, mesh={"fsdp": 16})
  with pytest.raises(ValueError, match="hosts share some of their rows"):
    rows_of([0, 0, 0, 1], monkeypatch)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_placed_batch_is_the_batch_split_over_the_mesh(accumulate):
  samples = [sample_features([TextSplit(list(range(1, 3 + i)), True)], MODEL, SPECIAL)
             for i in range(4 * accumulate)]
  batches = [stack_rows([pack_row([s], SIZES) for s in samples[4 * i:4 * i + 4]])
             for i in range(accumulate)]
  batch = batches[0] if accumulate == 1 else jax.tree.map(lambda *x: np.stack(x), *batches)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "sequence": 2})
  placed = feed.place(batch, 4, mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  rows_axis = int(accumulate > 1)
  assert placed.text_ids.sharding.shard_shape(placed.text_ids.shape)[rows_axis] == 1


# --- FLOPs


def products(*patterns):
  """Two FLOPs for every weight of the matrices whose paths contain one of `patterns`."""
  return 2.0 * sum(np.prod(r.shape) for r in names.rows(MODEL)
                   if r.path.endswith("kernel") and any(p in r.path for p in patterns))


def test_a_token_costs_two_for_every_weight_that_it_meets_and_a_pair_two_products():
  assert unit_flops(MODEL) == {
      "und": products("decoder/layers/und/"),
      "gen": products("decoder/layers/gen/", "latent_embed", "time_embed", "heads/velocity"),
      "vit": products("transformer/vit/", "connector"),
      "text": products("heads/text"),
      # Scores, and the weighted sum of values: two products of (tokens x width) a layer.
      "pairs": 3 * 4 * 16, "vit_pairs": 2 * 4 * 8}


def test_a_row_costs_its_tokens_and_its_pairs_three_times():
  each = unit_flops(MODEL)
  tokens = 30 * each["und"] + 20 * each["gen"] + 10 * each["vit"] + 15 * each["text"]
  pairs = 3 * 4 * 16 * 50**2 + 2 * 4 * 8 * 10**2
  assert row_flops(MODEL, SIZES) == 3 * (tokens + pairs)
  none = dict.fromkeys(("und", "gen", "vit", "text", "pairs", "vit_pairs"), 0.0)
  assert row_flops(MODEL, SIZES, none) == 0
  assert row_flops(MODEL, SIZES, none | {"pairs": 0.25}) == 3 * 3 * 4 * 16 * 50**2 / 4
  half = dict.fromkeys(none, 0.5)
  assert row_flops(MODEL, SIZES, half) == row_flops(MODEL, SIZES) / 2


@pytest.mark.parametrize("kind, peak", [
    ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756), ("cpu", 0)])
def test_the_peak_of_a_device_is_known_by_its_name(kind, peak):
  assert chips.peak_tflops(kind) == peak


# --- the log


VALUES = {"loss": 2.0, "ce": 1.5, "mse": 0.5, "learning_rate": 1e-4, "tokens/text": 70.0,
          "tokens/latent": 20.0, "tokens/vit": 10.0}


class Terminal(io.StringIO):

  def isatty(self):
    return True


def write(folder, stream, monkeypatch, seconds, every=2, start=0, peak=1e6):
  """Logs a step at each of the times in `seconds`."""
  clock = iter(seconds)
  monkeypatch.setattr(logs, "time", types.SimpleNamespace(
      monotonic=lambda: next(clock), time=lambda: 0.0))
  with logs.Log(folder, "stage1", sharding.make_mesh(), start=start, total=start + len(seconds),
                every=every, step_flops=lambda values: 5e5, peak_flops=peak, stream=stream) as log:
    for i in range(len(seconds)):
      log.step(start + i + 1, VALUES, [[0, i]])
  return [json.loads(line) for line in (folder / logs.FILE).read_text().splitlines()] \
      if folder else None


def test_a_log_that_cannot_be_written_is_named_at_once(tmp_path, monkeypatch):
  for name in ("lines", "curves"):
    folder = tmp_path / name
    folder.mkdir()
    if name == "lines":
      (folder / logs.FILE).symlink_to("/dev/full")
    else:
      monkeypatch.setattr(record_writer, "open_file", lambda _: open("/dev/full", "wb"))
    with pytest.raises(OSError) as caught:
      write(folder, io.StringIO(), monkeypatch, range(40), every=1)
    path = folder / (logs.FILE if name == "lines" else "tensorboard/stage1")
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC


def test_curves_have_their_points_and_hide_those_that_are_made_again(tmp_path):
  for start in (0, 4):
    folder = tmp_path / str(start)
    with logs.curves(folder, start) as add:
      add(start + 1, {"loss": 0.5, "packing/und": 2.0})
    path, = folder.iterdir()
    seen = list(events(path))
    assert {(event.step, v.tag, v.simple_value) for event in seen for v in event.summary.value} == {
        (start + 1, "loss", 0.5), (start + 1, "packing/und", 2.0)}
    assert [e.step for e in seen if e.HasField("session_log")] == [5] * (start > 0)


def events(path):
  """The events of a TensorBoard file: length, checksum, content, checksum."""
  data = path.read_bytes()
  while data:
    size = int.from_bytes(data[:8], "little")
    yield Event.FromString(data[12:12 + size])
    data = data[16 + size:]


def test_rates_are_those_of_the_steps_since_the_last_line_but_for_the_first(tmp_path, monkeypatch):
  stream = io.StringIO()
  found = write(tmp_path, stream, monkeypatch, [100, 101, 104, 105])
  assert [line["seconds"] for line in found] == [None, 1, 3, 1]
  assert "tokens_per_second" not in found[0] and "tokens_per_second" not in found[2]
  assert found[1]["tokens_per_second"] == 100 and found[1]["flop_utilisation"] == 0.5
  assert found[3]["tokens_per_second"] == 50 and found[3]["flop_utilisation"] == 0.25
  assert found[3]["tflops_per_second"] == 2.5e5 / 1e12
  assert stream.getvalue().splitlines()[1] == (
      "stage1, step 4 of 4: loss 2.0000, ce 1.5000, mse 0.5000, lr 0.0001, 50 tokens/s, "
      "25.0% of peak")


def test_without_a_peak_there_is_no_utilisation(tmp_path, monkeypatch):
  found = write(tmp_path, io.StringIO(), monkeypatch, [1, 2], peak=0.0)
  assert "tokens_per_second" in found[1] and "flop_utilisation" not in found[1]


def test_a_terminal_shows_one_line_and_other_processes_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  stream = Terminal()
  write(tmp_path, stream, monkeypatch, [1, 2, 3, 4])
  shown = stream.getvalue()
  assert "stage1: loss 2.000, 100 tokens/s, 50% peak" in shown and "4 of 4" in shown
  assert "stage1, step 2" not in shown  # one line in place does not scroll
  silent = io.StringIO()
  write(None, silent, monkeypatch, [1, 2])
  assert silent.getvalue() == ""


def test_lines_after_a_step_are_truncated_and_those_before_it_kept(tmp_path):
  path = tmp_path / logs.FILE
  records = [{"stage": s, "step": i} for s in ("stage1", "stage2") for i in range(4)]
  whole = "".join(json.dumps(r) + "\n" for r in records)
  for stage, step, kept in (("stage1", 2, 3), ("stage2", 0, 5), ("stage2", 9, 8)):
    path.write_text(whole + '{"stage": "stage2", "st')
    logs.forget_after(tmp_path, stage, step)
    assert path.read_text() == "".join(whole.splitlines(True)[:kept])
  logs.forget_after(tmp_path / "none", "stage1", 0)
