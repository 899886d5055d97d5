"""Composition root: the only room that knows everybody. Builds processes out of the other rooms."""
