"""Cost of a program: FLOPs of a jaxpr, bytes of a compiled text, attention kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from irg_jax import sharding
from irg_jax.model.kernels import fused, gpu, tpu, visible
from irg_jax.model.kernels.blockwise import ATTENTION_OUTPUTS
from irg_jax.plan import cost


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
  assert flops(jax.value_and_grad(loss, (0, 1)), x, w) == (3 * once, 0)
  assert flops(jax.value_and_grad(jax.checkpoint(loss), (0, 1)), x, w) == (4 * once, 0)


def test_a_function_with_its_own_derivative_counts_both_passes():
  @jax.custom_vjp
  def double(x, w):
    return x @ w

  double.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, d: (d @ kept[1].T @ kept[1], None))
  x, w = np.ones((4, 16), np.float32), np.ones((16, 16), np.float32)
  once = 2 * 4 * 16 * 16
  assert flops(double, x, w) == (once, 0)
  assert flops(jax.value_and_grad(lambda x, w: jnp.sum(double(x, w))), x, w) == (3 * once, 0)


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


def kernel_jaxpr(module, sizes, gradient=True, keep=None):
  """A kernel's passes over rows [B 2, W 3, K 2, J 4, T 256, H 128], 512 keys."""
  def loss(q, k, v, queries, keys):
    attend = lambda *x: jnp.sum(fused.attention(
        module, *x, visible.prepare(queries, keys, *sizes, 128))[0].astype(jnp.float32) ** 2)
    if keep is not None:
      attend = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(*keep))
    return attend(q, k, v)

  shape = lambda *lengths, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(lengths, dtype)
  q, kv = shape(2, 3, 2, 4, 256, 128), shape(2, 2, 512, 128)
  words = shape(2, 3, 3, 256, dtype=jnp.int32), shape(2, 3, 2, 512, dtype=jnp.int32)
  function = jax.value_and_grad(loss, (0, 1, 2)) if gradient else loss
  return jax.make_jaxpr(function)(q, kv, kv, *words)


@pytest.mark.parametrize("module, sizes", [(tpu, (128, 256)), (gpu, (128, 64))])
def test_kernels_count_the_products_of_the_visible_blocks(module, sizes):
  product = 2 * (2 * 3 * 8 * 256 * 512 * 128)  # one product of all scores
  found = cost.count_work(kernel_jaxpr(module, sizes))
  assert [found["flops", name] / product for name in (
      "forward_kernel", "d_q_kernel", "d_kv_kernel")] == [2, 3, 4]
  assert found["flops"] == 9 * product
  half = cost.count_work(kernel_jaxpr(module, sizes), {512: (0.5, 0.25)}.__getitem__)
  # The kernel for TPUs skips the views that see nothing of a block that another one sees.
  assert half["flops"] == (4.5 if module is gpu else 2.25) * product
  assert half["calls", "d_q_kernel"] == 1


def test_a_kernel_moves_what_belongs_to_queries_once_and_keys_for_every_visible_pair():
  lane = 4 * 128  # bytes; what is narrower is padded to lanes
  q, lse = 2 * 3 * 8 * 256 * 128 * 2, 2 * 3 * 8 * 256 * 4
  query_words = 2 * (2 * 3 * 256) * lane  # for each of two heads
  # Of four pairs of blocks in a row, two are visible: for each of two rows and two heads.
  pair = 2 * (256 * 128 * 2) + 3 * 2 * 256 * 4
  moved = cost.count_work(kernel_jaxpr(tpu, (128, 256), gradient=False), lambda keys: (0.5, 0.3))
  assert moved["hbm", "forward_kernel"] == 2 * q + lse + query_words + 2 * 2 * 2 * pair


def test_a_kernel_that_nobody_needs_does_not_count():
  """Of a recomputed forward pass whose results were kept, JAX leaves the kernel in the program."""
  jaxpr = kernel_jaxpr(tpu, (128, 256), keep=ATTENTION_OUTPUTS)
  assert cost.count_work(jaxpr)["calls", "forward_kernel"] == 1
  assert cost.count_work(kernel_jaxpr(tpu, (128, 256), keep=()))["calls", "forward_kernel"] == 2


def test_an_asynchronous_slice_moves_the_slice():
  program = TPU_PROGRAM.replace("""  %started =""", """  %sliced = ((f32[10,1024]{1,0}), \
f32[1,1024]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%stack.1), slice={[0:1], [0:1024]}
  %started =""")
  added = cost.count_traffic(program)["hbm"] - cost.count_traffic(TPU_PROGRAM)["hbm"]
  assert added == 10 * 4096
