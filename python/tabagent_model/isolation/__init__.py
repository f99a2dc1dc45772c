"""Models in processes of their own.

`remote.py` has what stands in for the engine on this side; `respawn.py` keeps its process alive;
`child.py` is one process, started as `spawn.py` says and heard through the frames of `frames.py`;
`worker.py` is what runs in it. `memory.py` keeps its place in the ledger of all models, and
`verdicts.py` remembers which files crash.
"""
