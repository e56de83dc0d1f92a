"""Texts for users: of errors, and for mistyped words."""

import difflib
import errno


def message(error) -> str:
  """Text of an error for users; an OSError becomes "PATH: No space left on device"."""
  if not isinstance(error, OSError) or error.errno is None:
    text = str(error)  # it may quote a file
    return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  what = f"{error.strerror}{'; free some space and start again' if full else ''}"
  return what if error.filename is None else f"{error.filename}: {what}"


def guess(word, known) -> str:
  """" (did you mean X?)" for a mistyped word; "" if no known word is close."""
  words = {str(x).lower(): str(x) for x in known}
  near = difflib.get_close_matches(str(word).lower(), words, 1, cutoff=0.7)
  return f" (did you mean {words[near[0]]}?)" if near else ""
