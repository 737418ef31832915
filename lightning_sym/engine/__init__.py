"""What a live fit needs, each part in one place.

Schedules, ranks, batches and publishing; the engine that lets monitors read; and its two drivers, a Trainer
(``lightning.py``) and a plain training loop (``loop.py``).
"""
