"""Text models: decoders with their key-value cache (`models.generate` writes with it), and BERT."""
