"""The Hugging Face hub: checkpoints and datasets by name, through `huggingface_hub`.

A name is `owner/name` or `owner/name@revision`. A folder of that name on this machine goes first.
The hub's own cache (HF_HOME), token (HF_TOKEN), server (HF_ENDPOINT) and offline mode
(HF_HUB_OFFLINE) apply.
"""

import importlib
import pathlib
import re
import sys

from irg_jax import messages, storage

_HELD = {"model": "checkpoint that irg reads", "dataset": "mode of IRGL"}
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w][\w./-]*))?")


def is_name(text) -> bool:
  """Whether `text` is the name of a repository, and no path that is there."""
  return bool(_NAME.fullmatch(str(text))) and not pathlib.Path(text).exists()


def local(text, choose, kind: str = "model") -> pathlib.Path:
  """The folder at a path, or of a repository on the hub, whose files are fetched. See `fetch`."""
  return fetch(str(text), choose, kind) if is_name(text) else storage.path(text)


def fetch(name: str, choose, kind: str = "model", to=None) -> pathlib.Path:
  """Fetches the files of a repository that are needed and not there yet.

  Args:
    name: `owner/name` or `owner/name@revision`.
    choose: function from the sorted names of all files to those that are needed.
    kind: "model" or "dataset".
    to: folder to write; None: the hub's cache.

  Returns:
    The folder with the files.

  Raises:
    ValueError: names the repository, the reason and the mend.
  """
  hub, errors = _library()
  repository, revision = _NAME.fullmatch(name).groups()
  where = {"repo_id": repository, "repo_type": kind}
  try:
    info = _info(where, revision)
    if info is None:  # what is missing there is for the reader to name
      return pathlib.Path(hub.snapshot_download(
          **where, revision=revision, local_files_only=True, allow_patterns=[], local_dir=to))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    wanted = choose(sorted(sizes))
    if not wanted:
      raise ValueError(f"{name}: this repository on the hub holds no {_HELD[kind]}")
    print(f"{name} on the hub, revision {info.sha[:12]}: {len(wanted)} of {len(sizes)} files, "
          f"{sum(sizes[n] for n in wanted) / 1e9:.2f} GB", file=sys.stderr)
    return pathlib.Path(hub.snapshot_download(
        **where, revision=revision, allow_patterns=[_literal(n) for n in wanted], local_dir=to))
  except (errors.HTTPError, OSError) as e:
    raise ValueError(f"{name}: no such folder here, and {_reason(e)}") from e


def _info(where, revision):
  """Names and sizes of the files; None where the hub cannot be asked, so that the cache counts."""
  hub, errors = _library()
  if hub.is_offline_mode():
    return None
  try:
    return hub.HfApi().repo_info(**where, revision=revision, files_metadata=True)
  except errors.HfHubHTTPError:
    raise
  except (errors.HTTPError, OSError) as e:
    print(f"note: the hub cannot be reached ({messages.message(e)}); its cache is tried",
          file=sys.stderr)
    return None


def _literal(name):
  """A pattern that matches the file of this name alone."""
  return re.sub(r"([*?[])", r"[\1]", name)


def _library():
  """`huggingface_hub` and its errors, imported on first use: that takes its time."""
  names = "huggingface_hub", "huggingface_hub.utils", "huggingface_hub.errors"
  hub, utils, errors = map(importlib.import_module, names)
  if not sys.stderr.isatty():
    utils.disable_progress_bars()
  return hub, errors


def _reason(error):
  _, errors = _library()
  for kind, text in (
      (errors.GatedRepoError, "its repository on the hub is gated: ask for access on its page, and "
                              "set HF_TOKEN or run hf auth login"),
      (errors.RepositoryNotFoundError, "no such repository on the hub, or a private one: mend the "
                                       "name, or set HF_TOKEN"),
      (errors.RevisionNotFoundError, "its repository on the hub has no such revision"),
      (errors.LocalEntryNotFoundError, "it is not in the cache of the hub, which cannot be "
                                       "reached: connect once, or give a folder")):
    if isinstance(error, kind):
      return text
  return f"the hub does not serve it ({messages.message(error).splitlines()[0]})"
