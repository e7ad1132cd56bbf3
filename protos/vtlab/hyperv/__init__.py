"""Hyper-V numbers and layouts, named as in the TLFS."""
