"""Simulated hearts and lungs with known truth, and questions about them."""
