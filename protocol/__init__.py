"""What device and cloud agree on: errors with wire codes, frames, the tensor codec, bundle manifests.

May import numpy and msgpack only. Start reading at ``messages`` (the byte format of docs/protocol.md).
"""

if __name__ != "ensembler.protocol":
    raise ImportError(f"import ensembler.protocol, not {__name__}")
