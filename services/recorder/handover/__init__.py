"""How the kernel hands a crash over, who else gets it, and who sees to it that it is let go."""
