"""Port devices of the VMM. They touch guest memory with VTL0's rights, never with the VMM's own."""
