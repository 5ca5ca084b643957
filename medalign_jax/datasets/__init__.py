"""One file a published data set: its layout, labels and traps, read into a manifest."""
