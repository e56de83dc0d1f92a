"""The kernels of attention for TPUs, compiled on a machine without one."""

import importlib.util
import os
import subprocess
import sys

from conftest import ROOT
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                reason="libtpu is not installed (pip install 'irg_jax[tpu]')")

# Rows of a slice's chips, attending to themselves; in a process of its own, since libtpu stops at
# flags of the CPU's compiler.
PROGRAM = """
import sys
from irg_jax import chips
chips.prepare_to_compile()
import jax
import jax.numpy as jnp
from irg_jax import plan, sharding
from irg_jax.model.attention import KeyValues, attend
from irg_jax.tokens import Tokens

slice_, T, N, K, H = sys.argv[1], *map(int, sys.argv[2:])
devices = plan.open_slice(slice_).devices
mesh = sharding.make_mesh({"fsdp": len(devices)}, devices)
placed = lambda shape, axes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.NamedSharding(
        mesh, sharding.partition_spec(shape, axes, mesh)))
B = len(devices)
q = placed((B, T, N, H), ("batch", "length", "heads", None))
kv = placed((B, K, T, H), ("batch", "heads", None, None))
tokens = Tokens(*[placed((B, T), ("batch", "length"), jnp.int32)] * 4)

def gradients(q, k, v, tokens):
  attended = lambda *qkv: attend(
      qkv[0], tokens, [KeyValues(*qkv[1:], tokens)], implementation="kernel")
  out, back = jax.vjp(attended, q, k, v)
  return back(out)

with jax.set_mesh(mesh):
  text = jax.jit(gradients).lower(q, kv, kv, tokens).compile().as_text()
assert text.count("tpu_custom_call") >= 3, "forward, d_q, d_k with d_v"
"""


def compile_for(slice_, *shape):
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run([sys.executable, "-c", PROGRAM, slice_, *map(str, shape)], cwd=ROOT,
                        env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("heads", [4, pytest.param(14, marks=pytest.mark.long)])
def test_both_passes_compile_for_a_tpu(heads):
  compile_for("v5e:2x4", 300, heads, 2, 128)


@pytest.mark.long
@pytest.mark.parametrize("tokens", [32768, 36608])
@pytest.mark.parametrize("slice_", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_rows_of_the_large_model_compile(slice_, tokens):
  compile_for(slice_, tokens, 28, 4, 128)


@pytest.mark.long
@pytest.mark.parametrize("slice_", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_patches_of_the_vit_compile(slice_):
  compile_for(slice_, 8192, 16, 16, 72)
