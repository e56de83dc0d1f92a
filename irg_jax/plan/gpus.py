"""NVIDIA GPUs to compile for on a machine that has none.

`files/` describes each kind to XLA, a `GpuTargetConfigProto` in text form: compute capability,
memory, shared memory, caches. XLA tunes nothing without the device itself.
"""

import pathlib

from jax.experimental import topologies

_FILES = pathlib.Path(__file__).parent / "files"

KINDS = tuple(sorted(path.stem for path in _FILES.glob("*.txtpb")))


def devices(kind: str, count: int) -> tuple:
  """Devices of JAX for `count` GPUs in one node, to compile for.

  Call `chips.prepare_to_compile` before JAX is imported: where the CPU is the platform of the
  process, JAX's plugin for CUDA needs none of CUDA's libraries.

  Raises:
    ValueError: unknown kind; the plugin is not installed.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown GPU {kind!r}; known: {', '.join(KINDS)}")
  try:
    node = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}",  # groups of nodes, nodes, GPUs
        target_config=(_FILES / f"{kind}.txtpb").read_text())
  except NotImplementedError as e:
    raise ValueError("compiling for a GPU needs JAX's plugin for CUDA, which is not installed: "
                     "pip install 'irg_jax[cuda]' (no GPU is needed)") from e
  return tuple(node.devices)
