"""What passes are made of: passes, rules, re-tracing, edits of weights."""
