"""How fast a merge is, how its cost grows, and how that compares with dense ways and with PEFT."""
