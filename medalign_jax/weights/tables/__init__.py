"""One mapping table an architecture, in the grammar of `medalign_jax.weights.table`."""
