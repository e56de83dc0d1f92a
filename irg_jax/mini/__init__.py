"""The paper in miniature: a world of coloured shapes, from its first image to a results table."""

# Steps of `irg mini run`, in order; here, so that `--help` does not import JAX.
STEPS = ("autoencoder", "base", "trajectories", "quality", "irgl", "checkpoint", "evaluate")
