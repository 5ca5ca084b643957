"""Audio encoders, one file each, and what they bring along to learn by themselves."""
