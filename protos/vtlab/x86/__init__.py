"""x86 numbers and pure algorithms, named as in the Intel and AMD manuals."""
