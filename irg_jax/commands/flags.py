"""Types of command line values that several verbs share."""

import argparse
import re


def mesh(text: str) -> dict[str, int]:
  """Sizes by axis name of "data=2,fsdp=4".

  Raises:
    argparse.ArgumentTypeError: not of that form, or an axis twice.
  """
  axes = [re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip()) for part in text.split(",")]
  if not all(axes) or len({a[1] for a in axes}) < len(axes):
    raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; write data=2,fsdp=4")
  return {a[1]: int(a[2]) for a in axes}
