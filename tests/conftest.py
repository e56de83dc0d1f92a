"""Eight virtual CPU devices; the recorded vectors and their checkpoints as fixtures."""

import dataclasses
import functools
import gc
import json
import os
import pathlib

# A quarter of the compile time: tests compile far more than they compute. IRG_OPTIMIZED=1 leaves
# XLA as users run it (tests/test_optimized.py).
if os.environ.get("IRG_OPTIMIZED") != "1":
  os.environ["XLA_FLAGS"] = " ".join((
      os.environ.get("XLA_FLAGS", ""), "--xla_llvm_disable_expensive_passes=true",
      "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
      "--xla_cpu_parallel_codegen_split_count=1"))

# Tests keep no programs, and none in the user's folder; those that do say so (train_runs.py).
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import numpy as np
import pytest

import browser
from irg_jax import weights
from irg_jax.config import ModelConfig, SpecialTokens
from irg_jax.model.unified import UnifiedTransformer

jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(20_000, 10, 100)  # what is traced stays: looking through it again takes long

ROOT = pathlib.Path(__file__).resolve().parents[1]


def reference_root() -> pathlib.Path:
  """$IRG_REFERENCE, else the vectors that come with the tests."""
  return pathlib.Path(os.environ.get("IRG_REFERENCE", ROOT / "tests" / "data" / "reference"))


def reference_folders() -> list[pathlib.Path]:
  """Every folder of reference vectors, found by listing."""
  return sorted(p.parent for p in reference_root().rglob("reference.npz"))


class Reference:
  """One folder of vectors: arrays by name, JSON files by name."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._arrays = np.load(folder / "reference.npz")

  def __getitem__(self, name: str) -> np.ndarray:
    return self._arrays[name]

  def __contains__(self, name: str) -> bool:
    return name in self._arrays.files

  def names(self, prefix: str) -> list[str]:
    return [n for n in self._arrays.files if n.startswith(prefix)]

  def json(self, name: str):
    return json.loads((self.folder / name).read_text())


def pytest_generate_tests(metafunc):
  """A test that asks for `reference` runs once for every folder, or is skipped with the reason."""
  if "reference" not in metafunc.fixturenames:
    return
  folders = reference_folders()
  if folders:
    params = [pytest.param(f, id=f.name) for f in folders]
  else:
    reason = f"no reference vectors under {reference_root()} (set IRG_REFERENCE)"
    params = [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
  metafunc.parametrize("reference", params, indirect=True)


@pytest.fixture
def reference(request):
  return _open_reference(request.param)


_open_reference = functools.cache(Reference)


@pytest.fixture(scope="module")
def on_one_device():
  """A file's meshes and commands see one of the eight devices, where all takes half the time."""
  first = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    for name in ("devices", "local_devices"):
      patch.setattr(jax, name, lambda *_: first)
    patch.setattr(jax, "device_count", lambda *_: 1)
    yield


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
  """The checkpoint that belongs to a folder of vectors."""

  config: ModelConfig
  params: dict
  special: SpecialTokens

  @property
  def model(self):
    return UnifiedTransformer(self.config)


@functools.cache
def _checkpoint(reference):
  config, params = weights.load_checkpoint(reference.folder)
  ids = reference.json("special_tokens.json")
  special = SpecialTokens(text_start=ids["bos_token_id"], text_end=ids["eos_token_id"],
                          image_start=ids["start_of_image"], image_end=ids["end_of_image"])
  return Checkpoint(config, params, special)


@pytest.fixture
def checkpoint(reference):
  return _checkpoint(reference)


# Files that take longest, first: else one process ends long after the others (launch/test.sh keeps
# this order).
LONGEST = ("test_mini_checkpoint", "test_train_faults", "test_generate", "test_mini_texts",
           "test_optimized", "test_mini_run", "test_step", "test_train_run", "test_plan",
           "test_before", "test_packing", "test_cli_run", "test_rl_run", "test_rl")


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module")
def tab():
  """A tab of Chromium; the test is skipped where there is none."""
  if not (program := browser.find()):
    pytest.skip("needs Chromium or Chrome on the PATH")
  with browser.started(program) as found:
    yield found


def relative_error(got, want) -> float:
  """Norm of the difference over the norm of `want`."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
