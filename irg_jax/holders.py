"""Holders of locks: processes, told apart across machines, containers and boots."""

import contextlib
import os
import pathlib
import socket
import time
import uuid

held = set()  # keys of this process's locks


def me() -> dict:
  return {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(),
          "started": _started(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
          "key": uuid.uuid4().hex}


def machine() -> str:
  """Names the boot and the container that a process number belongs to."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # not Linux
    return socket.gethostname()


def alive(holder) -> bool:
  """Whether the holder, on this machine, has not ended. Process numbers repeat."""
  if holder.get("pid") == os.getpid():
    return holder["key"] in held
  started = _started(holder.get("pid"))
  return started is not None and (started == holder.get("started")
                                  or 0 in (started, holder.get("started")))


def _started(pid) -> int | None:
  """Start time of a process, in ticks since the boot; None if it has ended, 0 if unknown."""
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, TypeError, OverflowError):
    return None
  except PermissionError:
    pass  # of another user
  with contextlib.suppress(OSError):
    state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
  return 0
