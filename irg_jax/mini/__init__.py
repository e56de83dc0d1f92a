"""The paper in miniature: a world of coloured shapes, from its first picture to a results table."""
