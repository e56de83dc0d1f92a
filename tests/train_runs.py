"""Tiny runs of `irg train`: data, flags, processes, and readers of their logs."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import irgl_rows
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "irgl.py"
MODES = ("initial_full_learning", "improving_full_learning")
OTHERS = ("initial_thinking_understanding_learning", "initial_thinking_generation_learning",
          "improving_thinking_understanding_learning", "improving_thinking_generation_learning")
MESH = {"fsdp": 4, "tensor": 2}  # the eight devices of the tests
ROWS = 16  # good rows of each mode; one more is bad

# Not by one override each: those take their time.
_CONFIG = f"""
import runpy


def get_config():
  config = runpy.run_path({str(CONFIG)!r})["get_config"]("tiny")
  model = config.model
  model.llm.update(num_layers=1, hidden_size=32, mlp_size=48)
  model.vit.update(num_layers=1, hidden_size=32, mlp_size=32, num_heads=2)
  model.vae.ch_mult = (1, 1, 1, 1)
  config.data.update(path="DATA", rows=4, bins=2, max_rejected=0.1)
  config.data.vae_transform.max_size, config.data.vit_transform.max_size = 32, 28
  config.data.held_out = 0.0
  config.update(checkpoint_every=2, log_every=2, keep=2, eval_every=0)
  config.mesh.update(MESH)
  for stage in (config.stage1, config.stage2):
    stage.update(steps=4, warmup_steps=0, learning_rate=1e-3)
    stage.sizes.update(und=160, gen=24, vit=24, text=96, samples=3)
    for mode in {OTHERS!r}:
      stage.mixture[mode] = 0.0
  return config
"""


def write_data(root: pathlib.Path) -> pathlib.Path:
  """A published folder of two modes."""
  for mode in MODES:
    rows = []
    for i in range(ROWS):
      size = (32, 32) if i % 4 else (32, 64)
      shown = [irgl_rows.image_part(irgl_rows.image(seed=i, size=size), need_vae=True,
                                    need_vit=True)]
      rows.append(irgl_rows.turns(
          *(shown if mode.startswith("improving") else []), irgl_rows.text("t" * (5 + i)),
          irgl_rows.image_part(irgl_rows.image(seed=100 + i, size=size), need_loss=True),
          prompt=f"prompt {i}"))
    irgl_rows.write_mode(root, [*rows, "[{"], mode)
  return root


def flags(data, out, mesh=None, **fields) -> list[str]:
  """Arguments of `irg` for a small run; `stage1__steps=3` stands for --config.stage1.steps=3.

  Args:
    mesh: sizes by axis.
  """
  config = data / f"config{'-'.join(f'{k}{v}' for k, v in (mesh or {}).items())}.py"
  config.write_text(_CONFIG.replace("DATA", str(data)).replace("MESH", repr(mesh or {})))
  return ["train", "--config", str(config), "--out", str(out),
          *(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())]


def process(arguments, cache, *, devices=1, program=("-m", "irg_jax")) -> subprocess.Popen:
  """Starts `irg` in a process, see `environment`."""
  return subprocess.Popen([sys.executable, *program, *arguments], env=environment(cache, devices),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def environment(cache, devices) -> dict:
  """Variables of a process. Programs are compiled once for all that share `cache`."""
  return os.environ | {
      "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_ENABLE_COMPILATION_CACHE": "true"}


def two_processes(arguments, cache, programs=(("-m", "irg_jax"),) * 2,
                  devices=4) -> list[subprocess.Popen]:
  """Starts one run as two processes of so many devices each, over loopback."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  flags = [*arguments, "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2",
           "--process-id"]
  return [process([*flags, str(i)], cache, devices=devices, program=program)
          for i, program in enumerate(programs)]


def lines(out) -> list[dict]:
  """The JSON lines of a run."""
  return [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]


def steps(out) -> dict:
  """{(stage, step): line of that step}; no step may appear twice."""
  found = {}
  for line in lines(out):
    if "loss" in line:
      place = line["stage"], line["step"]
      assert place not in found, f"{place} appears twice"
      found[place] = line
  return found


def samples(out) -> list:
  """The sample ids of all steps, in order."""
  return [line["samples"] for line in steps(out).values()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """Compilation cache of this process and of those that it starts."""
  folder = tmp_path_factory.mktemp("cache")
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
           "jax_enable_compilation_cache")
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(folder), 0, True)):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield folder
  for name, value in zip(names, before):
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))
