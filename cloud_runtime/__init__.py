"""Runs the N server nets for many devices: batcher, engine, server.

May import ``ensembler.protocol`` and ``ensembler.transport``. Start reading at ``server``.
"""

if __name__ != "ensembler.cloud_runtime":
    raise ImportError(f"import ensembler.cloud_runtime, not {__name__}")
