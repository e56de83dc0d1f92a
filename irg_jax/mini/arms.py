"""The arms of a run's report, as files/report.toml lists them: what draws the test."""

import dataclasses
import tomllib

from irg_jax.mini import benchmark

WORDING = tomllib.loads((benchmark.FILES / "report.toml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Arm:
  """A checkpoint on the test; files/report.toml explains the fields."""

  name: str
  title: str
  weights: str
  rounds: int
  think: bool = True
  without: str = ""
  blind: bool = False


ARMS = tuple(Arm(**arm) for arm in WORDING["arms"])
CONTROLS = tuple(Arm(**arm) for arm in WORDING["controls"])  # of `controls.run_controls`
ALL = (*ARMS, *CONTROLS)
FINAL = ARMS[-1]
