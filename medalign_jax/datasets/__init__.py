"""One file per published data set: its layout, labels and traps, read into a manifest.

Besides: folds by subject (`splits`), near-copies between recordings (`leaks`, whose candidates
come from `fingerprints`) and the nearest training waveform as a baseline (`nearest`).
"""
