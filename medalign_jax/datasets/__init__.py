"""One file per published data set: its layout, labels and traps, read into a manifest.

`emotions` gives questions in place of a manifest; `simulated` makes hearts and lungs. Besides: what
they share (`published`, `convert`), folds by subject (`splits`), and near-copies between recordings
(`near_copies`, whose candidates come from `fingerprints`).
"""
