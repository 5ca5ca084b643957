"""One mapping table per architecture, in the grammar of `medalign_jax.weights.table`."""
