"""What a server can reconstruct of the images that a device sends: attacks, metrics, the audit and its report.

Imports torch; may import ``ensembler.protocol``, ``ensembler.edge_runtime`` and ``ensembler.training``. Start reading
at ``audit``: it builds a ``scene``, runs the ``attacks`` on it and judges what they bring back. ``boundary`` asks of a
plain net how deep its cut must lie (C2PI).
"""

if __name__ != "ensembler.privacy":
    raise ImportError(f"import ensembler.privacy, not {__name__}")
