"""`irg plan`: counting compiled programs, the arithmetic of slices, the report."""

import collections
import dataclasses
import importlib.util
import os
import subprocess
import sys
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from conftest import ROOT
from irg_jax import chips, commands, plan, sharding
from irg_jax import config as config_lib
from irg_jax.commands import plan as plan_command
from irg_jax.generate.settings import Settings
from irg_jax.model.kernels import gpu, tpu, visible
from irg_jax.plan import cost, meshes, programs
from irg_jax.train import settings as train_settings


@pytest.fixture(autouse=True)
def environment():
  """Undoes the changes of `chips.prepare_to_compile`."""
  with unittest.mock.patch.dict(os.environ):
    yield


def flops(function, *args):
  return cost.count_flops(jax.make_jaxpr(function)(*args))


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  w, x = np.ones((5, 16, 16), np.float32), np.ones((4, 16), np.float32)

  def nested(w, x):
    layer = lambda x, w: (x @ w, None)
    step = lambda i, x: jax.lax.scan(layer, x, w)[0]
    return jax.lax.fori_loop(0, 3, step, x)

  assert flops(jax.jit(nested), w, x) == (3 * 5 * 2 * 4 * 16 * 16, 0)


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
  x = np.ones((8, 8), np.float32)
  loop = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)
  assert flops(loop, x) == (2 * 8**3, 1)


def test_a_loop_that_data_may_end_early_counts_as_often_as_its_condition_allows():
  def loop(x, count):
    more = lambda state: (state[0] < 7) & (state[0] < count)
    return jax.lax.while_loop(more, lambda state: (state[0] + 1, state[1] @ state[1]), (0, x))[1]

  assert flops(loop, np.ones((8, 8), np.float32), 3) == (7 * 2 * 8**3, 0)


def test_a_conditional_counts_as_its_most_expensive_branch():
  x = np.ones((8, 8), np.float32)
  either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
  assert flops(either, x) == (2 * 2 * 8**3, 0)


def test_a_product_counts_its_batch_and_its_contracted_axes():
  a, b = np.ones((3, 4, 5, 6)), np.ones((3, 7, 6, 5))
  assert flops(lambda a, b: jnp.einsum("bmij,bnji->bmn", a, b), a, b) == (2 * 3 * 4 * 7 * 5 * 6, 0)


@pytest.mark.parametrize("stride, padding, dilation, spread, out", [
    (1, "SAME", 1, 1, 9), (2, ((0, 1), (0, 1)), 1, 1, 4), (1, "VALID", 2, 1, 5),
    (1, ((2, 2), (2, 2)), 1, 2, 19)])
def test_a_convolution_counts_its_kernel_for_every_result(stride, padding, dilation, spread, out):
  x, w = np.ones((2, 9, 9, 3), np.float32), np.ones((3, 3, 3, 5), np.float32)
  convolve = lambda x, w: jax.lax.conv_general_dilated(
      x, w, (stride, stride), padding, lhs_dilation=(spread, spread),
      rhs_dilation=(dilation, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert flops(convolve, x, w) == (2 * (2 * out * out * 5) * (3 * 3 * 3), 0)


def test_a_convolution_in_groups_counts_the_channels_of_one_group():
  x, w = np.ones((1, 8, 8, 6)), np.ones((3, 3, 2, 9))
  convolve = lambda x, w: jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", feature_group_count=3, dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert flops(convolve, x, w) == (2 * (8 * 8 * 9) * (3 * 3 * 2), 0)


def test_a_backward_pass_counts_what_it_recomputes():
  x, w = np.ones((4, 16), np.float32), np.ones((16, 16), np.float32)
  loss = lambda x, w: jnp.sum(jnp.sin(x @ w))
  once = 2 * 4 * 16 * 16
  assert flops(jax.grad(loss, (0, 1)), x, w) == (3 * once, 0)
  assert flops(jax.grad(jax.checkpoint(loss), (0, 1)), x, w) == (4 * once, 0)


def test_a_function_with_its_own_derivative_counts_both_passes():
  @jax.custom_vjp
  def double(x, w):
    return x @ w

  double.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, d: (d @ kept[1].T @ kept[1], None))
  x, w = np.ones((4, 16), np.float32), np.ones((16, 16), np.float32)
  once = 2 * 4 * 16 * 16
  assert flops(double, x, w) == (once, 0)
  assert flops(jax.grad(lambda x, w: jnp.sum(double(x, w))), x, w) == (3 * once, 0)


def test_what_is_split_over_devices_counts_whole():
  mesh = sharding.make_mesh({"fsdp": 8}, jax.devices())
  rows = PartitionSpec("fsdp")
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, rows))
  w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
  by_hand = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()),
                          out_specs=rows)
  for product in (lambda x, w: x @ w, by_hand):
    assert cost.count_flops(jax.jit(product).trace(x, w).jaxpr) == (2 * 64 * 32 * 32, 0)


def test_collectives_count_bytes_calls_and_their_group():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place(None, "fsdp"))
  w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=place("fsdp", None))
  step = lambda i, x, w: jax.lax.with_sharding_constraint(
      jax.lax.with_sharding_constraint(x @ w, place()), place(None, "fsdp"))
  loop = lambda x, w: jax.lax.fori_loop(0, 6, lambda i, x: step(i, x, w), x)
  found = cost.count_traffic(jax.jit(loop).lower(x, w).compile().as_text())
  group = (0, 2, 4, 6)
  assert set(found) == {"hbm", ("sent", "all-reduce", group), ("calls", "all-reduce", group)}
  assert found["calls", "all-reduce", group] == 6
  assert found["sent", "all-reduce", group] == 6 * 2 * 3 / 4 * (64 * 32 * 4)


@pytest.mark.parametrize("text, group", [
    ("replica_groups={{0,2},{1,3}}", (0, 2)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
    ("source_target_pairs={{0,0},{1,5},{2,3}}", (1, 5)),
    ("replica_groups={}", tuple(range(8)))])
def test_every_way_to_write_a_group_of_devices_is_read(text, group):
  assert cost.device_group(f", channel_id=1, {text}, dimensions={{0}}", 8) == group


# Like a program for a TPU: a gather that is spread over fusions of an inner loop, arrays in
# fast memory, a stack of weights of which a fusion reads one slice.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%slice_one (stack: f32[10,1024], number: s32[]) -> f32[1,1024] {
  %stack = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %number = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %one = f32[1,1024]{1,0:T(8,128)} dynamic-slice(%stack, %number, %zero)
}

%begin (part: f32[1,256]) -> f32[1,1024] {
  %part = f32[1,256]{1,0:T(8,128)} parameter(0)
  ROOT %whole.1 = f32[1,1024]{1,0:T(8,128)} all-gather(%part), channel_id=7, \
replica_groups=[1,4]<=[4], dimensions={1}, use_global_device_ids=true
}

%continue (part.2: f32[1,256]) -> f32[1,1024] {
  %part.2 = f32[1,256]{1,0:T(8,128)} parameter(0)
  ROOT %whole.2 = f32[1,1024]{1,0:T(8,128)} all-gather(%part.2), channel_id=7, \
replica_groups=[1,4]<=[4], dimensions={1}, use_global_device_ids=true
}

%inner_body (state.1: (s32[], f32[1,256])) -> (s32[], f32[1,256]) {
  %state.1 = (s32[]{:T(128)}, f32[1,256]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %part.3 = f32[1,256]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %piece = f32[1,1024]{1,0:T(8,128)S(1)} fusion(%part.3), kind=kCustom, calls=%continue
  ROOT %next.1 = (s32[]{:T(128)}, f32[1,256]{1,0}) tuple(%i.1, %part.3)
}

%inner_condition (state.2: (s32[], f32[1,256])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[1,256]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %more.2 = pred[]{:T(512)} compare(%i.2, %three), direction=LT
}

%body (state: (s32[], f32[10,1024], f32[1,256], s32[])) -> (s32[], f32[10,1024], f32[1,256], \
s32[]) {
  %state = (s32[]{:T(128)}, f32[10,1024]{1,0}, f32[1,256]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack.1 = f32[10,1024]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %part.4 = f32[1,256]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %bound.1 = s32[]{:T(128)} get-tuple-element(%state), index=3
  %layer = f32[1,1024]{1,0:T(8,128)S(1)} fusion(%stack.1, %i), kind=kLoop, calls=%slice_one
  %started = f32[1,1024]{1,0:T(8,128)S(1)} fusion(%part.4), kind=kCustom, calls=%begin
  %zero.1 = s32[]{:T(128)} constant(0)
  %tuple.1 = (s32[]{:T(128)}, f32[1,256]{1,0}) tuple(%zero.1, %part.4)
  %inner = (s32[]{:T(128)}, f32[1,256]{1,0}) while(%tuple.1), condition=%inner_condition, \
body=%inner_body
  ROOT %next = (s32[]{:T(128)}, f32[10,1024]{1,0}, f32[1,256]{1,0}, s32[]{:T(128)}) \
tuple(%i, %stack.1, %part.4, /*index=3*/%bound.1)
}

%condition (state.3: (s32[], f32[10,1024], f32[1,256], s32[])) -> pred[] {
  %state.3 = (s32[]{:T(128)}, f32[10,1024]{1,0}, f32[1,256]{1,0}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%state.3), index=0
  %bound.3 = s32[]{:T(128)} get-tuple-element(%state.3), index=3
  ROOT %more = pred[]{:T(512)} compare(%i.3, %bound.3), direction=LT
}

ENTRY %main (weights: f32[10,1024], part.5: f32[1,256]) -> f32[10,1024] {
  %weights = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %part.5 = f32[1,256]{1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %ten = s32[]{:T(128)} constant(10)
  %tuple = (s32[]{:T(128)}, f32[10,1024]{1,0}, f32[1,256]{1,0}, s32[]{:T(128)}) \
tuple(%start, %weights, %part.5, /*index=3*/%ten)
  %loop = (s32[]{:T(128)}, f32[10,1024]{1,0}, f32[1,256]{1,0}, s32[]{:T(128)}) \
while(%tuple), condition=%condition, body=%body
  ROOT %result = f32[10,1024]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_gather_that_overlaps_with_an_inner_loop_counts_once_each_time_it_begins():
  found = cost.count_traffic(TPU_PROGRAM)
  del found["hbm"]
  assert found == {("calls", "all-gather", (0, 1, 2, 3)): 10,
                   ("sent", "all-gather", (0, 1, 2, 3)): 10 * 3 * 1024}


def test_memory_counts_what_is_read_of_a_stack_and_leaves_fast_memory_out():
  one_slice, number, part = 4096, 4, 1024
  inner = 3 * part + 3 * (number + number + 1)  # the condition compares two numbers
  outer = one_slice + number + part + (number + number + 1)
  # Results are on the chip, so that only operands count.
  assert cost.count_traffic(TPU_PROGRAM)["hbm"] == 10 * (inner + outer)


def test_a_loop_that_counts_by_two_runs_half_as_often():
  """XLA unrolls its loops over the parts of a product that it gathers meanwhile."""
  step = "%i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0"
  unrolled = TPU_PROGRAM.replace(step, """%was = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %i.1 = s32[]{:T(128)S(6)} add(%was, %two)""")
  assert unrolled != TPU_PROGRAM
  inner = 2 * 1024 + 2 * (4 + 4 + 1) + 2 * (4 + 4)
  assert cost.count_traffic(unrolled)["hbm"] == 10 * (inner + 4096 + 4 + 1024 + (4 + 4 + 1))


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    cost.count_traffic("HloModule nothing")


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


def tiny_generation(cache=512):
  config = config_lib.read_model(ROOT / "configs" / "tiny.py")
  settings = Settings(height=64, width=64, think_limit=20, steps=4)
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


def kernel_jaxpr(module, sizes, gradient=True):
  """A kernel's passes over rows [B 2, W 3, K 2, J 4, T 256, H 128], 512 keys."""
  def loss(q, k, v, queries, keys):
    return jnp.sum(module.attention(q, k, v, visible.prepare(queries, keys, *sizes, 128))[0])

  shape = lambda *lengths, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(lengths, dtype)
  q, kv = shape(2, 3, 2, 4, 256, 128), shape(2, 2, 512, 128)
  words = shape(2, 3, 3, 256, dtype=jnp.int32), shape(2, 3, 2, 512, dtype=jnp.int32)
  function = jax.grad(loss, (0, 1, 2)) if gradient else loss
  return jax.make_jaxpr(function)(q, kv, kv, *words)


@pytest.mark.parametrize("module, sizes", [(tpu, (128, 256)), (gpu, (128, 64))])
def test_kernels_count_the_products_of_the_visible_blocks(module, sizes):
  product = 2 * (2 * 3 * 8 * 256 * 512 * 128)  # one product of all scores
  found = cost.count_work(kernel_jaxpr(module, sizes))
  assert [found["flops", name] / product for name in (
      "forward_kernel", "d_q_kernel", "d_kv_kernel")] == [2, 3, 4]
  assert found["flops"] == 9 * product
  half = cost.count_work(kernel_jaxpr(module, sizes), {512: 0.5}.__getitem__)
  assert half["flops"] == 4.5 * product
  assert half["calls", "d_q_kernel"] == 1


def test_a_kernel_moves_what_belongs_to_queries_once_and_keys_for_every_visible_pair():
  lane = 4 * 128  # bytes; what is narrower is padded to lanes
  q, lse = 2 * 3 * 8 * 256 * 128 * 2, 2 * 3 * 8 * 256 * 4
  query_words = 2 * (2 * 3 * 256) * lane  # for each of two heads
  # Of four pairs of blocks in a row, two are visible: for each of two rows and two heads.
  pair = 2 * (256 * 128 * 2) + 3 * 2 * 256 * 4
  moved = cost.count_work(kernel_jaxpr(tpu, (128, 256), gradient=False), lambda keys: 0.5)
  assert moved["hbm", "forward_kernel"] == 2 * q + lse + query_words + 2 * 2 * 2 * pair


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
  case = programs.Case("", {100: 0.5, 200: 0.25})
  assert [case.share(keys) for keys in (99, 100, 128, 200, 256)] == [1, 0.5, 0.5, 0.25, 0.25]


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
  assert kernel.visible == {896: pytest.approx(busiest), 128: vit}
  forms, without = case()
  assert forms == ("decoder chunked (no kernel on cpu)", "ViT dense (a short row)")
  assert without.visible == {896: 1.0, 128: 1.0}
  assert kernel.needed_flops < without.needed_flops


def test_generation_has_a_case_for_the_cache_that_is_in_use():
  config = config_lib.read_model(ROOT / "configs" / "tiny.py", ["model.attention=kernel"])
  mesh = sharding.make_mesh({"data": 8}, jax.devices())
  settings = Settings(height=64, width=64, think_limit=20, steps=4)
  made = {p.name: p for p in programs.generation_programs(config, settings, 8, 4096, mesh, 0.25)}
  full, used = made["denoise"].cases
  assert (full.visible, used.visible, used.label) == ({}, {4096: 0.25}, "25% of the cache")
  assert used.needed_flops < full.needed_flops


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
    ("v5p:4x4x4", {"data": 8, "fsdp": 8, "sequence": 1}),
    ("v5e:16x16", {"data": 1, "fsdp": 64, "sequence": 4})])
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
  monkeypatch.setattr(plan, "open_slice", lambda text: cpu_slice(hbm_gib=hbm_gib))
  argv = ["plan", "--topology", "v5e:2x4", "--config", str(ROOT / "configs" / "tiny.py"),
          "--programs", "decode_pixels", "--size", "64", "--config.model.vae.ch=32"]
  assert commands.main(argv) == status
  out = capsys.readouterr().out
  assert out.startswith("v5e:2x4: 8 chips") and "| decode_pixels" in out
  assert ("DOES NOT FIT" in out) == bool(status)


@pytest.mark.parametrize("argv, message", [
    (["--programs", "train"], "says nothing about training"),
    (["--programs", "denoise", "--size", "100"], "not a positive multiple of 16"),
    (["--programs", "denoise", "--size", "64", "--mesh", "fsdp=3"], "needs 3 devices, but there are 8"),
])
def test_a_plan_that_cannot_be_made_is_an_error(monkeypatch, capsys, argv, message):
  monkeypatch.setattr(plan, "open_slice", lambda text: cpu_slice())
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


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="libtpu is not installed (pip install 'irg_jax[tpu]')")
def test_the_tiny_model_compiles_for_a_real_slice():
  done = subprocess.run(
      [sys.executable, "-m", "irg_jax", "plan", "--topology", "v5e:2x4", "--config",
       f"{ROOT}/configs/irgl.py:tiny", "--config.data.rows=8",
       "--programs", "train,append_text", "--size", "128", "--cache", "1024"],
      cwd=ROOT, capture_output=True, text=True, timeout=600,
      # libtpu stops at flags of the CPU's compiler.
      env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
  assert done.returncode == 0, done.stderr
  assert "| train stage2" in done.stdout and "| append_text" in done.stdout
  assert "all-gather" in done.stdout
