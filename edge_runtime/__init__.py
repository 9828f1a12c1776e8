"""Runs head and selector + tail on the device, never torch.

May import ``ensembler.protocol``. Start reading at ``runtime``.
"""

if __name__ != "ensembler.edge_runtime":
    raise ImportError(f"import ensembler.edge_runtime, not {__name__}")
