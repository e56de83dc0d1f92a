"""Parity with XLA's optimizations on, as users run it; the other tests compile without."""

import os
import subprocess
import sys

from conftest import ROOT, reference_folders, reference_root
import pytest

# An image's denoising; two rounds of generation; the gradients of a training step.
CASES = ("test_latents_after_all_steps and 1", "test_two_rounds_end_to_end", "test_every_gradient")
FOLDERS = reference_folders()


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(not FOLDERS, reason=f"no reference vectors under {reference_root()}")
def test_parity_with_the_default_flags_of_xla(case):
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"IRG_OPTIMIZED": "1"}
  run = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/parity",
       "-k", case], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout[-5000:]
  assert f"{len(FOLDERS)} passed" in run.stdout, run.stdout
