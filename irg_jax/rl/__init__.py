"""Learning from rewards on whole trajectories: thoughts and images of all rounds (docs/rl.md).

  prompts -> G trajectories each -> rewards by round -> advantages -> rows -> updates -> prompts ...

  sampler.py     a stochastic step of the rectified flow, and its log-probability
  objective.py   advantages, clipped loss, divergences from the reference
  rewards/       functions (record of the prompt, trajectory) -> number, one file each
  rollout.py     trajectories by `generate`, kept in files
  batches.py     trajectories as packed rows, with what was sampled and what it is worth
  step.py        what is compiled: log-probabilities, and the update
  run.py         a run, top to bottom
"""
