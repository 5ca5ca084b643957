"""Language models: decoders and BERT, and generation with a key-value cache."""
