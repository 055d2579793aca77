"""How `dependency.py` finds what goes together: cells, traced graphs, a rule per operator, search, groups."""
