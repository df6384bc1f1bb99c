"""Files that travel with artifacts; they import nothing of optc."""
