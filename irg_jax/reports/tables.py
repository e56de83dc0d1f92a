"""Tables in Markdown."""


def table(head, rows, numbers: bool = False) -> str:
  """A Markdown table: a row of column names, then rows of as many cells, all text.

  Args:
    numbers: aligns all columns but the first to the right.
  """
  lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
