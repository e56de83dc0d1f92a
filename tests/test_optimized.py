"""Parity with XLA's optimizations on, as users run it; the other tests compile without."""

import os
import re
import subprocess
import sys

from conftest import ROOT

# Two rounds of generation; the gradients of a training step.
CASES = ("test_two_rounds_end_to_end", "test_every_gradient")


def test_parity_with_the_default_flags_of_xla():
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"IRG_OPTIMIZED": "1"}
  run = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/parity",
       "-k", " or ".join(CASES)], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout[-5000:]
  passed = int(re.search(r"(\d+) passed", run.stdout)[1])
  assert passed and passed % len(CASES) == 0, run.stdout  # once for each folder of vectors
