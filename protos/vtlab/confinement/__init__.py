"""What a server process gives up before it serves, so that whoever takes it over finds nothing more than its role."""
