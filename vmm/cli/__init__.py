"""The command line. It uses the SDK alone, so that whatever it does a script can do."""
