"""What a live fit needs, each deed once: the sandbox, batches, and what is measured by training a copy."""
