"""``anchorline doctor``: what this machine can run, and why an artefact does or does not run here.

``machine.py`` gathers facts and ``conflicts.py`` judges them; neither needs NumPy or OpenCV, so that they
still work where one of these is broken.
"""
