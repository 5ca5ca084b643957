"""Source- and layer-wise distillation: from questions to a student, its answers and a page."""
