"""`irg plan`: counting compiled programs, the arithmetic of slices, the report."""

import collections
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import types
import unittest.mock

import jax
import pytest

from conftest import ROOT
from irg_jax import chips, commands, plan, sharding
from irg_jax import config as config_lib
from irg_jax.commands import plan as plan_command
from irg_jax.generate.context import FULL, NO_IMAGE, NO_TEXT
from irg_jax.generate.settings import Forecast, Settings
from irg_jax.plan import cost, meshes, programs
from irg_jax.train import settings as train_settings


@pytest.fixture(autouse=True)
def environment():
  """Undoes the changes of `chips.prepare_to_compile`."""
  with unittest.mock.patch.dict(os.environ):
    yield


@pytest.mark.parametrize("text, message", [
    ("v5p", "write CHIP:SIDExSIDE"), ("v5p:4x0x4", "write CHIP"), ("v9:4x4", "unknown chip 'v9'"),
    ("v5p:4x4", "3 sides"), ("v5e:2x2x2", "2 sides")])
def test_a_topology_that_cannot_be_is_named(text, message):
  with pytest.raises(ValueError, match=message):
    chips.parse_slice(text)


def test_a_group_sends_over_the_links_of_the_sides_it_extends_along():
  flat = chips.parse_slice("v5e:2x4")
  torus = chips.parse_slice("v5p:4x4x4")
  devices = [types.SimpleNamespace(id=i) for i in range(64)]
  flat = dataclasses.replace(flat, places={i: (i // 4, i % 4) for i in range(8)})
  torus = dataclasses.replace(torus, places={i: (i // 16, i // 4 % 4, i % 4) for i in range(64)})
  link = lambda slice_: slice_.chip.link_gbs * 1e9
  assert flat.bandwidth(devices[:4]) == link(flat)  # a row of four: no ring
  assert flat.bandwidth(devices[:8]) == 2 * link(flat)
  assert torus.bandwidth(devices[:4]) == 2 * link(torus)
  assert torus.bandwidth(devices) == 6 * link(torus)


def cpu_slice(**chip):
  """Eight virtual devices that pass for a slice."""
  slice_ = chips.parse_slice("v5e:2x4")
  devices = tuple(jax.devices())
  return dataclasses.replace(
      slice_, chip=dataclasses.replace(slice_.chip, **chip), devices=devices,
      places={d.id: (i // 4, i % 4) for i, d in enumerate(devices)})


def tiny_generation(cache=512, **changes):
  config = config_lib.read_model(ROOT / "configs" / "tiny.py")
  settings = Settings(height=64, width=64, think_limit=20, **{"steps": 4} | changes)
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
  return {p.name: p for p in programs.generation_programs(config, settings, 8, cache, mesh)}


def test_an_estimate_says_memory_work_and_traffic_of_one_chip():
  program = tiny_generation()["append_text"]
  found = plan.estimate(program, cpu_slice())
  cache = 2 * 2 * 2 * 512 * 16 * 4  # k and v, layers, rows of a chip, slots, one head, float32
  assert found.arguments > cache
  assert found.peak >= found.arguments + found.temporaries
  needed = program.cases[0].needed_flops / 8
  assert needed <= found.work["flops"] < 2 * needed
  assert found.seconds["compute"] == found.work["flops"] / 197e12
  assert found.utilisation == pytest.approx(needed / 197e12 / max(found.seconds.values()))
  assert {key[1] for key in found.traffic if key[0] == "sent"} >= {"all-gather"}
  assert found.seconds["ICI"] > 0


def test_the_train_step_is_planned_with_the_batch_that_training_has():
  settings = train_settings.load(
      f"{ROOT}/configs/irgl.py:tiny",
      ["data.path=-", "data.rows=8", "data.accumulate=2"])
  mesh = sharding.make_mesh({"fsdp": 8}, jax.devices())
  program = programs.train_program(settings, "stage1", mesh)
  with jax.set_mesh(mesh):
    _, state, batch, _ = (None, *program.trace().args_info[0][-3:])
  sizes = settings.stage1.sizes
  assert batch.text_ids.shape == (2, 8, sizes.und)
  assert batch.text_place.shape == (2, 8, sizes.text)
  assert batch.vit_patches.shape[:3] == (2, 8, sizes.vit)
  assert all(x.donated for x in jax.tree.leaves(state))


def test_what_does_not_fit_is_said_with_a_hint():
  program = tiny_generation()["append_text"]
  slice_ = cpu_slice()
  e = plan.Estimate(program, 15 * chips.GIB, 1 * chips.GIB, 14 * chips.GIB,
                    programs.Case("a case", {}, 4e12), collections.Counter(flops=1e12),
                    seconds={"compute": 2.0, "HBM": 1.0, "ICI": 0.5}, utilisation=0.41)
  fits = plan.report([e], slice_, headroom=0.05)
  assert "DOES NOT FIT" not in fits and "bound by compute: 2 s" in fits and "50%" in fits
  assert "append_text, a case" in fits and "41%" in fits
  tight = plan.report([e], slice_, headroom=0.1)
  assert "needs 15.00 GiB of the 16 GiB" in tight and "0.60 GiB too many" in tight
  assert "--cache" in tight


def test_a_program_that_the_compiler_refuses_for_memory_is_an_estimate():
  def refused():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space "
                                     "hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.")
  program = dataclasses.replace(tiny_generation()["think"], trace=refused)
  found = plan.estimate(program, cpu_slice())
  assert found.peak == 20.5 * chips.GIB
  assert "DOES NOT FIT: think needs at least 20.50 GiB" in plan.report([found], cpu_slice(), 0.1)


def test_a_program_that_does_not_compile_for_another_reason_is_an_error():
  def broken():
    raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")
  program = dataclasses.replace(tiny_generation()["think"], trace=broken)
  with pytest.raises(ValueError, match="think does not compile: INTERNAL"):
    plan.estimate(program, cpu_slice())


def test_kernels_on_a_mesh_count_for_all_devices():
  """Rows on the axis `data`, heads on `tensor`; the ViT and the cache have shares of their own."""
  settings = train_settings.load(f"{ROOT}/configs/irgl.py:tiny", [
      "data.path=-", "data.rows=8", "model.attention=kernel"])
  count = lambda shape, devices: cost.count_work(programs.train_program(
      settings, "stage2", sharding.make_mesh(shape, devices)).trace().jaxpr)
  with jax.set_mesh(mesh := sharding.make_mesh({"data": 4, "tensor": 2}, jax.devices())):
    split = cost.count_work(programs.train_program(settings, "stage2", mesh).trace().jaxpr)
  one = count({"data": 1}, jax.devices()[:1])
  assert split["flops", "d_kv_kernel"] == one["flops", "d_kv_kernel"]
  assert split["calls", "d_kv_kernel"] == 8 * one["calls", "d_kv_kernel"]


def test_a_share_holds_for_rows_of_at_least_its_length():
  half, quarter = (0.5, 0.5), (0.25, 0.2)
  case = programs.Case("", {100: half, 200: quarter})
  assert [case.share(keys) for keys in (99, 100, 128, 200, 256)] == [
      (1, 1), half, half, quarter, quarter]


@pytest.mark.parametrize("visible", [None, 0.5])
def test_rows_of_training_count_at_the_share_that_a_kernel_visits(visible):
  def case(*overrides):
    settings = train_settings.load(f"{ROOT}/configs/irgl.py:tiny", [
        "data.path=-", "data.rows=8", *overrides])
    mesh = sharding.make_mesh({"fsdp": 4, "sequence": 2}, jax.devices())
    program = programs.train_program(settings, "stage2", mesh, visible)
    return program.attention, program.cases[0]

  forms, kernel = case("model.attention=kernel")
  assert forms == ("decoder kernel", "ViT kernel")
  measured, vit = programs.VISIBLE["stage2"]
  busiest = measured[2] if visible is None else visible * measured[2] / measured[1]
  assert kernel.visible == {896: pytest.approx([busiest] * 2), 128: (vit, vit)}
  forms, without = case()
  assert forms == ("decoder chunked (no kernel on cpu)", "ViT dense (a short row)")
  assert without.visible == {896: (1.0, 1.0), 128: (1.0, 1.0)}
  assert kernel.needed_flops < without.needed_flops


def test_generation_has_a_case_for_the_cache_that_is_in_use():
  config = config_lib.read_model(ROOT / "configs" / "tiny.py", ["model.attention=kernel"])
  mesh = sharding.make_mesh({"data": 8}, jax.devices())
  settings = Settings(height=64, width=64, think_limit=20, steps=4)
  made = {p.name: p for p in programs.generation_programs(config, settings, 8, 4096, mesh, 0.25)}
  full, used = made["denoise"].cases
  assert (full.visible, used.visible, used.label) == (
      {}, {4096: (0.25, 0.25)}, "25% of the cache")
  assert used.needed_flops < full.needed_flops


def test_forecasts_leave_the_flops_of_the_updates_in_which_the_decoder_runs():
  node = cpu_slice()
  full, fast = (plan.estimate(tiny_generation(steps=50, forecast=forecast)[name], node)
                for name, forecast in (("denoise", Forecast()),
                                       ("denoise_forecast", Forecast(interval=3))))
  assert full.program.unit == "49 updates under 3 views, an image a row"
  assert "49 updates, 19 with the decoder, under 3 views" in fast.program.unit
  ratio = fast.work["flops"] / full.work["flops"]
  assert 19 / 49 <= ratio < 19 / 49 * 1.05
  assert fast.case.needed_flops / full.case.needed_flops == pytest.approx(19 / 49)
  known = 3 * 3 * 2 * 16 * 64 * 4  # views, differences, rows of a chip, tokens, width, float32
  assert 0 < fast.arguments - full.arguments <= 2 * known


def test_heads_of_the_cache_are_repeated_for_a_mesh_with_more_devices():
  config = config_lib.read_model(ROOT / "configs" / "tiny.py", ["model.attention=kernel"])
  mesh = sharding.make_mesh({"data": 2, "tensor": 4}, jax.devices())
  settings = Settings(height=64, width=64, think_limit=20, steps=4)
  made = {p.name: p for p in programs.generation_programs(config, settings, 8, 1024, mesh)}
  with jax.set_mesh(mesh):
    context = made["append_text"].trace().args_info[0][1]
  assert context.k.shape[2] == 4 > config.llm.num_kv_heads


def test_views_see_their_own_parts_of_a_cache():
  """Blocks of 1024 slots: texts in one, an image over the ten from there on, a thought twice."""
  views = FULL, NO_TEXT, NO_IMAGE
  assert programs._second_round(9002, 16384, views) == (12 / 16, (11 + 10 + 3) / 3 / 16)
  assert programs._second_round(9002, 16384, (FULL,)) == (11 / 16, 11 / 16)
  assert programs._second_round(9002, 1024, (FULL,)) == (1, 1)


def estimated(program, seconds, peak=1.0):
  return [plan.Estimate(program, peak * chips.GIB, seconds={"compute": seconds})]


def test_the_best_mesh_is_the_fastest_that_fits():
  program, slice_ = tiny_generation()["think"], cpu_slice()
  made = {1: estimated(program, 1.0, peak=15), 2: estimated(program, 5.0),
          4: estimated(program, 4.0), 8: estimated(program, 3.0)}
  shapes = [{"tensor": n} for n in made]
  found, tried = meshes.best(shapes, lambda shape: made[shape["tensor"]], slice_, 0.1)
  assert found is made[2] and tried == [({"tensor": 1}, None), ({"tensor": 2}, 5.0)]
  found, _ = meshes.best(shapes[1:], lambda shape: made[shape["tensor"]], slice_, 0.1)
  assert found is made[4]
  none, tried = meshes.best(shapes[:1], lambda shape: made[shape["tensor"]], slice_, 0.1)
  assert none is made[1] and tried == [({"tensor": 1}, None)]
  with pytest.raises(ValueError, match="no mesh of v5e:2x4 suits"):
    meshes.best([], made.get, slice_, 0.1)


@pytest.mark.parametrize("name, first", [
    ("v5p:4x4x4", {"slice": 1, "data": 8, "fsdp": 8, "sequence": 1}),
    ("v5e:16x16", {"slice": 1, "data": 1, "fsdp": 64, "sequence": 4})])
def test_rows_are_split_only_if_they_are_few_and_weights_only_as_memory_asks(name, first):
  settings = train_settings.load(f"{ROOT}/configs/irgl.py", ["data.path=-"])
  assert next(meshes.training_meshes(settings, "stage2", chips.parse_slice(name))) == first


def test_generation_tries_tensor_first():
  llm = config_lib.read_model(ROOT / "configs" / "irgl.py").llm
  assert list(meshes.generation_meshes(llm, 8, chips.parse_slice("v5e:2x4"))) == [
      {"data": 2, "tensor": 4}, {"data": 4, "tensor": 2}, {"data": 8, "tensor": 1}]


@pytest.mark.parametrize("hbm_gib, status", [(16, 0), (1e-4, 1)])
def test_the_command_prints_the_table_and_its_status_says_whether_it_fits(
    monkeypatch, capsys, hbm_gib, status):
  monkeypatch.setattr(plan, "open_slice", lambda *_: cpu_slice(hbm_gib=hbm_gib))
  argv = ["plan", "--topology", "v5e:2x4", "--config", str(ROOT / "configs" / "tiny.py"),
          "--programs", "decode_pixels", "--size", "64", "--config.model.vae.ch=32"]
  assert commands.main(argv) == status
  out = capsys.readouterr().out
  assert out.startswith("v5e:2x4: 8 chips") and "| decode_pixels" in out
  assert ("DOES NOT FIT" in out) == bool(status)


def test_learning_from_rewards_is_planned_for_its_longest_rows(monkeypatch, capsys):
  monkeypatch.setattr(plan, "open_slice", lambda *_: cpu_slice())
  def estimate(program, _):
    with jax.set_mesh(program.mesh):
      assert program.trace().jaxpr.eqns
    return plan.Estimate(program, 1e12)

  monkeypatch.setattr(plan, "estimate", estimate)
  fields = {"llm.vocab_size": 320, "llm.hidden_size": 64, "llm.mlp_size": 112, "llm.num_layers": 1,
            "llm.num_heads": 4, "llm.num_kv_heads": 2, "vit.hidden_size": 48, "vit.mlp_size": 80,
            "vit.num_layers": 1, "vit.num_heads": 4, "vit.grid_size": 8, "max_latent_size": 8,
            "vae.ch": 32, "vae.ch_mult": (1, 1, 2, 2)}
  argv = ["plan", "--topology", "v5e:2x4", "--config", f"{ROOT}/configs/rl.py:large",
          "--programs", "rl", f"--config.rollout.generate={ROOT}/configs/generate_tiny.py",
          "--config.rollout.height=32", "--config.rollout.width=64", "--config.lora.rank=2",
          *(f"--config.model.{name}={value}" for name, value in fields.items())]
  assert commands.main(argv) == 1
  out = capsys.readouterr().out
  # A vector of the prompts, two thoughts of 47 tokens, two images of two noised copies, one seen.
  und = -(-(94 + 114 + 2 * 49 + 4 * 2 + 2 + 2 + 2 * 4) // 128) * 128
  assert re.search(rf"rl \(an update of 16 times 16 rows of {und + 5 * 8} tokens; mesh fsdp=8\)", out)
  assert "DOES NOT FIT: rl" in out and "--config.accumulate" in out
  assert commands.main([*argv, "--mesh", "auto"]) == 2
  assert "give axes for rl" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--programs", "train"], "says nothing about training"),
    (["--programs", "denoise", "--size", "100"], "not a positive multiple of 16"),
    (["--programs", "denoise", "--size", "64", "--mesh", "fsdp=3"], "needs 3 devices, but there"),
])
def test_a_plan_that_cannot_be_made_is_an_error(monkeypatch, capsys, argv, message):
  monkeypatch.setattr(plan, "open_slice", lambda *_: cpu_slice())
  config = str(ROOT / "configs" / "tiny.py")
  assert commands.main(["plan", "--topology", "v5e:2x4", "--config", config, *argv]) == 2
  assert message in capsys.readouterr().err


def test_a_program_by_its_old_name_is_accepted_with_a_note(capsys):
  assert plan_command._names("train,draw") == ("train", "denoise")
  assert "draw is now called denoise" in capsys.readouterr().err


def test_a_missing_libtpu_is_said_with_what_installs_it(monkeypatch, capsys):
  monkeypatch.setattr(plan, "libtpu", None)
  config = str(ROOT / "configs" / "tiny.py")
  assert commands.main(["plan", "--topology", "v5e:2x4", "--config", config]) == 2
  assert "pip install 'irg_jax[tpu]'" in capsys.readouterr().err


SMALL_ROWS = [f"--config.stage2.sizes.{name}={size}"
              for name, size in {"und": 160, "gen": 96, "text": 96, "vit": 24}.items()]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="libtpu is not installed (pip install 'irg_jax[tpu]')")
@pytest.mark.parametrize("programs, rows, forms", [
    (["train"], SMALL_ROWS, ["dense (a short row)"]),
    (["train", "append_text"], [], ["kernel", "kernel"])],
    ids=["short rows", "the rows of tiny"])
def test_the_tiny_model_compiles_for_a_real_slice(programs, rows, forms):
  done = subprocess.run(
      [sys.executable, "-m", "irg_jax", "plan", "--topology", "v5e:2x4", "--config",
       f"{ROOT}/configs/irgl.py:tiny", "--config.data.rows=8", *rows,
       "--programs", ",".join(programs), "--size", "128", "--cache", "1024"],
      cwd=ROOT, capture_output=True, text=True, timeout=600,
      # libtpu stops at flags of the CPU's compiler.
      env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
  assert done.returncode == 0, done.stderr
  parts = re.split("\ntrain stage2|\nappend_text", done.stdout)[1:]
  for part, form in zip(parts, forms, strict=True):
    assert f"decoder {form}" in part and "all-gather" in part
