"""Tokenisers, chat templates, and the stages of a written chain of reasoning."""
