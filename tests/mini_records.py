"""The records of the mini world's test, as `irg_jax/mini/files/test.jsonl` has them."""

import itertools

from irg_jax.mini import world

SEEN_ONLY = ("single_object", "two_object", "counting")  # nothing in them is ever held out


def records_of_test(count: int, rng, *, unseen: bool) -> list[dict]:
  """Different records of all tasks in turn; "split" is "seen" or "unseen".

  Args:
    count: number of records.
    unseen: whether they have what is held out of training; tasks that cannot are left out.
  """
  tasks = [t for t in world.WORLD1.tasks if not (unseen and t in SEEN_ONLY)]
  records, prompts = [], set()
  turns = itertools.cycle(tasks)
  while len(records) < count:
    task = next(turns)
    for _ in range(2000):  # few prompts of one object exist; then the task is left out
      record = world.sample_record(task, rng)
      if (world.is_unseen(record) == unseen and world.is_for_test(record)
          and record["prompt"] not in prompts):
        prompts.add(record["prompt"])
        records.append(record | {"split": "unseen" if unseen else "seen"})
        break
  return records
