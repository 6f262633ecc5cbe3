"""Scans as they come from the scanner: with the skull, each on a grid of its own, moved between sequences. Looked at,
registered to each other and stripped here, so that the network sees what it was trained on.

Nothing here imports torch before a skull is to be stripped, nor SimpleITK before something is to be registered.
"""
