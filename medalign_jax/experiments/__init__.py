"""What `medalign_jax.main` runs: a config is turned into models, data, training and a page.

`workdir` keeps the folder honest, `build` makes the parts from a config, and there is one module a
method: `pretrain`, `acula`. `comparison` measures encoders before and after, `page` shows it.
"""
