"""Real-time video: frames from several sources through one detector to sinks, with honest figures.

A frame goes source -> reader thread (``feeding``) -> queue by policy (``intake``) -> detector
(``video_pipeline``) -> drawing -> sinks -> the caller. Nothing but the intake blocks or drops.
"""
