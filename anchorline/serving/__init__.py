"""Watching a run in a browser: a page, the annotated streams, the figures for Prometheus, the health.

A result goes pipeline -> ``painting`` (draws and encodes once for all viewers, in a thread of its own)
-> ``live_state`` (wakes the viewers, on the server's loop) -> ``application`` (one viewer's stream). The
pipeline itself only lays the newest result down; nothing here can hold it up. Needs Starlette, uvicorn
and prometheus-client, the extra ``serve``.
"""
