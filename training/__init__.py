"""The three training stages of Ensembler (Section III-C), the nets, the data, the run folder.

Imports torch; may import ``ensembler.protocol`` for errors and the wire codec. Start reading at ``stages``.
"""

if __name__ != "ensembler.training":
    raise ImportError(f"import ensembler.training, not {__name__}")
