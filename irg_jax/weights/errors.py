"""What a checkpoint that cannot be used raises."""


class CheckpointError(ValueError):
  """A checkpoint that is incomplete, damaged or of another model. Names file, key and fix."""


def listing(names, limit: int = 4) -> str:
  """`a, b, c, d and 7 more`, sorted."""
  names = sorted(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
