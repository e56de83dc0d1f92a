"""The steps of `irg mini run`, in order; here apart, so that `--help` answers at once."""

STEPS = ("autoencoder", "base", "trajectories", "quality", "irgl", "checkpoint", "evaluate")
