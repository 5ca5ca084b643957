"""Questions about recordings: readers, prompts, batches, and what overlaps with a test."""
