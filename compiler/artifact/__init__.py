"""The folder that a compile writes: manifest, atomic publishing, checks of what an engine opens."""
