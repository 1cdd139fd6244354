"""One machine that applies operations to two mounts over the same layers and compares all of it.

Data flow::

    generate / catalogue --> script.History --> machine.run
                                                  |  one mount per side (sides), one worker
                                                  |  process per side (worker, courier)
                                                  v
    answers of every call, merged views, uppers, work directories, lowers  (snapshot)
                                                  v
                               compare, with known.KNOWN as the only excuse
                                                  v
                                    shrink --> a script that replays

The reference side is the kernel's overlay. What a *side* is, is only how to mount and unmount,
so the machine runs kernel against kernel (which must never differ), kernel against a side with an
injected fault (which must always differ) and kernel against any FUSE program.
"""
