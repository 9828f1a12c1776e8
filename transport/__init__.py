"""Moves frames between device and cloud: the Transport interface, ZeroMQ with CURVE, keys.

May import ``ensembler.protocol``. Start reading at ``base``.
"""

if __name__ != "ensembler.transport":
    raise ImportError(f"import ensembler.transport, not {__name__}")
