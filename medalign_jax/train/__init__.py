"""One loop for all methods: step, optimizer, batches ahead, checkpoints, monitors."""
