"""Turns the blocks of a config into objects: each block in one place.

`blocks`: what every method has. `audio`: an encoder and its batches. `alignment`: AcuLa's loss and
teacher. `distillation`: an audio language model, its text teacher, its batches of questions.
"""
