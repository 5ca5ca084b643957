"""What `medalign_jax.main` runs: a config is turned into models, data, training and a page.

`workdir` keeps the folder honest, `build` makes the parts from a config, and there is one module a
method: `pretrain`, `acula`, `distill.run`, `textualize`. Of `acula`, `arms` says which alignments
there are, `texts` what they align with, `alignment` trains a fold, `measuring` and `page` show what
came of it.
"""
