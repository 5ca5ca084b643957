"""One file per published data set: its layout, labels and traps, read into a manifest.

Besides: what they share (`published`, `convert`), folds by subject (`splits`), and near-copies
between recordings (`near_copies`, whose candidates come from `fingerprints`).
"""
