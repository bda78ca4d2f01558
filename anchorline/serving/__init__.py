"""Two servers over HTTP: a run that is watched in a browser, and models behind an address.

They share the gate (``access``), the handling of connections and the form of the figures. Of a run
(``live_view``) a result goes pipeline -> ``painting`` (draws and encodes once for all viewers, in a thread of
its own) -> ``live_state`` (wakes the viewers, on the server's loop) -> ``application`` (one viewer's stream).
The pipeline itself only lays the newest result down; nothing here can hold it up. With models
(``inference_server``) a request goes ``inference_pages`` -> ``intake`` (its body, within bounds)
-> ``inference_protocol`` (what it asks) -> ``batching`` (joined with others for the detector). Needs
Starlette, uvicorn and prometheus-client, the extra ``serve``.
"""
