"""The paper in miniature: a world of coloured shapes, from its first image to a results table."""
