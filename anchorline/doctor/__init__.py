"""``anchorline doctor``: what this machine can run, and why an artefact does or does not run here.

``machine.py`` gathers facts and ``conflicts.py`` judges them; both import nothing of Anchorline's
runtime, so that they still work where OpenCV or NumPy, which the runtime needs, is broken.
"""
