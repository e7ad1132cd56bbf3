"""The VSM conformance suite: rules of the TLFS as rows of data, run by guest machine code (docs/conformance.md).

`vtlab_conformance.scenarios` has the rows, `image` compiles them into a guest, `runner` runs it on machines of ours.
"""
