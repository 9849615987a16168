"""Models: one network, two backends behind one seam (:mod:`ingot.models.base`)."""
