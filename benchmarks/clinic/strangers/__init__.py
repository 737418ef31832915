"""Runs as strangers would write them: the clinic's further set, written without knowledge of the rules.

Whoever wrote them had read how monitors are called and the list of kinds, and no rule, limit or case of the
clinic. Expected kinds were committed before anything was diagnosed. A run whose independent truth contradicts
its label is not counted. Shape letters are not used: the code is as users write it.
"""
