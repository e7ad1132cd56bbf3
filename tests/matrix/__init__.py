"""Attacks × transitions × designs: every cell on a machine of its own, its verdict from that machine's state.

`vtlab matrix` runs it; vtlab_attacks holds what is done in a cell.
"""
