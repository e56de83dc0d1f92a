"""Tables in Markdown."""


def table(head, rows, numbers: bool = False, padded: bool = False) -> str:
  """A Markdown table: a row of column names, then rows of as many cells, all text.

  Args:
    numbers: aligns all columns but the first to the right.
    padded: pads the cells of a column to one width, for a terminal.
  """
  lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
  if padded:
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[name.ljust(first), *map(str.rjust, cells, widths)] for name, *cells in lines]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
