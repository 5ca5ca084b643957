"""What `medalign_jax.main` runs: a config is turned into models, data, training and a page.

`workdir` keeps the folder honest, `parts` turns config blocks into objects, and there is one module
per method: `pretrain`, `acula`, `distill.run`, `textualize`; `evaluate` measures without training.
Of `acula`, `arms` says which alignments there are, `texts` what they align with, `alignment` trains
a fold, `measuring` and `page` show what came of it.
"""
