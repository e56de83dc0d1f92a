"""The documents: what the code cites of them exists."""

import math
import re

from conftest import ROOT
import pytest

from irg_jax import chips
from irg_jax.config import ModelConfig
from irg_jax.weights import names

# "spec section 2", "spec sections 3 to 6", "docs/spec.md, section 3", "spec 4 and 7"
_CITED = re.compile(r"\bspec(?:\.md)?,?\s+(?:#\s+)?(?:sections?\s+)?(\d+(?:(?:, | and | to )\d+)*)",
                    re.IGNORECASE)
_FILES = sorted(p for folder in ("irg_jax", "configs", "benchmarks", "tests", "launch")
                for p in (ROOT / folder).rglob("*.py"))


def cited(text):
  """Numbers of the sections of the specification that a text cites."""
  found = set()
  for numbers in _CITED.findall(text):
    for part in re.split(", | and ", numbers):
      first, last = (part.split(" to ") * 2)[:2]
      found |= set(range(int(first), int(last) + 1))
  return found


@pytest.mark.parametrize("text, want", [
    ("(spec section 2)", {2}), ("spec sections 3 to 6).", {3, 4, 5, 6}), ("spec 4 and 7", {4, 7}),
    ("docs/spec.md, section 13", {13}), ("PartitionSpec 3", set()), ("inspection 4", set())])
def test_citations_are_found(text, want):
  assert cited(text) == want


def test_every_section_that_the_code_cites_exists():
  lines = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8").splitlines()
  sections = [int(m[1]) for line in lines if (m := re.match(r"## (\d+)\. ", line))]
  assert sections == list(range(1, len(sections) + 1))
  found = {path: cited(path.read_text(encoding="utf-8")) for path in _FILES
           if path.name != "test_docs.py"}
  assert len([path for path, numbers in found.items() if numbers]) >= 15  # the pattern finds them
  assert not {str(path): wrong for path, numbers in found.items()
              if (wrong := numbers - set(sections))}


def test_the_tables_of_real_weights_are_those_of_the_code():
  text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
  slices = re.findall(r"^\| v\S.*? \| (\d+) \| (v.*?) \|$", text, re.MULTILINE)
  assert len(slices) > 10
  for count, topologies in slices:
    for topology in topologies.split(", "):
      assert chips.parse_slice(topology).chips == int(count), topology
  bytes_of = {"transformer": 2, "vae": 4}
  sizes = dict.fromkeys(bytes_of, 0)
  for row in names.rows(ModelConfig()):
    part = row.path.split("/")[0]
    sizes[part] += math.prod(row.shape) * bytes_of[part]
  shown = re.findall(r"^\| `(?:ema|ae)\.safetensors` \| ([\d.]+) GB", text, re.MULTILINE)
  assert [f"{sizes['transformer'] / 1e9:.1f}", f"{sizes['vae'] / 1e9:.2f}"] == shown


def test_every_check_of_a_promise_exists():
  text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
  checks = re.findall(r"`(tests/\S+\.py)(?: -k \"?([^`\"]+?)\"?)?( -m long)?`", text)
  assert len(checks) >= 30
  for file, words, long in checks:
    source = (ROOT / file).read_text(encoding="utf-8")
    names = " ".join(re.findall(r"def (test_\w+)", source))
    for word in re.split(" or ", words) if words else ():
      assert word in names, (file, word)
    assert not long or "mark.long" in source, file
