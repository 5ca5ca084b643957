"""``medalign app``: drop or record a sound, see and hear what a model makes of it, in a browser."""
