"""Tokenisers, chat templates, the stages of written reasoning, and options named in an answer."""
