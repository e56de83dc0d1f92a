"""Tables in Markdown."""


def table(head, rows) -> str:
  """A Markdown table: a row of column names, then rows of as many cells, all text."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
