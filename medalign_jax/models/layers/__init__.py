"""What several architectures are built of: attention, stacks of layers, pooling, heads, LoRA."""
