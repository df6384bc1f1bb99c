"""How weights are stored: integer grids and the layouts of checkpoints."""
