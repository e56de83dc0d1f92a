"""The kernels of attention for NVIDIA GPUs, compiled on a machine without one."""

import jax
import jax.numpy as jnp
import pytest

from irg_jax import sharding
from irg_jax.model.attention import KeyValues, attend
from irg_jax.plan import gpus
from irg_jax.tokens import Tokens

ROW, VIT, SMALL = (36608, 28, 4, 128), (8192, 16, 16, 72), (1024, 4, 2, 64)


@pytest.fixture(scope="module", autouse=True)
def plugin():
  pytest.importorskip("jax_plugins.xla_cuda12", reason="compiling for a GPU needs JAX's plugin for "
                      "CUDA: pip install 'irg_jax[cuda]'")


def compiled(kind, shape, dtype, backward, mesh=None, rows=1):
  """Attention of rows to themselves, compiled for one GPU, or for the 8 of a mesh."""
  T, N, K, H = shape
  mesh = sharding.make_mesh(mesh, gpus.devices(kind, 8 if mesh else 1))
  placed = lambda *shape, axes, dtype=dtype: jax.ShapeDtypeStruct(
      shape, dtype, sharding=jax.sharding.NamedSharding(
          mesh, sharding.partition_spec(shape, axes, mesh)))
  q_BTNH = placed(rows, T, N, H, axes=("batch", "length", "heads", None))
  k_BKSH = placed(rows, K, T, H, axes=("batch", "heads", None, None))
  tokens = Tokens(*[placed(rows, T, axes=("batch", "length"), dtype=jnp.int32)] * 4)

  def output(q_BTNH, k_BKSH, v_BKSH, tokens):
    assert sharding.platform() == "gpu"
    return attend(q_BTNH, tokens, [KeyValues(k_BKSH, v_BKSH, tokens)], implementation="kernel")

  def gradients(q_BTNH, k_BKSH, v_BKSH, tokens):
    out_BTNH, back = jax.vjp(lambda *x: output(*x, tokens), q_BTNH, k_BKSH, v_BKSH)
    return back(out_BTNH)

  with jax.set_mesh(mesh):
    return jax.jit(gradients if backward else output).lower(
        q_BTNH, k_BKSH, k_BKSH, tokens).compile()


def kernels(program):
  """Number of Triton's kernels in a compiled program."""
  return program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"')


def test_attention_and_its_gradients_compile_for_a_gpu():
  program = compiled("h100", SMALL, jnp.bfloat16, backward=True)
  assert kernels(program) == 3  # forward, d_q, d_k with d_v
  assert program.memory_analysis().temp_size_in_bytes < 8 * 2**20  # less than one head's scores


def test_an_unknown_gpu_is_an_error():
  with pytest.raises(ValueError, match="unknown GPU 'h10'; known: a100, a6000, h100"):
    gpus.devices("h10", 1)


@pytest.mark.long
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("shape", [ROW, VIT], ids=["row", "vit"])
@pytest.mark.parametrize("kind", gpus.KINDS)
def test_long_rows_compile_in_memory_linear_in_their_length(kind, shape, dtype, backward):
  if (kind, dtype, backward) == ("a6000", jnp.float32, True):
    pytest.skip("known limit: needs more shared memory than an A6000 has; docs/weights.md says so")
  program = compiled(kind, shape, dtype, backward)
  assert kernels(program) == (3 if backward else 1)
  assert program.memory_analysis().temp_size_in_bytes < 1.2 * 2**30


@pytest.mark.long
@pytest.mark.parametrize("mesh", [
    {"fsdp": 8}, {"data": 2, "tensor": 4}, {"sequence": 4, "fsdp": 2}], ids=str)
def test_each_gpu_of_a_mesh_runs_the_kernels_on_its_part(mesh):
  program = compiled("h100", ROW, jnp.bfloat16, backward=True, mesh=mesh, rows=8)
  assert kernels(program) == 3
