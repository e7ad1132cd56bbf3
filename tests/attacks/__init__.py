"""Real attacks on a running guest, driven through the SDK as an attacker with kernel code execution would drive them.

`vtlab_attacks.table` lists them; docs/attacks.md describes how to write one.
"""
