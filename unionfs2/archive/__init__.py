"""Tar streams of layers: into a diff directory and out of it, byte for byte the same every time.

``tar``, ``pax``, ``sparse`` and ``acltext`` are the codec and do no I/O. ``source`` and ``members``
read a stream, ``place`` finds where a member goes, ``attributes`` and ``read`` unpack it. ``sink``
and ``writer`` write a stream, ``write`` packs a diff directory. ``split`` keeps what an original
stream held besides the contents of files; ``compress`` opens and makes compressed streams.
"""
