"""Instructions that AMD-V hands to the core: one module per family, one table in `table.py`."""
