"""Throughput of `irg serve`: requests at once against the same requests one after the other.

  python benchmarks/serve.py
  python benchmarks/serve.py --requests 16 --repeat 3 -- --checkpoint weights/irg-7b --batch-size 4

Starts a server (flags after `--`), waits until all is compiled, sends the requests both ways in
turn, and prints the seconds of each and their ratio, which is what counts on a shared machine.
"""

import argparse
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

PROMPTS = ("two red circles left of a blue star", "three green squares", "a yellow ring",
           "a purple cross above a pink triangle")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--requests", type=int, default=16)
  parser.add_argument("--repeat", type=int, default=3)
  args, flags = parser.parse_known_args()
  flags = [flag for flag in flags if flag != "--"] or ["--batch-size", "8"]
  server = subprocess.Popen([sys.executable, "-m", "irg_jax", "serve", "--port", "0", *flags],
                            stderr=subprocess.PIPE, text=True)
  try:
    url = next(found[1] for line in server.stderr
               if (found := re.search(r"listening on (http://\S+?);", line)))
    print(f"compiling: {until_ready(server):.0f} s", flush=True)
    ratios = []
    with concurrent.futures.ThreadPoolExecutor(args.requests) as pool:
      for _ in range(args.repeat):
        alone = timed(lambda: [draw(url, i) for i in range(args.requests)])
        together = timed(lambda: list(pool.map(lambda i: draw(url, i), range(args.requests))))
        ratios.append(alone / together)
        print(f"{args.requests} requests: one after the other {alone:.2f} s, at once "
              f"{together:.2f} s, {ratios[-1]:.2f} times the throughput", flush=True)
    print(f"best {max(ratios):.2f}, on {os.cpu_count()} cores")
  finally:
    server.send_signal(signal.SIGTERM)
    server.wait()


def until_ready(server):
  start = time.perf_counter()
  for line in server.stderr:
    if line.startswith("ready"):
      break
  return time.perf_counter() - start


def draw(url, seed):
  body = json.dumps({"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed}).encode()
  request = urllib.request.Request(f"{url}/v1/images/generations", body,
                                   {"Content-Type": "application/json"})
  with urllib.request.urlopen(request) as reply:
    return json.load(reply)


def timed(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


if __name__ == "__main__":
  main()
