"""Real-time video: frames from several sources through one detector to sinks, with honest figures.

A frame goes source -> ``reader`` -> queue by policy (``intake``) -> detector, tracks and drawing
(``pipeline``) -> ``sinks`` -> the caller. Nothing but the intake blocks or drops.
"""
