"""Operators that stand one to one for what an engine has; made by legalization only."""
