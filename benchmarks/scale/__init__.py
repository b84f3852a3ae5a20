"""How merges scale: with the machine, past it, and what they cost beforehand."""
