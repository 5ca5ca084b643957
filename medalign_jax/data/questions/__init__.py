"""Questions about recordings: readers, descriptions, prompts, batches, and overlap with a test."""
