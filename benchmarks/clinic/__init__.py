"""The clinic: short runs whose health is known without our monitors.

A *case* is one short fit (seconds on one core) with a known truth: healthy, often in an awkward way, or
sick of one kind and from one cause. The truth is checked on held-out data, against a healthy control of the
same seed, with measures of :mod:`benchmarks.clinic.truths` that share no code with the monitors. Only then
are findings scored.

* ``python -m benchmarks.clinic.run`` (from the repository's root) fits the cases with monitors and stores
  what they read; ``--bare`` fits them without and checks the truths alone.
* ``python -m benchmarks.clinic.score`` tells how well findings agree with the truths.

Kinds, causes, checks and the split of architectures into a half for tuning rules and a half for reporting
(:data:`benchmarks.clinic.common.HALVES`) were fixed before any rule was tuned.
"""
