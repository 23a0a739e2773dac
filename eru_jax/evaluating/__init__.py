"""What `python -m eru_jax.evaluate` does: draws a benchmark's prompts, scores and compares."""
