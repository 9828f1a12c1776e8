"""Turns a run folder into bundles: ONNX graphs, quantisation, parity report, manifests.

May import ``ensembler.protocol``, ``ensembler.edge_runtime`` and ``ensembler.training``. Start reading at ``pipeline``.
"""

if __name__ != "ensembler.export":
    raise ImportError(f"import ensembler.export, not {__name__}")
