"""A room for each paper the package stands on: what only its reproduction needs.

Closed forms, toy networks and special losses. What monitors read during any fit is in
:mod:`lightning_sym.functional`; rooms may use every other sub-package, and none of them uses a room.
Each room's docstring says what the paper claims, what is reproduced and by which example; the numbers are in
``docs/results``.
"""
