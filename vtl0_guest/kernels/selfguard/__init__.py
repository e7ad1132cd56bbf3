"""The guest kernel selfguard: sources, and what is built from them. README.md says how."""
