"""Rows by the state of the partition in which they are tried; vtlab_conformance.scenarios puts them together."""
