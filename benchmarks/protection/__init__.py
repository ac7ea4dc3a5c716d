"""How much protection the immunizers give, over many tasks: the bad ones included."""
