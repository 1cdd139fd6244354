"""Tar streams of layers: into a diff directory and out of it, byte for byte the same every time.

``tar``, ``pax``, ``sparse`` and ``acltext`` are the codec and do no I/O; ``members`` reads a stream
with it; ``read`` unpacks, ``write`` packs, ``split`` keeps what an original stream held besides the
contents of files, ``compress`` opens and makes compressed streams.
"""
