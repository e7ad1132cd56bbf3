"""Who is who: certificates for each role, the table of what each role may call, and the gate that holds it."""
